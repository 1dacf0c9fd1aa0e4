"""The section on flips: multiple-choice items that the two models answer differently, by task."""

from ...core.record.flips import Share, TaskFlips
from ...core.record.schema import Record
from ...core.units import percent
from . import figures
from .parts import Figure, Section, Table, between, count, table

# Per task at most this many changed answers are listed: thousands make a page long, and nobody reads them.
MOST_ANSWERS = 200
# Tasks with the names that the page gives them. Two tasks may have one name.
Named = list[tuple[str, TaskFlips]]


def flips_section(record: Record) -> list[Section]:
    flips = record.flips
    if flips is None:
        return []
    tasks = flips.tasks or (flips.all,)
    every = [(task.task, task) for task in flips.tasks]
    if len(every) != 1:
        every.append(("all tasks", flips.all))
    summary = _summary(every)
    lede = (
        f"Both models answered {count(flips.all.items)} multiple-choice items by the likelihood of the options. "
        f"{count(flips.all.changed.count)} answers changed; equal accuracy alone would hide them."
    )
    folded = tuple(_answers(task) for task in tasks if any(a.reference != a.quantized for a in task.answers))
    return [Section("flips", "Flips", lede, (_accuracy(every, summary), _changed(every)), (summary,), folded=folded)]


def _summary(every: Named) -> Table:
    columns = (
        "task",
        ">items",
        ">original right",
        ">quantized right",
        ">answers changed",
        ">right to wrong",
        ">wrong to right",
        ">McNemar's p",
    )
    rows = [
        (
            name,
            count(task.items),
            _share(task.accuracy_reference),
            _share(task.accuracy_quantized),
            _share(task.changed),
            _share(task.right_to_wrong),
            _share(task.wrong_to_right),
            None if task.mcnemar_p is None else f"{task.mcnemar_p:.3g}",
        )
        for name, task in every
    ]
    note = (
        "Shares with Wilson's 95 % intervals. McNemar's exact test asks whether right to wrong and wrong to right "
        "differ by more than chance."
    )
    return table("Flips by task", columns, rows, note)


def _accuracy(every: Named, summary: Table) -> Figure:
    sides = (("original", "muted", "accuracy_reference"), ("quantized", "accent", "accuracy_quantized"))
    series = []
    for side, paint, key in sides:
        series.append((side, paint, [_dot(name, getattr(task, key)) for name, task in every]))
    spec = figures.dots(series, "share of items", tick=".0%", zero=False)
    return Figure("Answers that are right", spec, (summary,), "Whiskers: Wilson's 95 % intervals.")


def _changed(every: Named) -> Figure:
    tasks = [task for _, task in every]
    spec = figures.bars(
        [
            ("right to wrong", "bad", [task.right_to_wrong.share for task in tasks]),
            ("wrong to right", "good", [task.wrong_to_right.share for task in tasks]),
            ("wrong to another wrong", "muted", [_other(task) for task in tasks]),
        ],
        [name for name, _ in every],
        "share of items",
        ".1%",
        "%{y}: %{x:.2%}",
    )
    return Figure("Answers that changed", spec, (_margins(every),))


def _share(share: Share) -> str:
    at = between(share.low, share.high, lambda value: percent(value, 1))
    return f"{percent(share.share, 1)} ({at})"


def _dot(name: str, share: Share) -> figures.Dot:
    at = between(share.low, share.high, percent)
    return name, share.share, share.low, share.high, f"{percent(share.share)} ({at})"


def _other(task: TaskFlips) -> float:
    return max(0.0, task.changed.share - task.right_to_wrong.share - task.wrong_to_right.share)


def _margins(every: Named) -> Table:
    rows = [
        (
            name,
            count(task.right_to_wrong.count),
            count(task.wrong_to_right.count),
            count(task.changed.count),
            _margin(task.margin_of_changed),
            _margin(task.margin_of_all),
        )
        for name, task in every
    ]
    columns = (
        "task",
        ">right to wrong",
        ">wrong to right",
        ">changed in all",
        ">original's margin there",
        ">on all items",
    )
    note = "A margin is how far, in nats, the original preferred its answer to the next: small ones flip."
    return table("Answers that changed", columns, rows, note)


def _margin(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _answers(task: TaskFlips) -> Table:
    changed = [answer for answer in task.answers if answer.reference != answer.quantized]
    rows = [
        (a.id, a.right, a.reference, a.quantized, _margin(a.margin_reference), _margin(a.margin_quantized))
        for a in changed[:MOST_ANSWERS]
    ]
    note = f"The first {MOST_ANSWERS} of {len(changed):,}." if len(changed) > MOST_ANSWERS else ""
    columns = ("item", ">right", ">original's", ">quantized's", ">margin, original", ">margin, quantized")
    return table(f"Changed answers of {task.task}, by number of the option", columns, rows, note)
