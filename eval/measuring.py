"""The figures of one pair of models: KL, where it comes from, and answers that flip, from one twin walk (twin.py).

`measure` walks two checkpoints that are whole on disk. A run of quantize makes a Measuring instead and walks along with
its blocks, each as soon as its shard is on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..calibration.tokens import Encoder
from ..checkpoint.activations import Activations
from ..checkpoint.files import disk_errors
from ..checkpoint.model import Model
from ..core.record.blocks import ErrorSummary
from ..core.record.flips import FlipSummary
from ..core.record.kl import KlSummary
from ..core.record.schema import Record
from ..core.rows import Row, RowStore
from ..core.units import counted
from ..models.walk import Walk
from .breakdown import break_down
from .choice import Asking, ask, scores
from .intervals import FEW_DOCUMENTS
from .summary import summarize
from .task_requests import requests_of
from .tasks import Task, flip_summary, repeated_warnings
from .token_table import write_tokens
from .twin import Twin, TwinWalk

WITHOUT_VISION = "{name} has no vision tower: no text with a picture is evaluated"


@dataclass(frozen=True)
class Measured:
    """The record's `kl`, `errors` and `flips`, each None if it was not asked for, the dtype that they were computed in,
    and warnings for the user."""

    compute_dtype: str
    kl: KlSummary | None
    errors: ErrorSummary | None
    flips: FlipSummary | None
    warnings: list[str]

    def put_into(self, record: Record) -> None:
        record.compute_dtype = self.compute_dtype
        record.kl, record.errors, record.flips = self.kl, self.errors, self.flips
        record.warnings += self.warnings


@dataclass(frozen=True)
class Evaluation:
    """What is measured: `rows`, and the items of `tasks`; either may be empty. `encoder` is the original's."""

    encoder: Encoder
    rows: list[Row]
    tasks: Sequence[Task]


@dataclass(frozen=True)
class Calibrated:
    """What is known of the calibration of the checkpoint that is measured; nothing, where its record does not say."""

    # By block, the rows of each expert.
    rows: Mapping[int, list[int]] = field(default_factory=dict)
    # The kinds of the texts.
    kinds: frozenset[str] = frozenset()

    @classmethod
    def of(cls, record: Record) -> "Calibrated":
        """From the record of the run that made the checkpoint."""
        texts = record.texts.get("calibration")
        rows = {block.block: list(block.expert_rows) for block in record.blocks if block.expert_rows}
        return cls(rows, frozenset() if texts is None else frozenset(texts.tokens_by_kind))


class Measuring:
    """A twin walk over what is asked, and its figures. Both walks are over one model, on one device; `store` holds the
    hidden rows of both meanwhile."""

    def __init__(self, walk: Walk, other: Walk, evaluation: Evaluation, store: RowStore) -> None:
        self._evaluation = evaluation
        self._requests = [requests_of(task, evaluation.encoder) for task in evaluation.tasks]
        self._asking: Asking = ask([request for own in self._requests for request in own])
        self._dtype_name, self._step = walk.compute.dtype_name, walk.step
        rows, asking = evaluation.rows, self._asking
        self.twin = TwinWalk(walk, other, rows, store, asked=asking.asked, with_errors=bool(rows))

    def figures(self, other: Walk, calibrated: Calibrated, keep_tokens: Path | None = None) -> Measured:
        """Once all blocks are walked. `other`: for its norm and head. `keep_tokens`: a Parquet file for the results of
        every token."""
        twin = self.twin.finish(other)
        self._step.begin("verify: figures")
        evaluation, tasks = self._evaluation, self._evaluation.tasks
        kl: KlSummary | None = None
        errors: ErrorSummary | None = None
        flips: FlipSummary | None = None
        warnings = []
        if twin.tokens is not None and twin.errors is not None:
            kl = _kl(twin, evaluation, calibrated)
            errors = ErrorSummary.model_validate(twin.errors.facts(calibrated.rows))
            if keep_tokens is not None:
                with disk_errors(keep_tokens):
                    write_tokens(keep_tokens, twin.tokens, evaluation.rows)
            if kl.documents < FEW_DOCUMENTS:
                warnings.append(
                    f"{counted(kl.documents, 'evaluation document')}: too few for the intervals to "
                    f"mean much. Give {FEW_DOCUMENTS} or more; a document is one draw, whatever its length"
                )
        if twin.answers is not None:
            scored = iter(scores(self._asking, twin.answers))
            warnings += repeated_warnings(tasks)
            flips = flip_summary(tasks, [list(islice(scored, len(own))) for own in self._requests])
        return Measured(self._dtype_name, kl, errors, flips, warnings)


def _kl(twin: Twin, evaluation: Evaluation, calibrated: Calibrated) -> KlSummary:
    assert twin.tokens is not None
    encoder = evaluation.encoder

    def decode(ids: list[int]) -> str:
        return str(encoder.tokenizer.decode(ids, skip_special_tokens=False))

    by_block = {str(block): share for block, share in twin.changed_routes.items()}
    summary = summarize(twin.tokens).model_copy(
        update={"changed_routes": twin.mean_changed_routes, "changed_routes_by_block": by_block}
    )
    placeholder = encoder.adapter.image_token_id
    return break_down(summary, twin.tokens, evaluation.rows, placeholder, decode, calibrated.kinds)


def measure(
    walk: Walk,
    quantized: Model,
    evaluation: Evaluation,
    *,
    folder: Path,
    calibrated: Calibrated,
    keep_tokens: Path | None = None,
) -> Measured:
    """Walk both models once. `walk` is the original's. Hidden rows live in `folder` meanwhile, if RAM cannot hold them.
    For the other arguments see Measuring."""
    store = Activations(folder, walk.device)
    other = walk.beside(quantized.adapter, quantized.source)
    measuring = Measuring(walk, other, evaluation, store)
    measuring.twin.through_all()
    return measuring.figures(other, calibrated, keep_tokens)
