"""Coverage: how many tokens of each row go to each expert of each layer, from one pass of the unquantized model.

The pass takes no statistics and quantizes nothing. It costs one reading of the checkpoint and one forward pass. Hidden
rows lie in the store, so memory holds one block and one batch.

Shape legend: R rows, L layers with experts, E experts.
"""

from dataclasses import dataclass

import torch

from ..core.rows import Row
from ..core.schedule import Expected, Schedule
from ..models.adapter import Adapter
from ..models.walk import HiddenRows

STREAM = "coverage"


@dataclass(frozen=True)
class Routes:
    """`counts_RLE` int32 tokens; `blocks` has the numbers of the L blocks with experts."""

    blocks: list[int]
    counts_RLE: torch.Tensor

    def of(self, rows: list[int]) -> torch.Tensor:
        """Counts [L, E] summed over these rows."""
        return self.counts_RLE[rows].sum(0)


def blocks_with_experts(adapter: Adapter) -> list[int]:
    return [block for block in range(adapter.n_blocks) if adapter.is_moe(block)]


def counting_schedule(adapter: Adapter, rows: list[Row]) -> Schedule:
    """What `count_routes` will do, in blocks: its ETA begins when some rows have gone through the first."""
    tokens = sum(len(row.tokens) for row in rows)
    last = max(blocks_with_experts(adapter), default=-1)
    return Schedule(
        tuple(
            Expected(f"count block {index + 1}", "count", 1.0, ("coverage: count",), index, tokens)
            for index in range(last + 1)
        ),
        in_seconds=False,
    )


def count_routes(hidden: HiddenRows) -> Routes:
    """Walk the rows through the model up to its last block with experts. Leaves the store empty."""
    walk, adapter = hidden.walk, hidden.walk.adapter
    blocks = blocks_with_experts(adapter)
    counts_RLE = torch.zeros(len(hidden.rows), len(blocks), adapter.n_experts, dtype=torch.int32)
    walk.step.begin("coverage: embed")
    hidden.embed(STREAM)
    last = max(blocks, default=-1)
    for index in range(last + 1):
        walk.step.begin("coverage: count", index)
        block = walk.load(index)
        walk.expect(index + 1)
        for k, numbers in enumerate(hidden.groups):
            rows = hidden.get(index, STREAM, k)
            passed = block.routed(rows)
            if passed.routes_TK is not None:
                chosen = passed.routes_TK.view(len(numbers), -1)
                by_row = torch.zeros(len(numbers), adapter.n_experts, dtype=torch.int32, device=walk.device)
                by_row.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.int32))
                counts_RLE[numbers, blocks.index(index)] = by_row.cpu()
            if index < last:
                hidden.store.put(index + 1, STREAM, k, passed.hidden)
            walk.step.advance(len(numbers) * rows.shape[1])
        del block
        hidden.store.drop(index)
    return Routes(blocks, counts_RLE)
