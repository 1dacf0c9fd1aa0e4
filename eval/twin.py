"""The twin walk: two checkpoints side by side, block by block, on the same rows; neither is ever whole in memory.

It is independent of how the quantized files were made: it opens them as any reader would. Hidden rows of both models
live in a store on disk, so memory holds one block and one batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..core.rows import Row, RowStore, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, read
from ..models.walk import Calls, embed, expert_stacks, final_norm, load_block, run_block
from .errors import Errors
from .kl import TokenResults, compare_rows, concatenate


@dataclass(frozen=True)
class Asked:
    """A row of which only some predictions are wanted, and of any tokens: the log-probability of `targets[i]` after
    position `positions[i]`; both int64 [A]."""

    row: Row
    positions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Side:
    """One of the two models: a name for its stream, its adapter and its tensors."""

    name: str
    adapter: Adapter
    source: TensorSource


@dataclass(frozen=True)
class Twin:
    """What the walk found. `tokens`: every predicted token of the rows, in the order of their batches; for each block
    with experts the share of all tokens that the two models send to other sets of experts; and, if they were asked for,
    the errors of blocks, units and experts. `answers`: what was asked, `document` numbering the asked rows."""

    tokens: TokenResults | None
    changed_routes: dict[int, float]
    errors: Errors | None
    answers: TokenResults | None

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
    asked: Sequence[Asked] = (),
    with_errors: bool = False,
) -> Twin:
    """Results for every predicted token of `rows`, and for what is `asked`. Leaves the store empty."""
    sides = (reference, quantized)
    groups = batches(rows, batch_tokens)
    measured = len(groups)  # batches of rows come first, and what is asked goes along
    groups += [[len(rows) + n for n in numbers] for numbers in batches([item.row for item in asked], batch_tokens)]
    every = [*rows, *(item.row for item in asked)]
    for side in sides:
        step.begin("verify: embed")
        embed(side.adapter, side.source, every, groups, store, (side.name,), device, dtype)
    calls = Calls(reference.adapter, device, dtype)
    errors = Errors(rows, groups[:measured]) if with_errors else None
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
                watched = errors if k < measured else None
                hidden = store.get(index, side.name, k).to(device)
                with watched.watching(block, k, hidden.shape[1]) if watched is not None else nullcontext():
                    leaving = run_block(block, hidden, calls.of(hidden.shape[1])[index])
                store.put(index + 1, side.name, k, leaving)
                step.advance(len(numbers) * hidden.shape[1])
                if k >= measured:
                    continue
                if stacks is not None and place == 0:
                    routes.append(stacks.routes_TK.cpu())
                elif stacks is not None:
                    changed += int((stacks.routes_TK.cpu() != routes[k]).any(-1).sum())
                    seen += len(routes[k])
                if watched is not None and place == 1:
                    watched.compare_hidden(store.get(index + 1, reference.name, k), leaving.cpu())
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
    wanted = [_every_prediction(reference.adapter, n, row) for n, row in enumerate(rows)]
    wanted += [_Wanted(n, item.positions, item.targets) for n, item in enumerate(asked)]
    found = list(_through_heads(sides, wanted, groups, store, device, dtype, step))
    store.drop(reference.adapter.n_blocks)
    tokens, answers = found[:measured], found[measured:]
    return Twin(
        concatenate(tokens) if tokens else None, changed_routes, errors, concatenate(answers) if answers else None
    )


@dataclass(frozen=True)
class _Wanted:
    """Of one row the predictions that are wanted, and the row's number in the results."""

    number: int
    positions: torch.Tensor
    targets: torch.Tensor


def _every_prediction(adapter: Adapter, number: int, row: Row) -> _Wanted:
    """Of every token but the first. What a model "predicts" where an image placeholder follows is never read."""
    positions, targets = torch.arange(len(row.tokens) - 1), row.tokens[1:]
    if adapter.image_token_id is not None:
        read_by_someone = targets != adapter.image_token_id
        positions, targets = positions[read_by_someone], targets[read_by_someone]
    return _Wanted(number, positions, targets)


def _through_heads(
    sides: tuple[Side, Side],
    wanted: list[_Wanted],
    groups: list[list[int]],
    store: RowStore,
    device: torch.device,
    dtype: torch.dtype,
    step: Step,
) -> Iterator[TokenResults]:
    """What is wanted of the rows of each batch."""
    last = sides[0].adapter.n_blocks
    norms = [final_norm(side.adapter, side.source, device, dtype) for side in sides]
    heads = [read(side.adapter, side.source, side.adapter.head_name).to(device) for side in sides]
    if heads[0].dtype == heads[1].dtype and torch.equal(*heads):
        heads[1] = heads[0]  # one copy serves both
    for k, numbers in enumerate(groups):
        of_rows = [wanted[n] for n in numbers]
        targets = torch.cat([want.targets for want in of_rows]).to(device)
        position = torch.cat([want.positions for want in of_rows])
        row = torch.arange(len(numbers)).repeat_interleave(torch.tensor([len(want.targets) for want in of_rows]))
        document = torch.tensor([want.number for want in of_rows])[row]
        hidden = []
        for side, norm in zip(sides, norms, strict=True):
            with torch.inference_mode():
                h_NTH = norm(store.get(last, side.name, k).to(device))
                hidden.append(h_NTH[row.to(device), position.to(device)])
        results = compare_rows((hidden[0], hidden[1]), (heads[0], heads[1]), targets, document, position)
        step.advance(h_NTH.shape[0] * h_NTH.shape[1])
        yield results
