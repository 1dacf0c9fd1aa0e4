"""One set of integer codes, every engine's package: a checkpoint in another format, nothing quantized again.

A format is an Exporter of FORMATS: what it can hold, every file to the byte, and how they are written. Everything that
can be refused is refused before a byte is written. The order on disk is a run's: the record first, with the names of
all that is to come, so that `--overwrite` knows what is ours; weights and what belongs to them; the record, SHA256SUMS
and, last of all, config.json. A folder that was stopped half-way is no checkpoint to anybody.

The record is the parent's, with what the figures of the files are now and a section `export` that says what they were
made from. A KL in it was measured on the parent's files: `onecard verify` measures these.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import files
from ..checkpoint.checksums import write_sums
from ..checkpoint.emit import GPTQ_CONFIG, carry_side_files, clear_checkpoint, written_files
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.formats import compressed_tensors_write as ct
from ..checkpoint.formats.bitsandbytes_read import NAME as BITSANDBYTES
from ..checkpoint.formats.shard_formats import SHARD_FORMATS
from ..checkpoint.formats.stored_weight import StoredWeight
from ..checkpoint.gguf import write as gguf_write
from ..checkpoint.model import Model, open_model, open_written, said_name, stored_facts
from ..checkpoint.packed import PackedSource, open_packed
from ..checkpoint.paths import check_paths, check_space
from ..checkpoint.plan import Plan
from ..checkpoint.source import INDEX_NAME, Folder, open_folder
from ..core.errors import InputError, input_error
from ..core.file_names import RECORD_NAME
from ..core.layout import index_json, json_bytes
from ..core.rows import Step
from ..core.tensors import TensorInfo
from ..report.reading import check_record
from ..report.record import RunRecord
from ..report.resources import package_versions, peak_rss_bytes
from .layout import (
    Conversion,
    compressed_problems,
    config_bf16,
    config_bitsandbytes,
    config_compressed,
    config_gptq,
    config_nf4,
    gptq_block,
    gptq_problems,
    lay_out_bf16,
    lay_out_compressed,
    lay_out_gptq,
    lay_out_nf4,
    nf4_problems,
    nf4_warnings,
    plain_config,
    write,
)
from .names import refuse_unknown_format

# What holds weights; beside it lie indices and configs.
WEIGHTS = (".safetensors", ".gguf")
Files = list[tuple[str, int]]


@dataclass(frozen=True)
class Exporter:
    """One format.

    can_write: every reason why a model cannot be held, empty if it can. plan: the name and exact bytes of every file
    that holds weights or says where they lie, from headers alone. write: those files, each whole or not at all, no more
    than one of them in memory. config: what config.json is to say; the caller writes it, last of all. warnings: what a
    user of the files should know; for the record.
    """

    can_write: Callable[[Model], list[str]]
    plan: Callable[[Model], Files]
    write: Callable[[Model, Path, Step], None]
    config: Callable[[Model], dict[str, Any]]
    warnings: Callable[[Model], list[str]] = lambda model: []


def _safetensors(
    problems: Callable[[Model], list[str]],
    lay_out: Callable[[Model], Conversion],
    config: Callable[[Model], dict[str, Any]],
    beside: Callable[[Model], dict[str, bytes]] = lambda model: {},
    warnings: Callable[[Model], list[str]] = lambda model: [],
) -> Exporter:
    """A format of shards and their index; `beside`: the content of other files."""

    def plan(model: Model) -> Files:
        shards = lay_out(model).shards
        index = json_bytes(index_json(shards))
        more = [(name, len(content)) for name, content in beside(model).items()]
        return [*((shard.file, shard.file_bytes) for shard in shards), (INDEX_NAME, len(index)), *more]

    def put(model: Model, out: Path, step: Step) -> None:
        conversion = lay_out(model)
        write(conversion, out, step)
        files.write_json(out / INDEX_NAME, index_json(conversion.shards))
        for name, content in beside(model).items():
            files.write_bytes(out / name, content)

    return Exporter(problems, plan, put, config, warnings)


def _gptq(version: int) -> Exporter:
    return _safetensors(
        partial(gptq_problems, version=version),
        partial(lay_out_gptq, version=version),
        partial(config_gptq, version=version),
        lambda model: {GPTQ_CONFIG: json_bytes(gptq_block(model, version))},
    )


def _gguf_plan(model: Model) -> gguf_write.GgufPlan:
    return gguf_write.plan(model.adapter, model.source, model.path, said_name(model.name))


FORMATS: dict[str, Exporter] = {
    "compressed-tensors": _safetensors(compressed_problems, lay_out_compressed, config_compressed),
    "gptq": _gptq(1),
    "gptq-v2": _gptq(2),
    "bnb-nf4": _safetensors(nf4_problems, lay_out_nf4, config_nf4, warnings=nf4_warnings),
    "bf16": _safetensors(lambda model: [], lay_out_bf16, config_bf16),
    "gguf": Exporter(
        lambda model: gguf_write.problems_of(model.adapter, model.source, model.path),
        lambda model: [(gguf_write.FILE_NAME, _gguf_plan(model).nbytes)],
        lambda model, out, step: gguf_write.write(
            _gguf_plan(model), model.adapter, model.source, out / gguf_write.FILE_NAME, step
        ),
        plain_config,
        lambda model: list(_gguf_plan(model).warnings),
    ),
}


def exporter_of(name: str) -> Exporter:
    """Raises InputError for a format that is not known."""
    refuse_unknown_format(name)
    return FORMATS[name]


def refuse_unheld(model: Model, name: str) -> None:
    """Raises InputError with every reason why a format cannot hold a model."""
    reasons = exporter_of(name).can_write(model)
    if reasons:
        raise input_error(f"the format {name} cannot hold {model.name}:", reasons, "Choose another format.")


def planned_run(model: Model, plan: Plan) -> Model:
    """What the shards of a run of quantize on `model` will be: names, shapes and schemes; there is nothing to read."""
    infos = {tensor.name: TensorInfo(tensor.shape, tensor.dtype) for _, tensor in plan.tensors()}
    shapes = model.adapter.expected()
    weights = {}
    for module, scheme in plan.schemes.items():
        name = f"{module}.weight"
        outputs, inputs = shapes[name]
        dtype = infos[f"{module}.{ct.SCALE}"].dtype
        parts = {leaf: f"{module}.{leaf}" for leaf in ct.layout(scheme, outputs, inputs, dtype)}
        weights[name] = StoredWeight(TensorInfo(shapes[name], dtype), str(scheme), parts, _unread, scheme=scheme)
    taken = {stored for weight in weights.values() for stored in weight.parts.values()}
    virtual = {name: info for name, info in infos.items() if name not in taken}
    virtual |= {name: weight.info for name, weight in weights.items()}
    folder = Folder(model.path, infos, {}, ())
    return replace(model, folder=folder, source=PackedSource(folder, ct_config.NAME, weights, virtual))


def planned_files(model: Model, plan: Plan, format_name: str) -> Files:
    """What of a run's OUT holds weights. Raises InputError with every reason why the format cannot hold them."""
    if (
        format_name not in FORMATS and format_name in SHARD_FORMATS
    ):  # a quantizer's own: the plan has asked whether it fits
        return _shard_files(plan)
    run = planned_run(model, plan)
    refuse_unheld(run, format_name)
    return _shard_files(plan) if format_name in SHARD_FORMATS else FORMATS[format_name].plan(run)


def _shard_files(plan: Plan) -> Files:
    # The run's own shards, as large as its recipe has them.
    index = json_bytes(index_json(plan.shards))
    return [*((shard.file, shard.file_bytes) for shard in plan.shards), (INDEX_NAME, len(index))]


def config_of_run(model: Model, plan: Plan, format_name: str) -> dict[str, Any]:
    """What config.json is to say of a run's OUT."""
    if format_name == BITSANDBYTES:
        return config_bitsandbytes(model, plan.schemes)
    return FORMATS[format_name].config(planned_run(model, plan))


def _unread(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    raise AssertionError("a weight that is planned and not written yet was read")


def finished_run(model: Model, plan: Plan, shards: Path) -> Model:
    """The shards of a run of quantize, all of them in the folder `shards`."""
    files.write_json(shards / INDEX_NAME, index_json(plan.shards))
    block = config_compressed(planned_run(model, plan))["quantization_config"]
    folder = open_folder(shards)
    return replace(model, folder=folder, source=open_packed(folder, block))


def weight_bytes(planned: Files) -> int:
    """Of a plan's files those that hold weights."""
    return sum(count for name, count in planned if name.endswith(WEIGHTS))


@dataclass(frozen=True)
class Exported:
    """What was written, or with `dry_run` would be. `planned`: every weight file and its bytes."""

    checkpoint: str
    format: str
    out: str
    planned: Files
    dry_run: bool
    warnings: list[str]
    seconds: float

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": self.checkpoint,
            "format": self.format,
            "out": self.out,
            "dry_run": self.dry_run,
            "files": dict(self.planned),
            "bytes": sum(count for _, count in self.planned),
            "weight_bytes": weight_bytes(self.planned),
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }


def export(
    checkpoint: str, format_name: str, out: Path, step: Step, *, overwrite: bool = False, dry_run: bool = False
) -> Exported:
    """Write `checkpoint` into the folder OUT in a format of FORMATS. Raises InputError for what cannot be, before
    anything is written, and ResourceError when the machine gives out."""
    began = time.monotonic()
    exporter = exporter_of(format_name)
    model = open_model(checkpoint)
    refuse_unheld(model, format_name)
    planned = exporter.plan(model)
    check_paths(out, None, model.path, False, overwrite)
    if not dry_run:
        check_space(out, sum(count for _, count in planned))
        names = written_files([name for name, _ in planned], model.path)
        _write(model, format_name, out, names, planned, step)
    warnings = exporter.warnings(model)
    return Exported(checkpoint, format_name, str(out), planned, dry_run, warnings, time.monotonic() - began)


def _write(model: Model, format_name: str, out: Path, names: list[str], planned: Files, step: Step) -> None:
    exporter = FORMATS[format_name]
    parent = _record_of(model)
    clear_checkpoint(out)
    files.make_folder(out)
    files.write_json(out / RECORD_NAME, {"files": names})
    try:
        exporter.write(model, out, step)
        carry_side_files(model.path, out)
    except InputError:
        clear_checkpoint(out)  # a weight that the format cannot hold after all
        raise
    wrong = {name: (out / name).stat().st_size for name, count in planned if (out / name).stat().st_size != count}
    assert not wrong, (wrong, planned)
    config = exporter.config(model)
    record = exported_record(parent, model, open_written(model, out, config), format_name)
    record.files = names
    record.warnings = [*record.warnings, *exporter.warnings(model)]
    files.write_json(out / RECORD_NAME, record.to_json())
    step.begin("checksums")
    config_bytes = json_bytes(config)
    write_sums(out, names, {"config.json": config_bytes})
    files.write_bytes(out / "config.json", config_bytes)


def exported_record(parent: RunRecord, model: Model, written: Model, format_name: str) -> RunRecord:
    """The parent's record, of the files that were written from it: `model` was read, `written` is what lies there."""
    facts = stored_facts(written)
    return replace(
        parent,
        plan={"source_bytes": model.folder.file_bytes} | parent.plan | facts,
        checkpoint={"bytes": facts["emitted_bytes"]},
        # No run of quantize ended in these bytes: none may think that it is finished here.
        identity=parent.identity | {"exported to": format_name},
        export={
            "format": format_name,
            "onecard": __version__,
            "from": {"name": said_name(model.name), "digest": model.folder.digest, "format": label(model)},
            "matrices": matrices(written),
        },
    )


def matrices(model: Model) -> dict[str, int]:
    """How many matrices lie there at which width: what `onecard check` holds a folder against."""
    return dict(sorted(Counter(weight.width for weight in model.packed.values()).items()))


def _record_of(model: Model) -> RunRecord:
    """The record beside a checkpoint's weights; a new one where there is none."""
    try:
        found = json.loads((model.path / RECORD_NAME).read_text(encoding="utf-8"))
        check_record(found, RECORD_NAME)
        return RunRecord(**found)
    except (OSError, ValueError, TypeError, InputError):
        return RunRecord("export", __version__, model.facts(), {}, versions=package_versions())


def label(model: Model) -> str:
    """The format that a checkpoint has, in words."""
    return model.source.label if isinstance(model.source, PackedSource) else "dense"
