"""The proof: KL of files, as they are read back, against the original, by the twin walk."""

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import __version__
from .checkpoint.source import Folder, refuse_nonfinite
from .checkpoint.workdir import Activations
from .core.errors import InputError
from .eval.summary import summarize
from .eval.twin import Side, twin_walk
from .prepare import Model, choose_device, choose_dtype, open_model
from .recipe import Recipe
from .report.progress import Progress
from .report.record import RunRecord
from .report.resources import describe_machine, package_versions, peak_device_bytes, peak_rss_bytes
from .texts import RunTexts, prepare_texts


def compare(
    model: Model,
    quantized: Side,
    texts: RunTexts,
    batch_tokens: int,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    """The record's `kl`. Hidden rows live in `folder` meanwhile."""
    reference = Side("reference", model.adapter, model.source)
    shutil.rmtree(folder, ignore_errors=True)
    twin = twin_walk(reference, quantized, texts.evaluation, batch_tokens, Activations(folder), device, dtype, progress)
    return asdict(summarize(twin.tokens)) | {
        "changed_routes": twin.mean_changed_routes,
        "changed_routes_by_block": {str(block): share for block, share in twin.changed_routes.items()},
    }


def close_machine(record: RunRecord, progress: Progress, device: torch.device, began: float) -> None:
    """Time, memory and machine of the run that ends here."""
    progress.begin("finish")
    record.machine = describe_machine(device.type) | {
        "seconds": round(time.monotonic() - began, 3),
        "stage_seconds": {stage: round(s, 3) for stage, s in progress.seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


def verify(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    *,
    evaluation: Path | None = None,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> RunRecord:
    """The independent proof: KL of `checkpoint`, as its files are read back, against `source_name`."""
    began = time.monotonic()
    device = choose_device(device_name)
    dtype = choose_dtype(recipe, device)
    source, quantized = open_model(source_name), open_model(checkpoint)
    a, b = source.adapter, quantized.adapter
    if a.family != b.family or a.expected() != b.expected():
        raise InputError(f"{checkpoint} is no version of {source_name}: their families or sizes differ")
    if source.quantized and not quantized.quantized:
        raise InputError(f"{source_name} is quantized and {checkpoint} is not: name the original first")
    texts = prepare_texts(source, recipe, None, evaluation, needs_calibration=False)
    parameters = sum(torch.Size(shape).numel() for shape in a.expected().values())
    low_bit = quantized.source.schemes if not isinstance(quantized.source, Folder) else {}
    shapes = a.expected()
    quantized_parameters = sum(torch.Size(shapes[f"{module}.weight"]).numel() for module in low_bit)
    quantized_bytes = sum(
        info.nbytes for name, info in quantized.folder.infos.items() if name.rpartition(".")[0] in low_bit
    )
    record = RunRecord(
        command="verify",
        onecard=__version__,
        model=source.facts(),
        recipe={},
        texts=texts.facts,
        plan={
            "emitted_bytes": quantized.folder.file_bytes,
            "source_bytes": source.folder.file_bytes,
            "bits_per_weight": quantized.folder.file_bytes * 8 / parameters,
            "quantized_bits_per_weight": quantized_bytes * 8 / max(1, quantized_parameters),
            "quantized_share": quantized_parameters / parameters,
        },
        versions=package_versions(),
        warnings=a.faults(source.config) + texts.warnings,
    )
    with (
        tempfile.TemporaryDirectory(prefix="onecard-verify-") as folder,
        Progress(f"onecard verify {checkpoint}", a.n_blocks, console, quiet) as progress,
    ):
        progress.begin("check weights")
        for model in (source, quantized):
            refuse_nonfinite(model.folder, model.name)
        record.kl = compare(
            source, Side("quantized", b, quantized.source), texts, recipe.batch_tokens, Path(folder) / "acts",
            device, dtype, progress,
        )  # fmt: skip
        close_machine(record, progress, device, began)
    return record
