"""Counts the bytes of a checkpoint's tensors on each card.

Tensor parallelism cuts a matrix, with its scales, along its outputs or its inputs. It cuts k and v by whole KV heads,
and every card holds at least one head. Every card holds a full copy of all other tensors (models/cache.py). Sizes are
the stored ones without file headers: engines rearrange bits when they load, but do not pad.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..models.adapter import Adapter, Role
from ..models.cache import Split


@dataclass(frozen=True)
class DeviceWeights:
    """Bytes of all tensors, by the way they are placed on several cards."""

    cut_bytes: int
    # Cut by whole KV heads, at most into `kv_heads` parts.
    kv_bytes: int
    kv_heads: int
    copied_bytes: int
    # On every card, or on none if the vision tower is left out.
    vision_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.cut_bytes + self.kv_bytes + self.copied_bytes + self.vision_bytes

    def on_card(self, tensor_parallel: int = 1, vision: bool = True) -> int:
        """Bytes on each of `tensor_parallel` cards. `vision` says whether the vision tower is loaded."""
        cut = -(-self.cut_bytes // tensor_parallel) - (-self.kv_bytes // min(tensor_parallel, self.kv_heads))
        return cut + self.copied_bytes + (self.vision_bytes if vision else 0)


# How a tensor is placed on several cards. The role VISION marks the tower, which a card holds whole or not at all.
Place = Split | Role


def place_of(adapter: Adapter, name: str) -> Place:
    """The place of the tensor with the canonical name `name`."""
    split = adapter.split(name)
    return Role.VISION if split is Split.COPIED and adapter.role(name) is Role.VISION else split


def device_weights(adapter: Adapter, stored: Iterable[tuple[Place, int]]) -> DeviceWeights:
    """Sums `stored`, the (place, bytes) of every tensor. A weight's parts may be one entry or several."""
    sums: dict[Place, int] = dict.fromkeys((*Split, Role.VISION), 0)
    for place, count in stored:
        sums[place] += count
    kv_heads = max(layer.kv_heads for layer in adapter.cache_layers())
    cut = sums[Split.OUTPUTS] + sums[Split.INPUTS]
    return DeviceWeights(cut, sums[Split.KV_HEADS], kv_heads, sums[Split.COPIED], sums[Role.VISION])


def cut_problems(adapter: Adapter, tensor_parallel: int, groups: Mapping[str, int]) -> list[str]:
    """Reasons why a checkpoint cannot be cut over `tensor_parallel` cards; empty if it can.

    `groups` maps each quantized module to its group size.
    """
    found = []
    heads = adapter.text_config.num_attention_heads
    if heads % tensor_parallel:
        found.append(f"{heads} attention heads cannot be shared among {tensor_parallel} cards")
    kv_heads = max(layer.kv_heads for layer in adapter.cache_layers())
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        found.append(f"{kv_heads} KV heads cannot be shared among {tensor_parallel} cards")
    said = set()
    for block in range(adapter.n_blocks):
        for site in adapter.sites(block):
            module = site.first_module
            if (site.key, site.in_features) in said or adapter.split(f"{module}.weight") is not Split.INPUTS:
                continue
            said.add((site.key, site.in_features))
            group = max(1, groups.get(module, 1))  # below 1: one scale per row, no groups
            if site.in_features % (tensor_parallel * group):
                each = f"{site.in_features / tensor_parallel:g} inputs of {module} on each of {tensor_parallel} cards"
                found.append(
                    f"{each} are no multiple of its group size {group}" if group > 1 else f"{each} are no whole number"
                )
    return found
