"""How a checkpoint's weights are stored: at which width, in how many bytes. Read from headers alone."""

from dataclasses import asdict
from math import prod
from typing import Any

from ..core.layout import StoredTensor
from .model import Model
from .plan import Width, tally


def stored_widths(model: Model) -> tuple[Width, ...]:
    """Parameters and bytes by role and width, largest first."""
    return tally(stored_weights(model).values())


def stored_weights(model: Model) -> dict[str, Width]:
    """Canonical name -> how that tensor is stored."""
    adapter, source, packed = model.adapter, model.source, model.packed

    def stored(name: str, shape: tuple[int, ...]) -> Width:
        tensor = adapter.locate(name, source.names).tensor
        weight = packed.get(tensor)
        if weight is None:
            dtype = source.info(tensor).dtype
            return Width(adapter.role(name).value, dtype, prod(shape), StoredTensor(name, dtype, shape).nbytes)
        # A fused tensor holds many weights: each gets its share of the bytes.
        parts = sum(model.folder.infos[part].nbytes for part in weight.parts.values())
        count = parts * prod(shape) // prod(weight.info.shape)
        return Width(adapter.role(name).value, weight.width, prod(shape), count)

    return {name: stored(name, shape) for name, shape in adapter.expected().items()}


def stored_facts(model: Model) -> dict[str, Any]:
    """The record's section `plan` for files that are on disk."""
    parameters = sum(prod(shape) for shape in model.adapter.expected().values())
    emitted_bytes = model.folder.file_bytes
    return {
        "emitted_bytes": emitted_bytes,
        "parameters": parameters,
        "quantized_parameters": model.quantized_parameters,
        "quantized_share": model.quantized_parameters / parameters,
        "bits_per_weight": emitted_bytes * 8 / parameters,
        "quantized_bits_per_weight": model.quantized_bytes * 8 / max(1, model.quantized_parameters),
        "shards": len(model.folder.shards),
        "widths": [asdict(width) for width in stored_widths(model)],
    }
