"""What a record says block by block: what quantizing it did, and the error that was found in it later."""

from typing import Any

from pydantic import Field

from .part import Many, RecordPart


class BlockFacts(RecordPart):
    """What quantizing one block did. `expert_rows`: calibration rows by expert, where statistics were taken."""

    block: int
    damping_raised: int = 0
    # Matrices whose second moment could not be factored, and that were rounded by its diagonal.
    diagonal_fallbacks: int = 0
    # By site, the relative output error of each of its matrices.
    output_error: dict[str, list[float]] = Field(default_factory=dict)
    aimed: Many[str] = ()
    tuning: Many[dict[str, Any]] = ()
    expert_rows: Many[int] = ()


class BlockError(RecordPart):
    """Relative errors: of the hidden state that leaves the block, and what each half and each unit adds to it."""

    block: int
    hidden: float | None = None
    attention: float | None = None
    feed_forward: float | None = None
    units: dict[str, float | None] = Field(default_factory=dict)


class ExpertError(RecordPart):
    """Relative errors of one expert. `rows` are of the evaluation texts. `score`: how far the expert stands out of its
    block, in robust standard deviations."""

    block: int
    expert: int
    weight_error: float | None = None
    output_error: float | None = None
    rows: int | None = None
    weight_gain: float | None = None
    score: float | None = None
    calibration_rows: int | None = None


class ErrorSummary(RecordPart):
    """A record's `errors`."""

    blocks: Many[BlockError] = ()
    experts: Many[ExpertError] = ()
    worst_experts: Many[ExpertError] = ()
