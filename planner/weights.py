"""How much of a checkpoint's tensors lies on each card.

Tensor parallelism cuts a matrix by its outputs or by its inputs, scales with it; k and v by whole KV heads, of which
every card has at least one; everything else lies on every card (models/cache.py). Sizes are the stored ones, without
headers: engines move bits about when they load, they do not pad.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..models.adapter import Adapter, Role
from ..models.cache import Split


@dataclass(frozen=True)
class DeviceWeights:
    """Bytes of all tensors, by what becomes of them. `kv_bytes` are cut over `kv_heads` heads, `vision_bytes` are on
    every card or, with the tower left out, on none."""

    cut_bytes: int
    kv_bytes: int
    kv_heads: int
    copied_bytes: int
    vision_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.cut_bytes + self.kv_bytes + self.copied_bytes + self.vision_bytes

    def on_card(self, tensor_parallel: int = 1, vision: bool = True) -> int:
        """Bytes on one of so many cards."""
        cut = -(-self.cut_bytes // tensor_parallel) - (-self.kv_bytes // min(tensor_parallel, self.kv_heads))
        return cut + self.copied_bytes + (self.vision_bytes if vision else 0)


# What becomes of a tensor on several cards: its cut, or the vision tower's all-or-nothing.
Place = Split | Role


def place_of(adapter: Adapter, name: str) -> Place:
    """Of a canonical tensor."""
    split = adapter.split(name)
    return Role.VISION if split is Split.COPIED and adapter.role(name) is Role.VISION else split


def device_weights(adapter: Adapter, stored: Iterable[tuple[Place, int]]) -> DeviceWeights:
    """`stored`: (place, bytes) of every tensor, a weight's parts together or one by one."""
    sums: dict[Place, int] = dict.fromkeys((*Split, Role.VISION), 0)
    for place, count in stored:
        sums[place] += count
    kv_heads = max(layer.kv_heads for layer in adapter.cache_layers())
    cut = sums[Split.OUTPUTS] + sums[Split.INPUTS]
    return DeviceWeights(cut, sums[Split.KV_HEADS], kv_heads, sums[Split.COPIED], sums[Role.VISION])


def cut_problems(adapter: Adapter, tensor_parallel: int, groups: Mapping[str, int]) -> list[str]:
    """Why a checkpoint cannot be cut over so many cards. `groups`: module -> group size where it is quantized."""
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
            group = max(1, groups.get(module, 1))  # one scale a row: no groups
            if site.in_features % (tensor_parallel * group):
                each = f"{site.in_features / tensor_parallel:g} inputs of {module} on each of {tensor_parallel} cards"
                found.append(f"{each} are no multiple of its group size {group}" if group > 1 else f"{each}")
    return found
