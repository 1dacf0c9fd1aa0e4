"""The twin walk: two checkpoints side by side, block by block, on the same rows; neither is ever whole in memory.

It does not depend on how the quantized files were made: it opens them as any reader would. Hidden rows of both models
lie in a store on disk, so memory holds one block and one batch, or both versions of a block where errors are wanted.

Shape legend: N rows, T tokens, K top-k, H hidden size, A predictions that are asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..core.rows import Row, RowStore, batches
from ..models.adapter import Adapter
from ..models.block import Block
from ..models.walk import HiddenRows, Walk
from .errors import ErrorSample, Shown, WalkErrors, squared_error
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
    # Of blocks, units and experts, if they were asked for.
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


# The streams of the two models in a store that may hold others.
REFERENCE, QUANTIZED = "verify-reference", "verify-quantized"


@dataclass(frozen=True)
class BlockSeen:
    """What a block has shown. `to_json` and `of_json` are for a walk that is interrupted."""

    # The share of tokens that the two models send to different sets of experts; None without experts.
    changed_routes: float | None
    # The record's entries of the block and its experts (errors.py); None where no errors are wanted.
    errors: dict[str, Any] | None
    experts: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {"changed_routes": self.changed_routes, "errors": self.errors, "experts": self.experts}

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> "BlockSeen":
        return cls(facts["changed_routes"], facts["errors"], facts["experts"])


class TwinWalk:
    """The two models on their way. `embed` comes first, then `through` every block in order (`through_all` does both),
    then `finish`.

    `asked`: rows of which only some predictions are wanted. `with_errors`: also measure where the divergence comes
    from. Both walks are over one model, on one device and with one size of batches.
    """

    def __init__(
        self,
        reference: Walk,
        quantized: Walk,
        rows: list[Row],
        store: RowStore,
        *,
        asked: Sequence[Asked] = (),
        with_errors: bool = False,
    ) -> None:
        self.step, self.adapter, self._store = reference.step, reference.adapter, store
        groups = batches(rows, reference.compute.batch_tokens)
        self._measured = len(groups)  # the batches of `rows` come first, those of `asked` follow
        more = batches([item.row for item in asked], reference.compute.batch_tokens)
        groups += [[len(rows) + n for n in numbers] for numbers in more]
        every = [*rows, *(item.row for item in asked)]
        self._sides = tuple(
            _Side(name, HiddenRows(walk=walk, rows=every, groups=groups, store=store))
            for name, walk in ((REFERENCE, reference), (QUANTIZED, quantized))
        )
        self._errors = ErrorSample(rows, groups[: self._measured]) if with_errors else None
        self._wanted = [_every_prediction(reference.adapter, n, row) for n, row in enumerate(rows)]
        self._wanted += [_Wanted(n, item.positions, item.targets) for n, item in enumerate(asked)]
        self.seen: dict[int, BlockSeen] = {}

    @property
    def quantized(self) -> Walk:
        """The walk over the other model."""
        return self._sides[1].hidden.walk

    def embed(self) -> None:
        """The rows of both models enter block 0, each from its own embedding."""
        for side in self._sides:
            self.step.begin("verify: embed")
            side.hidden.embed(side.name)

    def through_all(self) -> None:
        """The rows of both models, embedded, through all blocks, each as it lies on the disk."""
        self.embed()
        ours, theirs = (side.hidden.walk for side in self._sides)
        for index in range(self.adapter.n_blocks):
            self.through(index, (partial(_load_ahead, ours, index), partial(_load_ahead, theirs, index)))
            self._store.drop(index)

    def through(self, index: int, load: tuple[Callable[[], Block], Callable[[], Block]]) -> BlockSeen:
        """Both models through their block `index`, which `load` gives for either. The rows that entered stay in the
        store."""
        reference = self._sides[0]
        blocks: list[Block] = []
        shown: list[Shown] = []
        for side, its_block in zip(self._sides, load, strict=True):
            self.step.begin(f"verify: {side.name.removeprefix('verify-')}", index)
            block = its_block()
            shown.append(_pass(side, block, self._measured, self._errors, reference if shown else None))
            # Where both versions of a block are compared, both are in memory; else one at a time.
            if self._errors is not None:
                blocks.append(block)
            del block
        errors, experts = None, list[dict[str, Any]]()
        if self._errors is not None:
            self.step.begin("verify: errors", index)
            sampled = [(k, places) for k, places in enumerate(self._errors.unit_places) if places]
            inputs = [reference.get(index, k)[places] for k, places in sampled]
            errors, experts = self._errors.of_block((blocks[0], blocks[1]), (shown[0], shown[1]), inputs)
        pairs = list(zip(shown[0].routes, shown[1].routes, strict=True))
        tokens = sum(len(routes_TK) for routes_TK, _ in pairs)
        changed = sum(_changed(ours, theirs) for ours, theirs in pairs) / tokens if tokens else None
        self.seen[index] = BlockSeen(changed, errors, experts)
        return self.seen[index]

    def finish(self, quantized: Walk) -> Twin:
        """The predictions, and all that the blocks have shown. `quantized`: the other model, whose norm and head are
        read now."""
        self.step.begin("verify: head")
        found = list(_through_heads(self._sides, (self._sides[0].hidden.walk, quantized), self._wanted))
        tokens, answers = found[: self._measured], found[self._measured :]
        in_order = [self.seen[index] for index in sorted(self.seen)]
        blocks = [seen.errors for seen in in_order if seen.errors is not None]
        experts = [expert for seen in in_order for expert in seen.experts]
        changed = {index: seen.changed_routes for index, seen in sorted(self.seen.items())}
        return Twin(
            tokens=concatenate(tokens) if tokens else None,
            changed_routes={index: share for index, share in changed.items() if share is not None},
            errors=None if self._errors is None else WalkErrors(blocks, experts),
            answers=concatenate(answers) if answers else None,
        )


def _load_ahead(walk: Walk, index: int) -> Block:
    """Block `index` from the disk, where the next one is read from now on."""
    block = walk.load(index)
    walk.expect(index + 1)
    return block


def twin_walk(
    reference: Walk,
    quantized: Walk,
    rows: list[Row],
    store: RowStore,
    *,
    asked: Sequence[Asked] = (),
    with_errors: bool = False,
) -> Twin:
    """A whole TwinWalk over two checkpoints on disk. Leaves the store empty."""
    walk = TwinWalk(reference, quantized, rows, store, asked=asked, with_errors=with_errors)
    walk.through_all()
    twin = walk.finish(quantized)
    store.drop(reference.adapter.n_blocks)
    return twin


def _changed(ours_TK: torch.Tensor, theirs_TK: torch.Tensor) -> int:
    """How many tokens go to other experts; all of them where the two models choose different numbers of experts."""
    if ours_TK.shape != theirs_TK.shape:
        return len(ours_TK)
    return int((ours_TK != theirs_TK).any(-1).sum())


def _pass(side: _Side, block: Block, measured: int, errors: ErrorSample | None, reference: _Side | None) -> Shown:
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
            shown.squared_errors.append(squared_error(passed.hidden, reference.get(block.index + 1, k)))
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


def _through_heads(sides: tuple[_Side, ...], walks: tuple[Walk, Walk], wanted: list[_Wanted]) -> Iterator[TokenResults]:
    """The wanted predictions, batch by batch. `walks`: of the two models, for their norms and heads."""
    walk = walks[0]
    device, last = walk.device, walk.adapter.n_blocks
    norms, heads = [each.final_norm() for each in walks], [each.head() for each in walks]
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
