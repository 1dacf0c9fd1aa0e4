"""The twin walk: two checkpoints side by side, block by block, on the same rows; neither is ever whole in memory.

It is independent of how the quantized files were made: it opens them as any reader would. Hidden rows of both models
live in a store on disk, so memory holds one block and one batch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..core.rows import Row, RowStore, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, read
from ..models.walk import Calls, embed, expert_stacks, final_norm, load_block, run_block
from .errors import Errors
from .kl import TokenResults, compare, concatenate

# Logits of 1024 tokens x 16384 columns are 64 MiB in fp32; about six such arrays live at once.
TOKENS_PER_SLICE, COLUMNS_PER_SLICE = 1024, 16384
# Of a row's number, which of its predictions are asked for: bool [tokens - 1], entry i for token i + 1.
Wanted = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Side:
    """One of the two models: a name for its stream, its adapter and its tensors."""

    name: str
    adapter: Adapter
    source: TensorSource


@dataclass(frozen=True)
class Twin:
    """What the walk found: every predicted token's results, in the order of the rows' batches; for each block with
    experts the share of all tokens that the two models send to other sets of experts; and, if they were asked for, the
    errors of blocks, units and experts."""

    tokens: TokenResults
    changed_routes: dict[int, float]
    errors: Errors | None

    @property
    def mean_changed_routes(self) -> float | None:
        """Over blocks; None for a model without experts."""
        return sum(self.changed_routes.values()) / len(self.changed_routes) if self.changed_routes else None


def twin_walk(
    reference: Side,
    quantized: Side,
    rows: list[Row],
    batch_tokens: int,
    store: RowStore,
    device: torch.device,
    dtype: torch.dtype,
    step: Step,
    wanted: Wanted | None = None,
    with_errors: bool = False,
) -> Twin:
    """Results for every predicted token of `rows`, or those that `wanted` names. Leaves the store empty."""
    sides = (reference, quantized)
    groups = batches(rows, batch_tokens)
    for side in sides:
        step.begin("verify: embed")
        embed(side.adapter, side.source, rows, groups, store, (side.name,), device, dtype)
    calls = Calls(reference.adapter, device, dtype)
    errors = Errors(rows, groups) if with_errors else None
    changed_routes = {}
    for index in range(reference.adapter.n_blocks):
        routes: list[torch.Tensor] = []
        blocks: list[nn.Module] = []
        changed = seen = 0
        for place, side in enumerate(sides):
            step.begin(f"verify: {side.name}", index)
            block = load_block(side.adapter, side.source, index, device, dtype)
            stacks = expert_stacks(block)
            if errors is not None:
                errors.begin_model()
            for k, numbers in enumerate(groups):
                hidden = store.get(index, side.name, k).to(device)
                with errors.watching(block, k, hidden.shape[1]) if errors is not None else nullcontext():
                    leaving = run_block(block, hidden, calls.of(hidden.shape[1])[index])
                store.put(index + 1, side.name, k, leaving)
                if stacks is not None and place == 0:
                    routes.append(stacks.routes_TK.cpu())
                elif stacks is not None:
                    changed += int((stacks.routes_TK.cpu() != routes[k]).any(-1).sum())
                    seen += len(routes[k])
                if errors is not None and place == 1:
                    errors.compare_hidden(store.get(index + 1, reference.name, k), leaving.cpu())
                step.advance(len(numbers) * hidden.shape[1])
            # Two versions of one block are in memory at once where they are compared, and one where they are not.
            if errors is not None:
                blocks.append(block)
            del block, stacks
        if errors is not None:
            step.begin("verify: errors", index)
            inputs = [
                store.get(index, reference.name, k)[places].to(device)
                for k, places in enumerate(errors.unit_places)
                if places
            ]
            errors.end_block(reference.adapter, index, blocks[0], blocks[1], routes, inputs, calls)
        store.drop(index)
        if seen:
            changed_routes[index] = changed / seen
    step.begin("verify: head")
    parts = _through_heads(sides, rows, groups, store, device, dtype, step, wanted)
    store.drop(reference.adapter.n_blocks)
    return Twin(concatenate(parts), changed_routes, errors)


def _through_heads(
    sides: tuple[Side, Side],
    rows: list[Row],
    groups: list[list[int]],
    store: RowStore,
    device: torch.device,
    dtype: torch.dtype,
    step: Step,
    wanted: Wanted | None,
) -> list[TokenResults]:
    last = sides[0].adapter.n_blocks
    norms = [final_norm(side.adapter, side.source, device, dtype) for side in sides]
    heads = [read(side.adapter, side.source, side.adapter.head_name).to(device) for side in sides]
    if heads[0].dtype == heads[1].dtype and torch.equal(*heads):
        heads[1] = heads[0]  # one copy serves both
    placeholder = sides[0].adapter.image_token_id
    parts = []
    for k, numbers in enumerate(groups):
        tokens_NT = torch.stack([rows[n].tokens for n in numbers])
        count, length = len(numbers), tokens_NT.shape[1] - 1
        targets = tokens_NT[:, 1:].reshape(-1)
        document = torch.tensor(numbers).repeat_interleave(length)
        position = torch.arange(length).repeat(count)
        # What a model "predicts" where an image placeholder follows is never read by anyone.
        asked = torch.ones_like(targets, dtype=torch.bool) if placeholder is None else targets != placeholder
        if wanted is not None:
            asked &= torch.cat([wanted(n)[:length] for n in numbers])
        hidden = []
        for side, norm in zip(sides, norms, strict=True):
            with torch.inference_mode():
                h = norm(store.get(last, side.name, k).to(device))[:, :-1]
            hidden.append(h.reshape(-1, h.shape[-1])[asked.to(device)])
        targets, document, position = targets[asked].to(device), document[asked], position[asked]
        for start in range(0, len(targets), TOKENS_PER_SLICE):
            part = slice(start, start + TOKENS_PER_SLICE)
            with torch.inference_mode():
                slices = (
                    (
                        c,
                        *(
                            h[part].float() @ w[c : c + COLUMNS_PER_SLICE].float().T
                            for h, w in zip(hidden, heads, strict=True)
                        ),
                    )
                    for c in range(0, len(heads[0]), COLUMNS_PER_SLICE)
                )
                parts.append(compare(slices, targets[part], document[part], position[part]))
        step.advance(tokens_NT.numel())
    return parts
