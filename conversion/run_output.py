"""What a run of `onecard quantize` puts into OUT: its own shards, or another format made from them.

The functions here work on a plan, before a weight is read, by showing the planned shards as an opened model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import files
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.formats import compressed_tensors_write as ct
from ..checkpoint.formats.bitsandbytes_read import NAME as BITSANDBYTES
from ..checkpoint.formats.shard_formats import SHARD_FORMATS
from ..checkpoint.formats.stored_weight import StoredWeight
from ..checkpoint.model import Model, quantization_block
from ..checkpoint.packed import PackedSource, open_packed
from ..checkpoint.plan import Plan, index_files
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.source import INDEX_NAME, Folder, join_headers, open_folder
from ..core.json_text import json_text
from ..core.layout import index_json
from ..core.tensors import TensorInfo
from ..models.adapter import Adapter
from ..models.families import adapter_of
from . import to_compressed_tensors, to_nf4
from .exporters import FORMATS, Files, refuse_unheld

# Suffixes of the files that hold weights. Indices and configs do not count.
WEIGHTS = (".safetensors", ".gguf")


def planned_run(model: Model, plan: Plan) -> Model:
    """The shards that a run on `model` will write, as a model: names, shapes and schemes, with nothing to read."""
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
    """The files of a run's OUT that hold weights. Raises InputError with every reason why the format cannot hold
    them."""
    # bitsandbytes writes its shards during the run: make_plan has already checked that the model fits.
    if format_name not in FORMATS and format_name in SHARD_FORMATS:
        return _shard_files(plan)
    run = planned_run(model, plan)
    refuse_unheld(run, format_name)
    return _shard_files(plan) if format_name in SHARD_FORMATS else FORMATS[format_name].plan(run)


def _shard_files(plan: Plan) -> Files:
    """The run's own shards, of the size that its recipe gives, and their index."""
    index = [(name, len(content)) for name, content in index_files(plan.shards).items()]
    return [*((shard.file, shard.file_bytes) for shard in plan.shards), *index]


def config_of_run(model: Model, plan: Plan, format_name: str) -> dict[str, Any]:
    """The content of config.json in a run's OUT."""
    if format_name == BITSANDBYTES:
        return to_nf4.config_for(model, plan.schemes)
    return FORMATS[format_name].config(planned_run(model, plan))


def _unread(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    raise AssertionError("a weight was read that is planned and not written yet")


def finished_run(model: Model, plan: Plan, shards: Path) -> Model:
    """The complete pieces of a run, in the folder `shards`, as a model that another format can be made from."""
    files.write_json(shards / INDEX_NAME, index_json(plan.pieces))
    block = to_compressed_tensors.config(planned_run(model, plan))["quantization_config"]
    folder = open_folder(shards)
    return replace(model, folder=folder, source=open_packed(folder, block))


@dataclass(frozen=True)
class WrittenParts:
    """What a run writes, as a reader of its shards sees it: part by part (Shard.part), each once it is written.

    A part is read by the config.json to come, and nothing is taken from the run's own weights.
    """

    model: Model
    plan: Plan
    format_name: str
    shards: Path  # the folder of the pieces
    out: Path  # where they may have moved

    @cached_property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json_text(config_of_run(self.model, self.plan, self.format_name)))
        return config

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_of(self.shards / "config.json", self._config)

    def pieces(self, part: int) -> list[Path]:
        """The files of a part that is written."""
        names = [piece.file for piece in self.plan.pieces if piece.part == part]
        return [
            next((f / name for f in (self.shards, self.out) if (f / name).exists()), self.shards / name)
            for name in names
        ]

    def source(self, part: int) -> Folder | PackedSource:
        """The tensors of one part. Raises InputError when a piece is damaged."""
        pieces = self.pieces(part)
        where = pieces[0].parent
        folder = Folder(where, *join_headers(where, {path.name: read_header(path) for path in pieces}, None, []))
        packed = {f"{module}." for module in self.plan.schemes}
        if not any(f"{name.rpartition('.')[0]}." in packed for name in folder.infos):
            return folder
        return open_packed(folder, quantization_block(self.shards, self._config))


def weight_bytes(planned: Files) -> int:
    """The bytes of those planned files that hold weights."""
    return sum(count for name, count in planned if name.endswith(WEIGHTS))
