"""`onecard inspect`: facts of a checkpoint, from config.json and headers alone."""

from typing import TypedDict

from ..models.adapter import Role
from .model import open_headers
from .packed import PackedSource
from .stored_widths import stored_widths


class RoleFacts(TypedDict):
    """All tensors of one role together."""

    parameters: int
    bytes: int
    # Width, as recipes spell it, or dtype -> parameters that are stored in it.
    widths: dict[str, int]


class Inspection(TypedDict):
    """What a checkpoint is. Sizes in bytes."""

    model: str
    path: str
    family: str
    blocks: int
    moe_blocks: int
    # Routed experts of one MoE block, and how many of them a token visits.
    experts: int
    experts_per_token: int
    hidden_size: int
    vocab_size: int
    # Whether there is a vision tower.
    vision: bool
    quantized: bool
    # The format of a quantized checkpoint. None: it is dense.
    format: str | None
    parameters: int
    # All safetensors files, headers included.
    file_bytes: int
    shards: int
    bits_per_weight: float
    roles: dict[str, RoleFacts]
    # What the published config.json has wrong, and onecard mends.
    config_faults: list[str]
    warnings: list[str]


def inspect(model_name: str) -> Inspection:
    """Facts of a checkpoint, original or quantized, from config.json and headers alone. Raises InputError."""
    model = open_headers(model_name)
    adapter, folder = model.adapter, model.folder
    roles: dict[str, RoleFacts] = {}
    for entry in stored_widths(model):
        role = roles.setdefault(entry.role, {"parameters": 0, "bytes": 0, "widths": {}})
        role["parameters"] += entry.parameters
        role["bytes"] += entry.bytes
        role["widths"][entry.width] = entry.parameters
    parameters = sum(role["parameters"] for role in roles.values())
    moe_blocks = [b for b in range(adapter.n_blocks) if any(s.role is Role.EXPERT for s in adapter.sites(b))]
    return {
        "model": model_name,
        "path": str(model.path),
        "family": adapter.family,
        "blocks": adapter.n_blocks,
        "moe_blocks": len(moe_blocks),
        "experts": adapter.n_experts,
        "experts_per_token": adapter.top_k,
        "hidden_size": adapter.hidden_size,
        "vocab_size": adapter.vocab_size,
        "vision": adapter.has_vision,
        "quantized": model.quantized,
        "format": model.source.label if isinstance(model.source, PackedSource) else None,
        "parameters": parameters,
        "file_bytes": folder.file_bytes,
        "shards": len(folder.shards),
        "bits_per_weight": folder.file_bytes * 8 / parameters,
        "roles": roles,
        "config_faults": adapter.faults(model.config),
        "warnings": model.warnings,
    }
