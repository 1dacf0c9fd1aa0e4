"""Choose a width for every unit: the least predicted KL within a budget of bytes, solved exactly.

This is a multiple-choice knapsack: one width for each unit, total bytes within the budget. It minimises
F = a + sqrt(b) with a = sum a_i and b = sum b_i (prices.together). F is not linear, but it is concave. Its minimum over
all choices is therefore a corner of their convex hull in the plane of (a, b), and a knapsack with the linear cost
u a + v b finds such a corner. The line through two known corners gives the direction in which to look for corners
between them (Eisner and Severance 1976). Stretches of the hull where F cannot be lower are skipped, which is most of
it. A greedy choice would not be exact: bytes come in lumps as large as all experts of a layer.

A dynamic program over the Pareto front of (bytes, cost) solves each linear knapsack, unit by unit. A Lagrange
multiplier prices the bytes. A partial choice is dropped once its bound shows that it cannot become the best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np

from ..core.errors import FitError
from .prices import Priced, UnitPrices, together

# Relative to the predicted KL. A corner that promises a smaller gain is not looked for. Choices within half of it count
# as equal, and the one with fewer bytes wins. The error of prices is far larger.
TIE = 1e-9
# Rounding error of a sum of costs in float64, relative to the sum. Only a larger excess counts as exceeding a bound.
ROUNDING = 1e-12
# Halvings of the interval that holds the Lagrange multiplier. There are many, since prices span orders of magnitude.
HALVINGS = 100
# First limit on a choice's cost above the bound, as a share of a known choice's cost above it. The limit grows by the
# factor WIDER until the best choice lies within it. Small limits keep the front short.
FIRST_LIMIT, WIDER = 1 / 64, 4


@dataclass(frozen=True)
class Choice:
    """The width of every unit, in the units' order, with the total bytes and the predicted KL."""

    widths: tuple[Priced, ...]
    bytes: int
    kl_nats: float


@dataclass(frozen=True)
class _Corner:
    """A choice in the plane of (a, b). No choice has a smaller u a + v b."""

    picked: tuple[int, ...]
    a: float
    b: float
    u: float
    v: float


def chosen(units: Sequence[UnitPrices], widths: Sequence[Priced], gain: float = 1.0) -> Choice:
    """Total bytes and predicted KL of the given widths, one for each unit."""
    parts = [unit.parts(width, gain) for unit, width in zip(units, widths, strict=True)]
    return Choice(tuple(widths), sum(width.bytes for width in widths), together(parts))


def allocate(units: Sequence[UnitPrices], budget_bytes: int, gain: float = 1.0) -> Choice:
    """The choice of least predicted KL within `budget_bytes`. Among equal predictions, the one with the fewest bytes.

    Raises FitError if no choice is within the budget; it states the fewest bytes that a choice takes.
    """
    options = [unit.widths for unit in units]
    least = sum(min(width.bytes for width in widths) for widths in options)
    if least > budget_bytes:
        raise FitError(
            f"the smallest widths of all units take {least:,} bytes ({least / 1e9:.2f} GB), and the budget for them is "
            f"{budget_bytes:,} ({budget_bytes / 1e9:.2f} GB)"
        )
    parts = [[unit.parts(width, gain) for width in widths] for unit, widths in zip(units, options, strict=True)]
    sizes = [[width.bytes for width in widths] for widths in options]
    corners: list[_Corner] = []

    def knapsack(u: float, v: float) -> Knapsack:
        return Knapsack([[u * a + v * b for a, b in own] for own in parts], sizes, budget_bytes)

    def ask(u: float, v: float) -> _Corner:
        picked = knapsack(u, v).best()
        taken = [own[i] for own, i in zip(parts, picked, strict=True)]
        corners.append(_Corner(picked, sum(a for a, _ in taken), sum(b for _, b in taken), u, v))
        return corners[-1]

    # F is concave, so its best choice also minimises the linear cost along F's gradient there, (1, 1 / (2 sqrt(b))).
    # Any known F bounds that sqrt(b) from above, and the relaxation bounds b from below: start with these two
    # directions.
    known = together(own[i] for own, i in zip(parts, knapsack(1.0, 0.0).relaxed.picked, strict=True))
    least_b = knapsack(0.0, 1.0).relaxed.bound
    first = (1.0, 0.5 / known) if known > 0 else (1.0, 0.0)
    last = (1.0, 0.5 / sqrt(least_b)) if least_b > 0 else (0.0, 1.0)
    between = [(ask(*first), ask(*last))]
    while between:
        left, right = between.pop()
        best = min(corner.a + sqrt(corner.b) for corner in corners)
        u, v = left.b - right.b, right.a - left.a
        if u <= 0 or v <= 0 or _bound(left, right) >= best * (1 - TIE):
            continue
        found = ask(u, v)
        if u * found.a + v * found.b < (u * left.a + v * left.b) * (1 - TIE):
            between += [(left, found), (found, right)]
    choices = [
        chosen(units, [own[i] for own, i in zip(options, corner.picked, strict=True)], gain) for corner in corners
    ]
    good = min(choice.kl_nats for choice in choices) * (1 + TIE / 2)
    return min((choice for choice in choices if choice.kl_nats <= good), key=lambda choice: choice.bytes)


def _bound(left: _Corner, right: _Corner) -> float:
    """F where the two corners' lines meet. No choice between the corners has a lower F, unless a corner itself does:
    F is concave."""
    (u, v), (x, y) = (left.u, left.v), (right.u, right.v)
    here, there = u * left.a + v * left.b, x * right.a + y * right.b
    turn = u * y - v * x
    if turn <= 0:
        return 0.0
    return max(0.0, (here * y - v * there) / turn) + sqrt(max(0.0, (u * there - here * x) / turn))


@dataclass(frozen=True)
class _Relaxed:
    """A knapsack whose bytes have a price instead of a limit. `picked` fits.

    An option's penalty is its priced cost minus the least priced cost of its unit. Every choice that fits costs at
    least `bound` plus the sum of its penalties.
    """

    bound: float
    picked: tuple[int, ...]
    penalties: list[np.ndarray]
    rounding: float


@dataclass(frozen=True)
class Knapsack:
    """Pick one option for each unit: the least total cost with a total size within `room`. At least one choice fits."""

    costs: Sequence[Sequence[float]]
    sizes: Sequence[Sequence[int]]
    room: int

    @cached_property
    def _units(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each unit, the costs (float64) and sizes (int64) of its options."""
        return [
            (np.array(cost, dtype=float), np.array(size, dtype=np.int64))
            for cost, size in zip(self.costs, self.sizes, strict=True)
        ]

    def _cheapest(self, price: float) -> tuple[int, ...]:
        """For each unit, the option of least cost + price * size. Among equal ones, the smallest."""
        return tuple(int(np.lexsort((size, cost + price * size))[0]) for cost, size in self._units)

    def _fits(self, picked: Sequence[int]) -> bool:
        return sum(own[i] for own, i in zip(self.sizes, picked, strict=True)) <= self.room

    def _cost(self, picked: Sequence[int]) -> float:
        return sum(own[i] for own, i in zip(self.costs, picked, strict=True))

    @cached_property
    def relaxed(self) -> _Relaxed:
        """The relaxation at about the smallest price of bytes for which the cheapest options fit."""
        low, high = 0.0, sum(map(max, self.costs))
        picked = tuple(
            int(np.lexsort((cost, size))[0]) for cost, size in self._units
        )  # the smallest options always fit
        cheapest = self._cheapest(0.0)
        if self._fits(cheapest):
            high, picked = 0.0, cheapest
        for _ in range(HALVINGS if high else 0):
            price = (low + high) / 2
            cheapest = self._cheapest(price)
            if self._fits(cheapest):
                high, picked = price, cheapest
            else:
                low = price
        priced = [cost + high * size for cost, size in self._units]
        floors = [float(own.min()) for own in priced]
        return _Relaxed(
            bound=sum(floors) - high * self.room,
            picked=picked,
            penalties=[own - floor for own, floor in zip(priced, floors, strict=True)],
            rounding=ROUNDING * sum(floors),
        )

    def best(self) -> tuple[int, ...]:
        """The option of each unit: least total cost. Among totals within TIE of it, the least size."""
        relaxed = self.relaxed
        enough = self._cost(relaxed.picked) - relaxed.bound  # the best choice is no further above the bound
        limit = enough * FIRST_LIMIT
        while True:
            found = self._best_within(limit + relaxed.rounding)
            if found is not None:
                enough = min(enough, self._cost(found) - relaxed.bound)
            if limit >= enough:
                assert found is not None, "the relaxation's own choice is within the last limit"
                return found
            limit = min(limit * WIDER, enough)

    def _best_within(self, limit: float) -> tuple[int, ...] | None:
        """The best choice that fits and whose penalties sum to at most `limit`; None if there is none."""
        rest = sum(int(size.min()) for _, size in self._units)
        size, cost, penalty = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
        steps: list[tuple[np.ndarray, np.ndarray]] = []  # for each unit: the state before it, and the option
        for (own_cost, own_size), own_penalty in zip(self._units, self.relaxed.penalties, strict=True):
            rest -= int(own_size.min())
            before, option = np.divmod(np.arange(len(size) * len(own_size)), len(own_size))
            size, cost, penalty = (
                so_far[before] + own[option]
                for so_far, own in ((size, own_size), (cost, own_cost), (penalty, own_penalty))
            )
            good = np.flatnonzero((penalty <= limit) & (size <= self.room - rest))
            order = good[np.lexsort((cost[good], size[good]))]
            # Drop a state if a smaller one costs no more.
            cheapest_before = np.minimum.accumulate(np.concatenate([[np.inf], cost[order]]))[:-1]
            front = order[cost[order] < cheapest_before]
            size, cost, penalty = size[front], cost[front], penalty[front]
            steps.append((before[front], option[front]))
        if not len(size):
            return None
        at = int(np.flatnonzero(cost <= cost.min() * (1 + TIE / 2))[0])  # sizes rise along the front
        picked = []
        for before, option in reversed(steps):
            picked.append(int(option[at]))
            at = int(before[at])
        return tuple(reversed(picked))
