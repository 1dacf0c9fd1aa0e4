"""A short row through every block on the meta device: a config.json that contradicts itself is refused when the model
is opened, not after its shards are written.

The arguments of a layer (masks, rotary tables) are computed for real. The layers, with their routers, have shapes and
no values. Experts are left out: they multiply matrices whose shapes `Adapter.expected` has already given.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..core.device import Compute
from .adapter import Adapter
from .block import Block
from .calls import Calls

TOKENS = 3


class OnMeta(Calls):
    """The arguments are computed on the CPU, and moved."""

    def of(self, index: int, tokens: int) -> dict[str, Any]:
        return {name: tree_map(_moved, value) for name, value in super().of(index, tokens).items()}


def _moved(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def run_short_row(adapter: Adapter) -> None:
    """Raises what transformers raises where a layer cannot be called, or cannot compute."""
    calls = OnMeta(adapter, Compute(torch.device("cpu"), torch.float32, batch_tokens=TOKENS))
    hidden = torch.empty(1, TOKENS, adapter.hidden_size, device="meta")
    for index in range(adapter.n_blocks):
        block = Block(adapter, index, adapter.build_block(index), calls)
        block.forward(hidden)
    if adapter.has_vision:
        adapter.run_picture()
