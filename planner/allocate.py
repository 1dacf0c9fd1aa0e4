"""Which unit gets which width: the least predicted KL that a budget of bytes can buy, exactly.

A multiple-choice knapsack: of every unit one width, all bytes within the budget. What is minimised is
sum a_i + sqrt(sum b_i) (prices.together), not linear, but the root is concave: for any w >= 0 the choice that
minimises sum a_i + w sum b_i is found exactly by an integer program (HiGHS, through scipy's `milp`), and the best
choice of all is among them, namely that for w = 1 / (2 sqrt(sum b_i)) of its own sum. (Were another choice better
there, the root lies below its tangent, and it would be better in truth.) So w is swept between what the finest and the
coarsest widths give, and each answer's own w is tried until none is new. Never greedy: bytes come in lumps of a whole
layer's experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ..core.errors import FitError
from .prices import Priced, UnitPrices, together

# Values of w that are tried, in equal ratios. Between two of them the objective differs by far less than prices err.
SWEEP = 16
# Of the budget: below this, bytes of two choices with one predicted KL are a tie, and the smaller choice is taken.
TIE = 1e-9


@dataclass(frozen=True)
class Choice:
    """Of every unit, in order, the width; their bytes and predicted KL."""

    widths: tuple[Priced, ...]
    bytes: int
    kl_nats: float


def chosen(units: Sequence[UnitPrices], widths: Sequence[Priced], gain: float = 1.0) -> Choice:
    """What a given choice takes and costs."""
    parts = [unit.parts(width, gain) for unit, width in zip(units, widths, strict=True)]
    return Choice(tuple(widths), sum(width.bytes for width in widths), together(parts))


def allocate(units: Sequence[UnitPrices], budget_bytes: int, gain: float = 1.0) -> Choice:
    """The choice of least predicted KL within `budget_bytes`; of those that predict the same, the one of fewest bytes.

    Raises FitError, which says the least bytes that any choice takes.
    """
    options = [unit.widths for unit in units]
    least = sum(min(width.bytes for width in widths) for widths in options)
    if least > budget_bytes:
        raise FitError(
            f"the smallest widths of all units take {least:,} bytes ({least / 1e9:.2f} GB), and {budget_bytes:,} "
            f"({budget_bytes / 1e9:.2f} GB) are there for them"
        )
    parts = [[unit.parts(width, gain) for width in widths] for unit, widths in zip(units, options, strict=True)]
    program = _Program(options, budget_bytes)
    best: Choice | None = None
    # The root's slope where every unit is at its finest, and at its coarsest.
    sums = [sum(extreme(flip for _, flip in own) for own in parts) for extreme in (min, max)]
    low, high = sqrt(max(sums[0], 1e-3 * sums[1])), sqrt(sums[1])
    waiting = [1 / (2 * size) for size in np.geomspace(low, high, SWEEP)] if high else [0.0]
    tried: set[tuple[int, ...]] = set()
    while waiting:
        weight = waiting.pop()
        picked = program.solve([[smooth + weight * flip for smooth, flip in own] for own in parts])
        if picked in tried:
            continue
        tried.add(picked)
        choice = chosen(units, [own[i] for own, i in zip(options, picked, strict=True)], gain)
        flips = sum(own[i][1] for own, i in zip(parts, picked, strict=True))
        if flips:
            waiting.append(1 / (2 * sqrt(flips)))
        if best is None or (choice.kl_nats, choice.bytes) < (best.kl_nats, best.bytes):
            best = choice
    assert best is not None
    return best


class _Program:
    """The integer program: x_ij of 0 and 1, one j for each unit i, bytes within the budget."""

    def __init__(self, options: Sequence[Sequence[Priced]], budget_bytes: int) -> None:
        self.owner = np.repeat(np.arange(len(options)), [len(widths) for widths in options])
        # Shares of the budget: byte counts near 1e11 would meet the solver's tolerances.
        self.share = np.array([width.bytes / max(1, budget_bytes) for widths in options for width in widths])
        one_each = (self.owner[None] == np.arange(len(options))[:, None]).astype(float)
        self.constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(self.share[None], -np.inf, 1)]
        self.bytes = [[width.bytes for width in widths] for widths in options]
        self.budget = budget_bytes

    def solve(self, costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
        flat = np.array([cost for own in costs for cost in own])
        scale = np.abs(flat).max() or 1.0
        found = milp(
            flat / scale + TIE * self.share,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=self.constraints,
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, found.message
        taken = found.x.round().astype(bool)
        starts = np.searchsorted(self.owner, np.arange(len(costs)))
        picked = tuple(int(i) for i in np.flatnonzero(taken) - starts)
        assert sum(own[i] for own, i in zip(self.bytes, picked, strict=True)) <= self.budget
        return picked
