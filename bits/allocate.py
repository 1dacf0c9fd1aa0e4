"""Which unit gets which width: the least predicted KL that a budget of bytes can buy, exactly.

A multiple-choice knapsack: of every unit one width, all bytes within the budget. What is minimised is F = a + sqrt(b)
with a = sum a_i and b = sum b_i (prices.together), not linear. But F is concave, so that its least value over all
choices is at a corner of their convex hull in the plane of (a, b), and every corner on the side that matters is what
an integer program (HiGHS, through scipy's `milp`) finds for some u a + v b. The corners between two that are known
are found by asking along the line through both (Eisner and Severance 1976); nothing is asked where F could not be
lower, which is most of the hull. Never greedy: bytes come in lumps of a whole layer's experts.

HiGHS works in floats: it takes a row of constraints for kept within 1e-6, and a choice for best within 1e-6. So costs
are scaled to what is still to be won, bytes to whole numbers, and a choice that is a byte too large is forbidden by a
cut that forbids no other that fits.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, sqrt

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ..core.errors import FitError
from .prices import Priced, UnitPrices, together

# Of the predicted KL: a corner that promises less than this is not looked for, and a choice that costs no more than
# half of it counts as the same, so that the one of fewer bytes is taken. Prices err by far more.
TIE = 1e-9
# What is to be won, as HiGHS sees it: its gap of 1e-6 is then far below TIE.
COST_SCALE = 1e6
# Bytes of the budget's room, as HiGHS sees them at most: whole numbers of the units' common divisor where they can be.
BYTE_SCALE = 1e6


@dataclass(frozen=True)
class Choice:
    """Of every unit, in order, the width; their bytes and predicted KL."""

    widths: tuple[Priced, ...]
    bytes: int
    kl_nats: float


@dataclass(frozen=True)
class _Corner:
    """A choice in the plane of (a, b), and the direction (u, v) in which it is the least: none is beyond that line."""

    picked: tuple[int, ...]
    a: float
    b: float
    u: float
    v: float


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
    program = _Program([[width.bytes for width in widths] for widths in options], budget_bytes)
    corners: list[_Corner] = []

    def ask(u: float, v: float) -> _Corner:
        picked = program.solve([[u * a + v * b for a, b in own] for own in parts])
        taken = [own[i] for own, i in zip(parts, picked, strict=True)]
        corners.append(_Corner(picked, sum(a for a, _ in taken), sum(b for _, b in taken), u, v))
        return corners[-1]

    between = [(ask(1.0, 0.0), ask(0.0, 1.0))]
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
    """F where the lines through both corners meet: of all that lies between them the least, F being concave and no
    less at the corners themselves."""
    (u, v), (x, y) = (left.u, left.v), (right.u, right.v)
    here, there = u * left.a + v * left.b, x * right.a + y * right.b
    turn = u * y - v * x
    if turn <= 0:
        return 0.0
    return max(0.0, (here * y - v * there) / turn) + sqrt(max(0.0, (u * there - here * x) / turn))


class _Program:
    """The integer program: x_ij of 0 and 1, one j for each unit i, bytes within the budget."""

    def __init__(self, sizes: Sequence[Sequence[int]], budget_bytes: int) -> None:
        least = [min(own) for own in sizes]
        self.over = [[size - low for size in own] for own, low in zip(sizes, least, strict=True)]
        self.room = budget_bytes - sum(least)
        step = gcd(*(over for own in self.over for over in own)) or 1
        # Rounded down to whole steps: no choice lies between.
        self.whole = self.room // step * step
        self.scale = min(1 / step, BYTE_SCALE / max(1, self.whole))
        # Choices that HiGHS gave and that do not fit, however little is missing: with none of their units smaller.
        self.covers: list[tuple[int, ...]] = []
        self.known: list[tuple[int, ...]] = [tuple(own.index(min(own)) for own in self.over)]

    def solve(self, costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
        """Of every unit the option: least sum of costs, and about TIE of it for all bytes of the room."""
        floor = [min(own) for own in costs]
        excess = [[cost - low for cost in own] for own, low in zip(costs, floor, strict=True)]
        while True:
            # No better choice has an option that alone costs more than a known choice does.
            most = min(sum(own[i] for own, i in zip(excess, known, strict=True)) for known in self.known)
            usable = [
                [j for j in range(len(own)) if own[j] <= most and not _beaten(j, own, over)]
                for own, over in zip(excess, self.over, strict=True)
            ]
            total = most + sum(floor)
            tie = TIE / 2 * total / max(1, self.room)
            picked = self._milp(
                [[own[j] + tie * over[j] for j in js] for own, over, js in zip(excess, self.over, usable, strict=True)],
                usable,
            )
            if sum(own[i] for own, i in zip(self.over, picked, strict=True)) > self.room:
                self.covers.append(picked)
                continue
            if picked in self.known:
                return picked
            self.known.append(picked)
            # Costs were scaled to what was known: once more, if that was much more than what was found.
            if sum(own[i] for own, i in zip(excess, picked, strict=True)) > 0.01 * most:
                return picked

    def _milp(self, costs: list[list[float]], usable: list[list[int]]) -> tuple[int, ...]:
        owner = np.repeat(np.arange(len(usable)), [len(js) for js in usable])
        flat = np.array([cost for own in costs for cost in own])
        over = np.array([own[j] for own, js in zip(self.over, usable, strict=True) for j in js], dtype=float)
        constraints = [
            LinearConstraint((owner[None] == np.arange(len(usable))[:, None]).astype(float), 1, 1),
            LinearConstraint(over[None] * self.scale, -np.inf, self.whole * self.scale),
        ]
        for cover in self.covers:
            as_large = [
                float(own[j] >= own[i]) for own, i, js in zip(self.over, cover, usable, strict=True) for j in js
            ]
            constraints.append(LinearConstraint(np.array([as_large]), -np.inf, len(usable) - 1))
        with _stdout_aside():
            found = milp(
                flat * (COST_SCALE / (flat.max() or 1.0)),
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        assert found.x is not None, found.message
        taken = np.flatnonzero(found.x.round())
        assert list(owner[taken]) == list(range(len(usable)))
        starts = np.searchsorted(owner, np.arange(len(usable)))
        return tuple(js[int(t - start)] for js, t, start in zip(usable, taken, starts, strict=True))


def _beaten(j: int, costs: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether another option of the unit costs no more and is no larger; of equal ones the first stays."""
    mine = costs[j], sizes[j]
    return any(
        costs[k] <= mine[0] and sizes[k] <= mine[1] and ((costs[k], sizes[k]) != mine or k < j)
        for k in range(len(costs))
    )


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """HiGHS, as scipy 1.17 has it, prints a line to C's stdout where it solves an answer again with its integers fixed
    (HighsMipSolverData.cpp, transformNewIntegerFeasibleSolution), whatever `disp` says; ours is one JSON line."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    try:
        kept = os.dup(1)
    except OSError:  # closed, as a daemon's is
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
