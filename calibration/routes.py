"""Coverage: how many tokens of each row go to each expert of each layer, from one pass of the model as it is.

No statistics, no quantization: every block is read once and all rows go through it, so the pass costs a reading of the
checkpoint and one forward pass. Hidden rows live in the store, so memory holds one block and one batch.

Shape legend: R rows, L layers with experts, E experts.
"""

from dataclasses import dataclass

import torch

from ..core.rows import Row, RowStore, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, Role
from ..models.walk import Calls, embed, expert_stacks, load_block, run_block


@dataclass(frozen=True)
class Routes:
    """`counts_RLE` int32; `blocks` are the numbers of the L blocks that have experts."""

    blocks: list[int]
    counts_RLE: torch.Tensor

    def of(self, rows: list[int]) -> torch.Tensor:
        """Counts [L, E] of these rows together."""
        return self.counts_RLE[rows].sum(0)


def blocks_with_experts(adapter: Adapter) -> list[int]:
    return [b for b in range(adapter.n_blocks) if any(site.role is Role.EXPERT for site in adapter.sites(b))]


def count_routes(
    adapter: Adapter,
    source: TensorSource,
    rows: list[Row],
    batch_tokens: int,
    store: RowStore,
    device: torch.device,
    dtype: torch.dtype,
    step: Step,
) -> Routes:
    """Walk `rows` through the model up to its last block with experts. Leaves the store empty."""
    blocks = blocks_with_experts(adapter)
    counts_RLE = torch.zeros(len(rows), len(blocks), adapter.n_experts, dtype=torch.int32)
    groups = batches(rows, batch_tokens)
    step.begin("coverage: embed")
    embed(adapter, source, rows, groups, store, ("coverage",), device, dtype)
    calls = Calls(adapter, device, dtype)
    last = max(blocks, default=-1)
    for index in range(last + 1):
        step.begin("coverage: count", index)
        block = load_block(adapter, source, index, device, dtype)
        stacks = expert_stacks(block)
        for k, numbers in enumerate(groups):
            hidden = store.get(index, "coverage", k).to(device)
            length = hidden.shape[1]
            out = run_block(block, hidden, calls.of(length)[index])
            if stacks is not None:
                chosen = stacks.routes_TK.view(len(numbers), -1)
                by_row = torch.zeros(len(numbers), adapter.n_experts, dtype=torch.int32, device=device)
                by_row.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.int32))
                counts_RLE[numbers, blocks.index(index)] = by_row.cpu()
            if index < last:
                store.put(index + 1, "coverage", k, out)
            step.advance(len(numbers) * length)
        del block
        store.drop(index)
    return Routes(blocks, counts_RLE)
