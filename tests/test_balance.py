"""Balancing: the lazy greedy choice equals the plain one and keeps its promises."""

from collections.abc import Hashable

import torch
from hypothesis import given
from hypothesis import strategies as st

from onecard.calibration.balance import choose, draw, worth


@st.composite
def pools(draw_: st.DrawFn) -> tuple[torch.Tensor, list[Hashable], dict[Hashable, int], float]:
    rows, layers, experts = draw_(st.integers(1, 14)), draw_(st.integers(1, 3)), draw_(st.integers(1, 4))
    count = st.integers(0, 9)
    flat = draw_(st.lists(count, min_size=rows * layers * experts, max_size=rows * layers * experts))
    counts = torch.tensor(flat, dtype=torch.int32).reshape(rows, layers, experts)
    strata: list[Hashable] = draw_(st.lists(st.sampled_from("ab"), min_size=rows, max_size=rows))
    quotas: dict[Hashable, int] = {"a": draw_(st.integers(0, 9)), "b": draw_(st.integers(0, 9))}
    return counts, strata, quotas, draw_(st.sampled_from([0.0, 0.3, 1.0]))


def plain_greedy(
    counts: torch.Tensor, strata: list[Hashable], quotas: dict[Hashable, int], share: float, enough: float
) -> list[int]:
    """The plain greedy choice: computes every gain anew for every row taken."""
    chosen = draw(strata, {s: round(n * share) for s, n in quotas.items()})
    while True:
        best, best_gain = None, 0.0
        base = counts[chosen].sum(0)
        for row, stratum in enumerate(strata):
            full = sum(strata[r] == stratum for r in chosen) >= quotas.get(stratum, 0)
            if row in chosen or full:
                continue
            gain = float(torch.log1p(counts[row].double().flatten() / (enough + base.double().flatten())).sum())
            if best is None or gain > best_gain:
                best, best_gain = row, gain
        if best is None:
            return sorted(chosen)
        chosen = [*chosen, best]


@given(pools())
def test_the_lazy_greedy_is_the_greedy(pool: tuple[torch.Tensor, list[Hashable], dict[Hashable, int], float]) -> None:
    counts, strata, quotas, share = pool
    found = choose(counts, strata, quotas, share, 5.0)
    slow = plain_greedy(counts, strata, quotas, share, 5.0)
    drawn = draw(strata, quotas)
    expected = max(worth(counts[rows].sum(0), 5.0) for rows in (slow, drawn))
    assert abs(found.worth - expected) < 1e-9
    assert found.worth >= found.worth_drawn
    assert abs(found.worth_drawn - worth(counts[drawn].sum(0), 5.0)) < 1e-9
    # Each stratum gives the rows wanted of it, or all it has; none twice. The drawn share is among them.
    assert found.rows == sorted(set(found.rows))
    for stratum, quota in quotas.items():
        assert sum(strata[r] == stratum for r in found.rows) == min(quota, sum(s == stratum for s in strata))
    if found.rows != drawn:
        assert set(draw(strata, {s: round(n * share) for s, n in quotas.items()})) <= set(found.rows)
    assert choose(counts, strata, quotas, share, 5.0) == found


def test_a_starved_expert_is_fed() -> None:
    """One row in fifty feeds expert 3, and half of the choice is free to find those rows."""
    counts = torch.zeros(200, 1, 4, dtype=torch.int32)
    counts[:, 0, :3] = 10
    counts[::50, 0] = torch.tensor([9, 9, 9, 3], dtype=torch.int32)
    plain: list[Hashable] = ["row"] * 200
    found = choose(counts, plain, {"row": 40}, 0.5, 256.0)
    assert set(range(0, 200, 50)) <= set(found.rows)
    assert int(counts[found.rows].sum(0)[0, 3]) == 12
    assert int(counts[:40].sum(0)[0, 3]) == 3
    assert set(range(20)) <= set(found.rows)
