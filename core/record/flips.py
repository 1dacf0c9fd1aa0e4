"""A record's `flips`: multiple-choice items that the two models answer differently, by task and over all tasks."""

from .part import Many, RecordPart


class Share(RecordPart):
    """`count` of the items, and Wilson's 95 % interval of that share."""

    share: float
    low: float | None = None
    high: float | None = None
    count: int


class Answer(RecordPart):
    """One item: the number of the right option and of the option that each model chose. Margins are in nats."""

    id: str | int
    right: int | None = None
    reference: int
    quantized: int
    margin_reference: float | None = None
    margin_quantized: float | None = None


class TaskFlips(RecordPart):
    """The figures of one task, or of all tasks together (`task` is then "all", without digest, shots and answers)."""

    task: str
    digest: str | None = None
    shots: int | None = None
    items: int
    accuracy_reference: Share
    accuracy_quantized: Share
    changed: Share
    right_to_wrong: Share
    wrong_to_right: Share
    mcnemar_p: float | None = None
    # How far the original preferred its answer to the next: where the answer changed (None: nowhere), and on all items.
    margin_of_changed: float | None = None
    margin_of_all: float | None = None
    answers: Many[Answer] = ()


class FlipSummary(RecordPart):
    all: TaskFlips
    tasks: Many[TaskFlips] = ()
