"""The formats that `onecard export` writes, each an Exporter: what it can hold, its exact files, how to write them.

An Exporter refuses everything that it can refuse from headers, before a byte is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..checkpoint.emit import GPTQ_CONFIG
from ..checkpoint.gguf import write as gguf_write
from ..checkpoint.model import Model, said_name
from ..checkpoint.plan import index_files
from ..core.errors import input_error
from ..core.layout import json_bytes
from ..core.rows import Step
from . import to_bf16, to_compressed_tensors, to_gptq, to_nf4
from .conversion import Conversion, plain_config, write
from .names import refuse_unknown_format

# Name and exact size of each file that holds weights or says where they lie.
Files = list[tuple[str, int]]


@dataclass(frozen=True)
class Exporter:
    """One format."""

    # Every reason why the format cannot hold a model; empty if it can.
    problems: Callable[[Model], list[str]]
    # The files of weights and their index, from headers alone.
    plan: Callable[[Model], Files]
    # Writes those files. Each appears complete or not at all, and at most one is in memory.
    write: Callable[[Model, Path, Step], None]
    # The content of config.json. The caller writes it, as the last file.
    config: Callable[[Model], dict[str, Any]]
    # What a user of the files should know; it goes into the record.
    warnings: Callable[[Model], list[str]] = lambda model: []


def _safetensors(
    problems: Callable[[Model], list[str]],
    lay_out: Callable[[Model], Conversion],
    config: Callable[[Model], dict[str, Any]],
    beside: Callable[[Model], dict[str, bytes]] = lambda model: {},
    warnings: Callable[[Model], list[str]] = lambda model: [],
) -> Exporter:
    """A format of safetensors shards. `beside`: name -> content of its other files."""

    def plan(model: Model) -> Files:
        shards = lay_out(model).shards
        more = index_files(shards) | beside(model)
        return [*((shard.file, shard.file_bytes) for shard in shards), *((name, len(more[name])) for name in more)]

    def put(model: Model, out: Path, step: Step) -> None:
        conversion = lay_out(model)
        write(conversion, out, step)
        for name, content in (index_files(conversion.shards) | beside(model)).items():
            files.write_bytes(out / name, content)

    return Exporter(problems, plan, put, config, warnings)


def _gptq(version: int) -> Exporter:
    return _safetensors(
        partial(to_gptq.problems, version=version),
        partial(to_gptq.lay_out, version=version),
        partial(to_gptq.config, version=version),
        lambda model: {GPTQ_CONFIG: json_bytes(to_gptq.block(model, version))},
    )


def _gguf_plan(model: Model) -> gguf_write.GgufPlan:
    return gguf_write.plan(model.adapter, model.source, model.path, said_name(model.name))


FORMATS: dict[str, Exporter] = {
    "compressed-tensors": _safetensors(
        to_compressed_tensors.problems, to_compressed_tensors.lay_out, to_compressed_tensors.config
    ),
    "gptq": _gptq(1),
    "gptq-v2": _gptq(2),
    "bnb-nf4": _safetensors(to_nf4.problems, to_nf4.lay_out, to_nf4.config, warnings=to_nf4.warnings),
    "bf16": _safetensors(lambda model: [], to_bf16.lay_out, to_bf16.config),
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
    """Raises InputError for an unknown format."""
    refuse_unknown_format(name)
    return FORMATS[name]


def refuse_unheld(model: Model, name: str) -> None:
    """Raises InputError with every reason why a format cannot hold a model."""
    reasons = exporter_of(name).problems(model)
    if reasons:
        raise input_error(f"the format {name} cannot hold {model.name}:", reasons, "Choose another format.")
