"""The proof: how far a checkpoint, as its files are read back, is from the original.

The twin walk (twin.py) measures KL, where it comes from, and answers that flip. A run's own verification and the verbs
`verify` and `flips` are this one.
"""

import datetime as dates
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..calibration.texts import prepare_texts
from ..calibration.tokens import Encoder
from ..checkpoint.activations import Activations
from ..checkpoint.checked import check_weights, checked_as_loaded
from ..checkpoint.model import Model, open_model, said_name
from ..checkpoint.stored_widths import stored_facts
from ..core.device import Compute, choose_compute
from ..core.errors import InputError
from ..core.file_names import RECORD_NAME
from ..core.rates import first_guess
from ..core.record.reading import read_record
from ..core.record.schema import CheckpointFacts, Machine, ModelFacts, PlanSummary, Record, TextFacts
from ..core.rows import Row
from ..core.schedule import Schedule
from ..models.adapter import Adapter
from ..models.walk import Walk
from ..planner.schedule import verification_schedule
from ..recipe import Recipe
from ..report.progress import Progress
from ..report.resources import describe_machine, package_versions, peak_device_bytes, peak_rss_bytes
from .floor import measure_floor, refuse_without_floor
from .measuring import WITHOUT_VISION, Calibrated, Evaluation, measure
from .sides import compare_sides
from .tasks import Task, load_tasks

SAME_FOLDER = (
    "source and checkpoint are the same folder: nothing can differ (`demo` is the embedded model, a folder of that "
    "name ./demo)"
)


def _own_record(checkpoint: Model) -> Record | None:
    """The checkpoint's own record, where it has a sound one."""
    try:
        return read_record(checkpoint.path / RECORD_NAME)
    except InputError:
        return None


def recorded_date(checkpoint: Model) -> dates.date | None:
    """The date that the chat template was told in the run that made the checkpoint."""
    record = _own_record(checkpoint)
    try:
        return dates.date.fromisoformat((record and record.template_date) or "")
    except ValueError:
        return None


def recorded_calibration(checkpoint: Model) -> Calibrated:
    """From the checkpoint's own record; nothing where there is no sound record, and no rows of experts where it has
    another number of them."""
    record = _own_record(checkpoint)
    found = Calibrated() if record is None else Calibrated.of(record)
    rows = {block: rows for block, rows in found.rows.items() if len(rows) == checkpoint.adapter.n_experts}
    return replace(found, rows=rows)


def close_machine(record: Record, progress: Progress, device: torch.device, began: float) -> None:
    """Time, memory and machine of the run that ends here."""
    progress.begin("finish")
    record.machine = Machine(
        **describe_machine(device),
        seconds=round(time.monotonic() - began, 3),
        stage_seconds={stage: round(s, 3) for stage, s in progress.seconds.items()},
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=peak_device_bytes(),
    )


@dataclass(frozen=True)
class VerifyOptions:
    """What a user may say of a verification beside the pair and the recipe."""

    # The user's own evaluation texts; None: the recipe's.
    evaluation: Path | None = None
    # A Parquet file for the results of every token.
    keep_tokens: Path | None = None
    # Also measure what computing in this dtype costs by itself (floor.py).
    floor: bool = False


@dataclass(frozen=True)
class _Asked:
    """What `verify` or `flips` was asked to measure. Without texts only the tasks are."""

    command: str
    source_name: str
    checkpoint: str
    recipe: Recipe
    tasks: Sequence[Task]
    with_texts: bool = False
    options: VerifyOptions = VerifyOptions()


def open_pair(source_name: str, checkpoint: str) -> tuple[Model, Model]:
    """(original, checkpoint). Raises InputError unless the checkpoint can be a version of the original."""
    source, quantized = open_model(source_name), open_model(checkpoint)
    a, b = source.adapter, quantized.adapter
    if a.has_vision and not b.has_vision:  # a format that holds only the text model
        a = a.text_only()
    differ = _differences(a, b)
    if differ:
        raise InputError(
            f"{checkpoint} is no version of {source_name} ({differ}): name the original that it was made from"
        )
    if source.quantized and not quantized.quantized:
        raise InputError(f"{source_name} is quantized and {checkpoint} is not: name the original first")
    return source, quantized


def _differences(a: Adapter, b: Adapter) -> str:
    """What two models do not share, each with its value in both; empty if one can be a version of the other."""
    for word, ours, theirs in (
        ("family", a.family, b.family),
        ("vocabulary", a.vocab_size, b.vocab_size),
        ("hidden size", a.hidden_size, b.hidden_size),
        ("blocks", a.n_blocks, b.n_blocks),
        ("experts", a.n_experts, b.n_experts),
    ):
        if ours != theirs:
            return f"{word} {theirs} in place of {ours}"
    ours_of, theirs_of = a.expected(), b.expected()
    for name in sorted(ours_of.keys() | theirs_of.keys()):
        one, other = ours_of.get(name), theirs_of.get(name)
        if one != other:
            return f"{name} is {list(other) if other else 'not there'} in place of {list(one) if one else 'nothing'}"
    return ""


def tasks_of(recipe: Recipe) -> list[Task]:
    """The tasks that a recipe names. Raises InputError or ResourceError."""
    return load_tasks(recipe.texts.tasks, recipe.texts.task_shots, recipe.texts.task_items, recipe.folder)


def pair_record(command: str, source: Model, quantized: Model) -> Record:
    """The record of two checkpoints before anything is measured."""
    facts = stored_facts(quantized)
    same = [SAME_FOLDER] if source.path.resolve() == quantized.path.resolve() else []
    return Record(
        command=command,
        onecard=__version__,
        model=ModelFacts(**source.facts()),
        checkpoint=CheckpointFacts(
            name=said_name(quantized.name), digest=quantized.folder.digest, bytes=facts["emitted_bytes"]
        ),
        plan=PlanSummary(**facts, source_bytes=source.folder.file_bytes),
        versions=package_versions(),
        warnings=same + source.adapter.faults(source.config) + source.warnings + quantized.warnings,
    )


def verify(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    options: VerifyOptions | None = None,
    *,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> Record:
    """The independent proof: `checkpoint`, as its files are read back, against `source_name`. Raises InputError."""
    asked = _Asked(
        command="verify",
        source_name=source_name,
        checkpoint=checkpoint,
        recipe=recipe,
        tasks=tasks_of(recipe),
        with_texts=True,
        options=options or VerifyOptions(),
    )
    return _measured_pair(asked, device_name, console, quiet)


def flips(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> Record:
    """Multiple-choice items, answered by both models in one walk. Of `recipe` only dtype and batch size count."""
    asked = _Asked(command="flips", source_name=source_name, checkpoint=checkpoint, recipe=recipe, tasks=tasks)
    return _measured_pair(asked, device_name, console, quiet)


def _rows(asked: _Asked, source: Model, quantized: Model, record: Record, encoder: Encoder) -> list[Row]:
    """The evaluation rows; the record gets what it says of them, and of what else differs between the two sides."""
    if not asked.with_texts:
        compare_sides(source, quantized, encoder, (), asked.tasks).put_into(record)
        return []
    reader = source
    if source.adapter.has_vision and not quantized.adapter.has_vision:
        reader = replace(source, adapter=source.adapter.text_only())
        record.warnings.append(WITHOUT_VISION.format(name=said_name(asked.checkpoint)))
    texts = prepare_texts(
        reader, asked.recipe, None, asked.options.evaluation, needs_calibration=False, date=encoder.date
    )
    record.texts = {which: TextFacts(**facts) for which, facts in texts.facts.items()}
    record.warnings += texts.warnings
    compare_sides(source, quantized, encoder, texts.documents, asked.tasks).put_into(record)
    return texts.evaluation


def _schedule(source: Model, quantized: Model, rows: list[Row], asked: _Asked, compute: Compute) -> Schedule:
    return verification_schedule(
        source.adapter,
        source.folder.file_bytes,
        quantized.folder.file_bytes,
        sum(len(row.tokens) for row in rows),
        first_guess(compute.device, compute.dtype),
        with_tasks=bool(asked.tasks),
        with_floor=asked.options.floor,
    )


def _measured_pair(asked: _Asked, device_name: str, console: Console | None, quiet: bool) -> Record:
    began = time.monotonic()
    compute = choose_compute(device_name, asked.recipe.compute_dtype, asked.recipe.batch_tokens)
    if asked.options.floor:
        refuse_without_floor(compute)
    source, quantized = open_pair(asked.source_name, asked.checkpoint)
    record = pair_record(asked.command, source, quantized)
    date = asked.recipe.texts.template_date or recorded_date(quantized) or dates.date.today()
    encoder = Encoder(source.path, source.adapter, date)
    record.template_date = None if encoder.template.date is None else date.isoformat()
    rows = _rows(asked, source, quantized, record, encoder)
    with (
        tempfile.TemporaryDirectory(prefix="onecard-verify-") as folder,
        Progress(f"onecard {asked.command} {asked.checkpoint}", source.adapter.n_blocks, console, quiet) as progress,
        checked_as_loaded(compute, source, quantized),
    ):
        progress.expect(_schedule(source, quantized, rows, asked, compute))
        progress.begin("check weights")
        for model in (source, quantized):
            check_weights(model, compute, original=model is source)
        walk = Walk.over(source.adapter, source.source, compute, progress)
        measured = measure(
            walk,
            quantized,
            Evaluation(encoder, rows, asked.tasks),
            folder=Path(folder) / "acts",
            calibrated=recorded_calibration(quantized),
            keep_tokens=asked.options.keep_tokens,
        )
        measured.put_into(record)
        if asked.options.floor and record.kl is not None:
            floor = measure_floor(walk, rows, Activations(Path(folder) / "floor", walk.device))
            record.kl = record.kl.model_copy(update={"floor": floor})
        close_machine(record, progress, compute.device, began)
    return record
