"""The twin walk: two checkpoints side by side, block by block, on the same rows; neither is ever whole in memory.

It does not depend on how the quantized files were made: it opens them as any reader would. Hidden rows of both models
lie in a store on disk, so memory holds one block and one batch, or both versions of a block where errors are wanted.

Shape legend: N rows, T tokens, K top-k, H hidden size, A predictions that are asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..core.rows import Row, RowStore, batches
from ..models.adapter import Adapter
from ..models.block import Block
from ..models.walk import HiddenRows, Walk
from .errors import Shown, WalkErrors, squared_error
from .kl import TokenResults, compare_rows, concatenate


@dataclass(frozen=True)
class Asked:
    """A row for which only some predictions are wanted: the log-probability of token `targets[i]` after position
    `positions[i]`; both int64 [A]."""

    row: Row
    positions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Twin:
    """What the walk found."""

    # Every predicted token of the rows, batch by batch; None without rows.
    tokens: TokenResults | None
    # By block with experts: the share of all tokens that the two models send to different sets of experts.
    changed_routes: dict[int, float]
    # WalkErrors of blocks, units and experts, if they were asked for.
    errors: WalkErrors | None
    # What was asked; `document` is the number of the asked row. None if nothing was.
    answers: TokenResults | None

    @property
    def mean_changed_routes(self) -> float | None:
        """Over blocks; None for a model without experts."""
        return sum(self.changed_routes.values()) / len(self.changed_routes) if self.changed_routes else None


@dataclass(frozen=True)
class _Side:
    """One of the two models: its stream's name, and its rows."""

    name: str
    hidden: HiddenRows

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self.hidden.get(block, self.name, batch)

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self.hidden.store.put(block, self.name, batch, hidden)


def twin_walk(
    reference: Walk,
    quantized: Walk,
    rows: list[Row],
    store: RowStore,
    *,
    asked: Sequence[Asked] = (),
    with_errors: bool = False,
) -> Twin:
    """Results for every predicted token of `rows`, and for what is `asked`. Leaves the store empty. Both walks are over
    one model, on one device and with one size of batches."""
    step = reference.step
    groups = batches(rows, reference.compute.batch_tokens)
    measured = len(groups)  # the batches of `rows` come first, those of `asked` follow
    more = batches([item.row for item in asked], reference.compute.batch_tokens)
    groups += [[len(rows) + n for n in numbers] for numbers in more]
    every = [*rows, *(item.row for item in asked)]
    sides = tuple(
        _Side(name, HiddenRows(walk=walk, rows=every, groups=groups, store=store))
        for name, walk in (("reference", reference), ("quantized", quantized))
    )
    for side in sides:
        step.begin("verify: embed")
        side.hidden.embed(side.name)
    errors = WalkErrors(rows, groups[:measured]) if with_errors else None
    changed_routes = {}
    for index in range(reference.adapter.n_blocks):
        changed = _through_block(sides, index, measured, errors)
        if changed is not None:
            changed_routes[index] = changed
        store.drop(index)
    step.begin("verify: head")
    wanted = [_every_prediction(reference.adapter, n, row) for n, row in enumerate(rows)]
    wanted += [_Wanted(n, item.positions, item.targets) for n, item in enumerate(asked)]
    found = list(_through_heads(sides, wanted))
    store.drop(reference.adapter.n_blocks)
    tokens, answers = found[:measured], found[measured:]
    return Twin(
        tokens=concatenate(tokens) if tokens else None,
        changed_routes=changed_routes,
        errors=errors,
        answers=concatenate(answers) if answers else None,
    )


def _through_block(sides: tuple[_Side, ...], index: int, measured: int, errors: WalkErrors | None) -> float | None:
    """Both models through their block `index`. Returns the share of tokens with changed routes in the first `measured`
    batches; None for a block without experts, or without such batches."""
    reference, step = sides[0], sides[0].hidden.walk.step
    blocks: list[Block] = []
    shown: list[Shown] = []
    for side in sides:
        step.begin(f"verify: {side.name}", index)
        block = side.hidden.walk.load(index)
        side.hidden.walk.expect(index + 1)
        shown.append(_pass(side, block, measured, errors, reference if shown else None))
        # Where both versions of a block are compared, both are in memory; else one at a time.
        if errors is not None:
            blocks.append(block)
        del block
    if errors is not None:
        step.begin("verify: errors", index)
        store, device = reference.hidden.store, reference.hidden.walk.device
        sampled = [(k, places) for k, places in enumerate(errors.unit_places) if places]
        inputs = [store.get(index, reference.name, k)[places].to(device) for k, places in sampled]
        errors.add_block((blocks[0], blocks[1]), (shown[0], shown[1]), inputs)
    pairs = list(zip(shown[0].routes, shown[1].routes, strict=True))
    tokens = sum(len(routes_TK) for routes_TK, _ in pairs)
    return sum(_changed(ours, theirs) for ours, theirs in pairs) / tokens if tokens else None


def _changed(ours_TK: torch.Tensor, theirs_TK: torch.Tensor) -> int:
    """How many tokens go to other experts; all of them where the two models choose different numbers of experts."""
    if ours_TK.shape != theirs_TK.shape:
        return len(ours_TK)
    return int((ours_TK != theirs_TK).any(-1).sum())


def _pass(side: _Side, block: Block, measured: int, errors: WalkErrors | None, reference: _Side | None) -> Shown:
    """All batches of one model through its block. `reference`: the other model, if its rows have gone through."""
    shown = Shown()
    for k, numbers in enumerate(side.hidden.groups):
        watched = errors if k < measured else None
        hidden = side.get(block.index, k)
        with watched.watching(block, k, hidden.shape[1], shown) if watched is not None else nullcontext():
            passed = block.routed(hidden)
        side.put(block.index + 1, k, passed.hidden)
        side.hidden.walk.step.advance(len(numbers) * hidden.shape[1])
        if k < measured and passed.routes_TK is not None:
            shown.routes.append(passed.routes_TK.cpu())
        if watched is not None and reference is not None:
            theirs = side.hidden.store.get(block.index + 1, reference.name, k)
            shown.squared_errors.append(squared_error(passed.hidden.cpu(), theirs))
    return shown


@dataclass(frozen=True)
class _Wanted:
    """The wanted predictions of one row, and the row's number in the results."""

    number: int
    positions: torch.Tensor
    targets: torch.Tensor


def _every_prediction(adapter: Adapter, number: int, row: Row) -> _Wanted:
    """All tokens but the first. Image placeholders are left out: nobody reads a prediction of them."""
    positions, targets = torch.arange(len(row.tokens) - 1), row.tokens[1:]
    if adapter.image_token_id is not None:
        read_by_someone = targets != adapter.image_token_id
        positions, targets = positions[read_by_someone], targets[read_by_someone]
    return _Wanted(number, positions, targets)


def _through_heads(sides: tuple[_Side, ...], wanted: list[_Wanted]) -> Iterator[TokenResults]:
    """The wanted predictions, batch by batch."""
    walk = sides[0].hidden.walk
    device, last = walk.device, walk.adapter.n_blocks
    norms = [side.hidden.walk.final_norm() for side in sides]
    heads = [side.hidden.walk.head() for side in sides]
    if heads[0].dtype == heads[1].dtype and torch.equal(*heads):
        heads[1] = heads[0]  # one copy serves both
    for k, numbers in enumerate(sides[0].hidden.groups):
        of_rows = [wanted[n] for n in numbers]
        targets = torch.cat([want.targets for want in of_rows]).to(device)
        position = torch.cat([want.positions for want in of_rows])
        row = torch.arange(len(numbers)).repeat_interleave(torch.tensor([len(want.targets) for want in of_rows]))
        document = torch.tensor([want.number for want in of_rows])[row]
        hidden = []
        for side, norm in zip(sides, norms, strict=True):
            with torch.inference_mode():
                h_NTH = norm(side.get(last, k))
                hidden.append(h_NTH[row.to(device), position.to(device)])
        results = compare_rows((hidden[0], hidden[1]), (heads[0], heads[1]), targets, document, position)
        walk.step.advance(h_NTH.shape[0] * h_NTH.shape[1])
        yield results
