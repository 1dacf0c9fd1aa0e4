"""Balancing: chooses the calibration rows from a larger pool, so that starved experts get rows too.

A token goes where its router sends it, in calibration as in use: no expert is fed a row that it would not see. Only
the choice of the rows is free. With n the tokens of an expert in a choice, the worth of the choice is

    f = sum over layers and experts of log(1 + n / enough),

concave in every n: the next token is worth more to an expert with few than to one with many, and little past `enough`.
f is monotone and submodular, so the greedy choice, which always takes the row with the largest gain, reaches at least
1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978), or half of it with quotas for several strata of rows (Fisher,
Nemhauser and Wolsey 1978). Gains only fall while rows are taken. So an old gain is an upper bound, and most gains need
not be computed again (Minoux 1978: the lazy greedy).

A share of each stratum is drawn at random: rows chosen for their routes alone would be unusual texts. The pool comes
shuffled, so its first rows are that draw.

Shape legend: R rows, L layers with experts, E experts.
"""

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowChoice:
    """Row numbers, rising; the worth of the choice, and that of the plain draw."""

    rows: list[int]
    worth: float
    worth_drawn: float


def worth(counts_LE: torch.Tensor, enough: float) -> float:
    """f of a choice with these counts [L, E]."""
    return float(torch.log1p(counts_LE.double() / enough).sum())


def draw(strata: Sequence[Hashable], quotas: dict[Hashable, int]) -> list[int]:
    """The plain draw: the first rows of every stratum, up to its quota."""
    left, rows = dict(quotas), []
    for row, stratum in enumerate(strata):
        if left.get(stratum, 0) > 0:
            left[stratum] -= 1
            rows.append(row)
    return rows


def choose(
    counts_RLE: torch.Tensor,
    strata: Sequence[Hashable],
    quotas: dict[Hashable, int],
    random_share: float,
    enough: float,
) -> RowChoice:
    """`quotas[s]` rows of every stratum s, or all of a smaller one. Never worth less than the plain draw."""
    drawn = draw(strata, quotas)
    taken = draw(strata, {stratum: round(count * random_share) for stratum, count in quotas.items()})
    left = {
        s: min(count, sum(x == s for x in strata)) - sum(strata[r] == s for r in taken) for s, count in quotas.items()
    }
    counts = counts_RLE.flatten(1).double() / enough
    total = 1.0 + counts[taken].sum(0)
    chosen = set(taken)

    def gain(row: int) -> float:
        return float(torch.log1p(counts[row] / total).sum())

    # A heap of (-bound, row). Of equal gains the lower row number wins, so the choice is always the same.
    heap = [(-gain(row), row) for row in range(len(strata)) if row not in chosen]
    heapq.heapify(heap)
    while heap and any(left.values()):
        _, row = heapq.heappop(heap)
        if not left.get(strata[row], 0):
            continue
        fresh = (-gain(row), row)
        if heap and fresh > heap[0]:
            heapq.heappush(heap, fresh)
            continue
        chosen.add(row)
        left[strata[row]] -= 1
        total = total + counts[row]
    rows = sorted(chosen)
    found, before = (worth(counts_RLE[r].sum(0), enough) for r in (rows, drawn))
    return RowChoice(rows, found, before) if found >= before else RowChoice(drawn, before, before)
