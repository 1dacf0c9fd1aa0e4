"""Coverage: how many tokens of each row go to each expert of each layer, from one pass of the model as it is.

No statistics, no quantization: every block is read once and all rows go through it, so the pass costs a reading of the
checkpoint and one forward pass. Hidden rows live in the store, so memory holds one block and one batch.

Shape legend: R rows, L layers with experts, E experts.
"""

from dataclasses import dataclass

import torch

from ..core.rows import Row, RowStore, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, Role, Site
from ..models.walk import Calls, Embedder, load_block, observed, run_block


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
    embedder = Embedder(adapter, source, rows, device, dtype)
    for k, numbers in enumerate(groups):
        store.put(0, "coverage", k, embedder.batch(numbers))
    del embedder
    calls = Calls(adapter, device, dtype)
    last = max(blocks, default=-1)
    for index in range(last + 1):
        step.begin("coverage: count", index)
        block = load_block(adapter, source, index, device, dtype)
        for k, numbers in enumerate(groups):
            hidden = store.get(index, "coverage", k).to(device)
            length = hidden.shape[1]

            def observe(
                site: Site,
                expert: int,
                tokens: torch.Tensor,
                _rows: torch.Tensor,
                numbers: list[int] = numbers,
                length: int = length,
                index: int = index,
            ) -> None:
                if site.role is Role.EXPERT and site.feeds:
                    by_row = torch.bincount(tokens // length, minlength=len(numbers))
                    counts_RLE[numbers, blocks.index(index), expert] += by_row.to("cpu", torch.int32)

            with observed(adapter, block, index, observe):
                out = run_block(block, hidden, calls.of(length)[index])
            if index < last:
                store.put(index + 1, "coverage", k, out)
            step.advance(len(numbers) * length)
        del block
        store.drop(index)
    return Routes(blocks, counts_RLE)
