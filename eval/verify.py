"""The proof: how far a checkpoint, as its files are read back, is from the original. By the twin walk; KL, what it is
made of and where it comes from. A run's own verification and the verb `verify` are this one."""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import __version__
from ..calibration.texts import prepare_texts
from ..calibration.tokens import Encoder
from ..checkpoint.files import disk_errors
from ..checkpoint.model import Model, open_model, said_name, stored_facts
from ..checkpoint.source import refuse_nonfinite
from ..checkpoint.workdir import Activations
from ..core.device import choose_compute
from ..core.errors import InputError
from ..core.file_names import RECORD_NAME
from ..core.rows import Row
from ..models.walk import Walk
from ..recipe import Recipe
from ..report.progress import Progress
from ..report.record import RunRecord
from ..report.resources import describe_machine, package_versions, peak_device_bytes, peak_rss_bytes
from .choice import ask, scores
from .intervals import FEW_DOCUMENTS
from .kept import write_tokens
from .summary import summarize
from .task_requests import requests_of
from .tasks import Task, flips_facts, load_tasks
from .told import tell
from .twin import twin_walk

SAME_FOLDER = (
    "source and checkpoint are the same folder: nothing can differ (`demo` is the embedded model, a folder of that "
    "name ./demo)"
)


WITHOUT_VISION = "{name} has no vision tower: no text with a picture is evaluated"


@dataclass(frozen=True)
class Measured:
    """The record's `kl`, `errors` and `flips`, each empty if it was not asked for, and what the user should know."""

    kl: dict[str, Any]
    errors: dict[str, Any]
    flips: dict[str, Any]
    warnings: list[str]

    def put_into(self, record: RunRecord) -> None:
        record.kl, record.errors, record.flips = self.kl, self.errors, self.flips
        record.warnings += self.warnings


def measure(
    walk: Walk,
    model: Model,
    quantized: Model,
    *,
    rows: list[Row],
    tasks: Sequence[Task],
    folder: Path,
    calibration_rows: dict[int, list[int]],
    keep_tokens: Path | None = None,
) -> Measured:
    """Walk both models once, over `rows` and the items of `tasks`; either may be empty. `walk` is over `model`. Hidden
    rows live in `folder` meanwhile. `calibration_rows`: of every block's experts, for the record. `keep_tokens`: a
    Parquet file for the results of every token."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder = Encoder(model.path, model.adapter)
    requests = [requests_of(task, encoder) for task in tasks]
    asking = ask([request for own in requests for request in own])
    other = walk.beside(quantized.adapter, quantized.source)
    twin = twin_walk(walk, other, rows, Activations(folder), asked=asking.asked, with_errors=bool(rows))
    walk.step.begin("verify: figures")
    kl: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    flips: dict[str, Any] = {}
    warnings = []
    if twin.tokens is not None and twin.errors is not None:

        def decode(ids: list[int]) -> str:
            return str(encoder.tokenizer.decode(ids, skip_special_tokens=False))

        kl = asdict(summarize(twin.tokens)) | tell(twin.tokens, rows, model.adapter.image_token_id, decode)
        kl |= {
            "changed_routes": twin.mean_changed_routes,
            "changed_routes_by_block": {str(block): share for block, share in twin.changed_routes.items()},
        }
        errors = twin.errors.facts(calibration_rows)
        if keep_tokens is not None:
            with disk_errors(keep_tokens):
                write_tokens(keep_tokens, twin.tokens, rows)
        if kl["documents"] < FEW_DOCUMENTS:
            warnings.append(
                f"{kl['documents']} evaluation document{'s' if kl['documents'] > 1 else ''}: too few for the intervals "
                f"to mean much. Give {FEW_DOCUMENTS} or more; a document is one draw, whatever its length"
            )
    if twin.answers is not None:
        scored = iter(scores(asking, twin.answers))
        flips = flips_facts(tasks, [list(islice(scored, len(own))) for own in requests])
    return Measured(kl, errors, flips, warnings)


def rows_of_experts(blocks: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By block, the calibration rows of its experts, from a record's `blocks`."""
    return {block["block"]: block["expert_rows"] for block in blocks if block.get("expert_rows")}


def recorded_rows(checkpoint: Model) -> dict[int, list[int]]:
    """What the checkpoint's own record says of calibration rows; nothing where there is no record that can be read, or
    one that is not of so many experts."""
    try:
        found = rows_of_experts(json.loads((checkpoint.path / RECORD_NAME).read_text(encoding="utf-8"))["blocks"])
        return {
            block: rows
            for block, rows in found.items()
            if len(rows) == checkpoint.adapter.n_experts and all(isinstance(count, int) for count in rows)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def close_machine(record: RunRecord, progress: Progress, device: torch.device, began: float) -> None:
    """Time, memory and machine of the run that ends here."""
    progress.begin("finish")
    record.machine = describe_machine(device.type) | {
        "seconds": round(time.monotonic() - began, 3),
        "stage_seconds": {stage: round(s, 3) for stage, s in progress.seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


def open_pair(source_name: str, checkpoint: str) -> tuple[Model, Model]:
    """The original and the checkpoint that is said to be a version of it. Raises InputError."""
    source, quantized = open_model(source_name), open_model(checkpoint)
    a, b = source.adapter, quantized.adapter
    if a.has_vision and not b.has_vision:  # a format that holds the text model alone
        a = a.text_only()
    if a.family != b.family or a.expected() != b.expected():
        raise InputError(f"{checkpoint} is no version of {source_name}: their families or sizes differ")
    if source.quantized and not quantized.quantized:
        raise InputError(f"{source_name} is quantized and {checkpoint} is not: name the original first")
    return source, quantized


def tasks_of(recipe: Recipe) -> list[Task]:
    """The tasks that a recipe names. Raises InputError or ResourceError."""
    return load_tasks(recipe.texts.tasks, recipe.texts.task_shots, recipe.texts.task_items, recipe.folder)


def pair_record(command: str, source: Model, quantized: Model) -> RunRecord:
    """What a record of two checkpoints says before anything is measured."""
    facts = stored_facts(quantized)
    same = [SAME_FOLDER] if source.path.resolve() == quantized.path.resolve() else []
    return RunRecord(
        command=command,
        onecard=__version__,
        model=source.facts(),
        recipe={},
        checkpoint={
            "name": said_name(quantized.name),
            "digest": quantized.folder.digest,
            "bytes": facts["emitted_bytes"],
        },
        plan=facts | {"source_bytes": source.folder.file_bytes},
        versions=package_versions(),
        warnings=same + source.adapter.faults(source.config) + source.warnings + quantized.warnings,
    )


def verify(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    *,
    evaluation: Path | None = None,
    keep_tokens: Path | None = None,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> RunRecord:
    """The independent proof: `checkpoint`, as its files are read back, against `source_name`, on texts and tasks."""
    return _measured_pair(
        "verify",
        source_name,
        checkpoint,
        recipe,
        tasks_of(recipe),
        True,
        evaluation,
        keep_tokens,
        device_name,
        console,
        quiet,
    )


def flips(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> RunRecord:
    """Multiple-choice items, answered by both models in one walk. Of the recipe: how to compute."""
    return _measured_pair(
        "flips", source_name, checkpoint, recipe, tasks, False, None, None, device_name, console, quiet
    )


def _measured_pair(
    command: str,
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    tasks: Sequence[Task],
    with_texts: bool,
    evaluation: Path | None,
    keep_tokens: Path | None,
    device_name: str,
    console: Console | None,
    quiet: bool,
) -> RunRecord:
    began = time.monotonic()
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens)
    source, quantized = open_pair(source_name, checkpoint)
    record = pair_record(command, source, quantized)
    rows: list[Row] = []
    if with_texts:
        reader = source
        if source.adapter.has_vision and not quantized.adapter.has_vision:
            reader = replace(source, adapter=source.adapter.text_only())
            record.warnings.append(WITHOUT_VISION.format(name=said_name(checkpoint)))
        texts = prepare_texts(reader, recipe, None, evaluation, needs_calibration=False)
        rows, record.texts = texts.evaluation, texts.facts
        record.warnings += texts.warnings
    with (
        tempfile.TemporaryDirectory(prefix="onecard-verify-") as folder,
        Progress(f"onecard {command} {checkpoint}", source.adapter.n_blocks, console, quiet) as progress,
    ):
        progress.begin("check weights")
        for model in (source, quantized):
            refuse_nonfinite(model.folder, model.name)
        measured = measure(
            Walk.over(source.adapter, source.source, compute, progress),
            source,
            quantized,
            rows=rows,
            tasks=tasks,
            folder=Path(folder) / "acts",
            calibration_rows=recorded_rows(quantized),
            keep_tokens=keep_tokens,
        )
        measured.put_into(record)
        close_machine(record, progress, compute.device, began)
    return record
