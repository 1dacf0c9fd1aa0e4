"""Tabu search against a slow version that knows only J, and the laws of the search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import problem, refined, rows_objective, tabu_searched
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize import tabu
from onecard.quantize.grid import absmax_scales, round_to_nearest

MOVES = 40


def start_of(w: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    return round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)


def searched_slowly(weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor, moves: int) -> torch.Tensor:
    """One stretch: tries every step of every code by J itself, row by row, and gives the best codes passed."""
    codes = weight.codes.clone()
    for b in range(len(w)):
        for o in range(w.shape[1]):

            def cost(row: torch.Tensor, b: int = b, o: int = o) -> float:
                held = weight.codes.clone()
                held[b, o] = row
                e = (
                    w[b, o]
                    - QuantizedWeight(held, weight.scales, weight.zero_points, weight.scheme).dequantize(w.dtype)[b, o]
                )
                return float(e @ moment[b] @ e)

            step = weight.scales[b, o].double().repeat_interleave(weight.scheme.group_size)
            gain = tabu.LEAST_GAIN * float((step.square() * moment[b].diagonal()).mean())
            now, moved = weight.codes[b, o].clone(), list[int]()
            best = cost(now)
            for _ in range(moves):
                found = []
                for i in range(len(now)):
                    for sign in (1, -1):
                        if not weight.scheme.code_min <= int(now[i]) + sign <= weight.scheme.code_max:
                            continue
                        now[i] += sign
                        value = cost(now)
                        now[i] -= sign
                        if i not in moved[-tabu.TENURE :] or value < best - gain:
                            found.append((value, i, sign))
                value, i, sign = min(found)
                now[i] += sign
                moved.append(i)
                if value < best - gain:
                    best, codes[b, o] = value, now
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_the_slow_twin(symmetric: bool, seed: int) -> None:
    w, moment = problem(seed, batch=2, outputs=2, inputs=16)
    start = start_of(w, Scheme(4, 8, symmetric))
    found = tabu_searched(start, w, moment, 25)
    assert torch.equal(found.codes, searched_slowly(start, w, moment, 25))
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.scales, start.scales)


@pytest.mark.parametrize("group_size", [32, 64, 160])
@pytest.mark.parametrize("symmetric", [True, False])
@given(seed=st.integers(0, 10_000), negative=st.booleans())
@settings(max_examples=5, deadline=None)
def test_no_row_is_ever_worse_and_codes_stay_in_their_range(
    symmetric: bool, group_size: int, seed: int, negative: bool
) -> None:
    """From a minimum of coordinate descent, over several stretches, the last one short, and with negative scales."""
    w, moment = problem(seed, inputs=320)
    scheme = Scheme(4, group_size, symmetric)
    scales, zeros = absmax_scales(w, scheme, torch.bfloat16)
    start = refined(round_to_nearest(w, -scales if negative else scales, zeros, scheme), w, moment, 6)
    found = tabu_searched(start, w, moment, MOVES)
    before, after = rows_objective(start, w, moment), rows_objective(found, w, moment)
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < before.sum(), "nothing was better than what refinement had come to rest at"
    assert (found.codes >= scheme.code_min).all()
    assert (found.codes <= scheme.code_max).all()


def test_experts_do_not_meet() -> None:
    w, moment = problem(7, batch=3, inputs=128)
    start = start_of(w, Scheme(4, 32, True))
    together = tabu_searched(start, w, moment, MOVES)
    for b in range(3):
        one = QuantizedWeight(start.codes[b : b + 1], start.scales[b : b + 1], None, start.scheme)
        alone = tabu_searched(one, w[b : b + 1], moment[b : b + 1], MOVES)
        assert torch.equal(alone.codes[0], together.codes[b])


def test_a_row_whose_codes_are_all_at_rest_or_at_the_end_stays_where_it_is() -> None:
    """Eight codes, six of them resting, and weights far outside the grid: every outward step is barred."""
    w = torch.full((1, 1, 8), 100.0, dtype=torch.float64)
    scheme = Scheme(4, 8, True)
    codes = torch.full((1, 1, 8), scheme.code_max, dtype=torch.int8)
    start = QuantizedWeight(codes, torch.ones(1, 1, 1, dtype=torch.bfloat16), None, scheme)
    found = tabu_searched(start, w, torch.eye(8, dtype=torch.float64)[None], MOVES)
    assert torch.equal(found.codes, codes)
