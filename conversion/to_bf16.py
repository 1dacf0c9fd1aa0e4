"""A checkpoint dequantized to bf16, in the tensor layout of the family's originals."""

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.model import Model
from ..checkpoint.plan import by_part
from ..core.layout import StoredTensor
from ..core.tensors import TORCH_DTYPES
from ..models.adapter import Location
from .conversion import Conversion, dense, dense_each, plain_config, shards_for


def lay_out(model: Model) -> Conversion:
    """Tensors that the family's originals fuse are fused again, with the same axes."""
    adapter = model.adapter
    shapes = adapter.disk_shapes(())
    members: dict[str, list[tuple[str, Location]]] = {name: [] for name in shapes}
    for name in adapter.expected():
        where = adapter.locate(name, shapes.keys())
        members[where.tensor].append((name, where))

    def dtype(name: str) -> str:
        found = {adapter.locate(member, model.source.names).tensor for member, _ in members[name]}
        kept = {model.source.info(tensor).dtype for tensor in found - model.packed.keys()}
        return kept.pop() if len(kept) == 1 and not found & model.packed.keys() else "BF16"

    stored = {name: StoredTensor(name, dtype(name), shape) for name, shape in shapes.items()}

    def make(name: str) -> dict[str, torch.Tensor]:
        wanted = TORCH_DTYPES[stored[name].dtype]
        if len(members[name]) == 1 and members[name][0][1] == Location(name):
            return {name: dense(model, members[name][0][0], wanted).to(wanted)}
        whole = torch.empty(shapes[name], dtype=wanted)
        places = dict(members[name])
        for member, part in dense_each(model, places, wanted):
            where = places[member]
            whole[where.index] = part.T if where.transposed else part
        return {name: whole}

    parts = [[[stored[name]] for name in names] for names in by_part(adapter, shapes)]
    return Conversion(shards_for(parts), {}, {name: name for name in shapes}, make)


def config(model: Model) -> dict[str, Any]:
    """config.json, with the new dtype of weights that were quantized. An unquantized checkpoint keeps its own."""
    plain = plain_config(model)
    if not model.packed:
        return plain

    def said(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in values.items()}

    plain = said(plain)
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = said(plain["text_config"])
    return plain
