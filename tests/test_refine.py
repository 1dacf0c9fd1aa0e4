"""Refinement and reference correction against slow, obvious twins in fp64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import problem, refined, restarted, rows_objective
from onecard.calibration.moments import SiteMoments
from onecard.core.method import Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize.correction import corrected, corrected_for_inputs
from onecard.quantize.gptq import Prepared, factor, gptq
from onecard.quantize.grid import absmax_scales, round_to_nearest
from onecard.quantize.held import stretches
from onecard.quantize.restarts import prepare_restarts
from onecard.quantize.site import quantize_batch


def objective(weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """tr(E S E^T) of each matrix."""
    return rows_objective(weight, w, moment).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_no_round_ever_raises_the_objective(bits: int, symmetric: bool, seed: int) -> None:
    w, moment = problem(seed)
    scheme = Scheme(bits, 16, symmetric)
    start = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    values = [objective(refined(start, w, moment, rounds), w, moment) for rounds in range(4)]
    assert torch.equal(values[0], objective(start, w, moment))
    for before, after in pairwise(values):
        assert (after <= before * (1 + 1e-12)).all()
    assert (values[3] < values[0]).all(), "round-to-nearest is never a minimum for correlated inputs"


@pytest.mark.parametrize("group_size", [32, 64, 160])
@pytest.mark.parametrize("symmetric", [True, False])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_no_restart_ever_raises_a_rows_error(symmetric: bool, group_size: int, seed: int) -> None:
    """320 columns: several stretches, the last one short."""
    w, moment = problem(seed, inputs=320)
    scheme = Scheme(4, group_size, symmetric)
    start = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    weight = refined(start, w, moment, 6)
    columns = stretches(320, group_size)
    assert [c.start for c in columns][1:] == [c.stop for c in columns][:-1]
    assert (columns[0].start, columns[-1].stop) == (0, 320)
    values = [rows_objective(weight, w, moment)]
    for made in prepare_restarts(moment, group_size, 4):
        weight = restarted(weight, w, moment, made, 2)
        values.append(rows_objective(weight, w, moment))
    for before, after in pairwise(values):
        assert (after <= before * (1 + 1e-9)).all()
    assert values[-1].sum() < values[0].sum(), "no try was better than what refinement had come to rest at"


def test_each_row_of_a_stretch_keeps_its_best_try() -> None:
    """One stretch, so that T is W. The tries are made one by one, and each row keeps its best."""
    w, moment = problem(5, inputs=64)
    scheme = Scheme(4, 32, True)
    start = refined(round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme), w, moment, 1)
    (stretch,) = prepare_restarts(moment, 32, 5)[0]
    kept = rows_objective(restarted(start, w, moment, [stretch], 1), w, moment)
    least = rows_objective(start, w, moment)
    orders = stretch.order_KBC
    assert len({tuple(order.tolist()) for order in orders[:, 0]}) == 5
    for k in range(5):
        tried = gptq(
            w, Prepared(orders[k], factor(moment, 1e-6, orders[k]), moment), start.scales, None, scheme
        ).weight()
        least = torch.minimum(least, rows_objective(refined(tried, w, moment, 1), w, moment))
    torch.testing.assert_close(kept, least, rtol=1e-9, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rounds_end_where_no_single_code_can_be_bettered(symmetric: bool) -> None:
    w, moment = problem(3, batch=1, outputs=3, inputs=32)
    scheme = Scheme(4, 16, symmetric)
    start = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    end = refined(start, w, moment, 60)
    assert torch.equal(end.codes, refined(start, w, moment, 61).codes), "not yet at rest"
    least = float(objective(end, w, moment))
    for o in range(3):
        for i in range(32):
            for code in range(scheme.code_min, scheme.code_max + 1):
                codes = end.codes.clone()
                codes[0, o, i] = code
                other = QuantizedWeight(codes, end.scales, end.zero_points, scheme)
                assert float(objective(other, w, moment)) >= least * (1 - 1e-12)


def test_a_batch_is_refined_as_each_matrix_alone_and_scales_stay_in_their_dtype() -> None:
    w, moment = problem(5, batch=3)
    scheme = Scheme(4, 32)
    start = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    together = refined(start, w, moment, 2)
    assert together.scales.dtype == torch.bfloat16
    assert int(together.codes.min()) >= -8
    assert int(together.codes.max()) <= 7
    for b in range(3):
        part = slice(b, b + 1)
        one = QuantizedWeight(start.codes[part], start.scales[part], None, scheme)
        alone = refined(one, w[part], moment[part], 2)
        assert torch.equal(alone.codes[0], together.codes[b])
        assert torch.equal(alone.scales[0], together.scales[b])


def test_refined_gptq_is_better_than_gptq() -> None:
    w, moment = problem(7, outputs=24, inputs=128)
    plain = quantize_batch(w.float(), moment.float(), Scheme(4, 64), Method(refine_rounds=0), torch.bfloat16)
    better = quantize_batch(w.float(), moment.float(), Scheme(4, 64), Method(refine_rounds=2), torch.bfloat16)
    assert all(after < before for before, after in zip(plain.output_error, better.output_error, strict=True))


def streams(seed: int, rows: int = 200, inputs: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, inputs, generator=g, dtype=torch.float64)
    return reference, reference + 0.1 * reference.roll(1, 1) + 0.05 * torch.randn(rows, inputs, generator=g)


def test_correction_is_the_ridge_least_squares_solution() -> None:
    reference, x = streams(0)
    w = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment, shift = x.T @ x / 200, (reference - x).T @ x / 200
    ridge = 0.02
    found = corrected(w, moment[None], w @ shift, torch.tensor([ridge]))[0]
    by_inputs = corrected_for_inputs(w, moment[None], shift[None], torch.tensor([ridge]))[0]
    torch.testing.assert_close(by_inputs, found, rtol=1e-9, atol=1e-9)
    # min |W' X - W R|^2 / n + r |W' - W|^2 as one stacked least-squares problem.
    r = ridge * float(moment.diagonal().mean())
    stacked = torch.cat([x / 200**0.5, r**0.5 * torch.eye(24, dtype=torch.float64)])
    wanted = torch.cat([reference @ w[0].T / 200**0.5, r**0.5 * w[0].T])
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    before = ((x - reference) @ w[0].T).square().mean()
    after = (x @ found.T - reference @ w[0].T).square().mean()
    assert after < 0.5 * before


@given(st.integers(1, 5), st.integers(0, 2**31 - 1), st.floats(0, 1), st.floats(1e-4, 1e3))
def test_experts_that_act_together_never_make_the_miss_larger(k: int, seed: int, alike: float, ridge: float) -> None:
    """Each token meets all k. From inputs that are unrelated (alike 0) to inputs that are one (alike 1), where k whole
    steps would overshoot k times."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    own = torch.randn(k, 60, 8, generator=generator, dtype=torch.float64)
    x_kRI = alike * common + (1 - alike) * own
    miss_RO = common @ torch.randn(8, 3, generator=generator, dtype=torch.float64) + 0.1
    w_kOI = torch.randn(k, 3, 8, generator=generator, dtype=torch.float64)
    moment = x_kRI.transpose(1, 2) @ x_kRI / 60
    missed = miss_RO.T @ x_kRI / 60
    found = corrected(w_kOI, moment, missed, torch.full((k,), ridge, dtype=torch.float64), k)
    left = miss_RO - ((found - w_kOI) @ x_kRI.transpose(1, 2)).sum(0).T
    assert float(left.square().sum()) <= float(miss_RO.square().sum()) * (1 + 1e-9)


def test_equal_streams_and_hopeless_moments_leave_the_weights_alone() -> None:
    w = torch.randn(2, 5, 24)
    moment = torch.eye(24).expand(2, 24, 24).clone()
    assert torch.equal(corrected(w, moment, torch.zeros(2, 5, 24), torch.full((2,), 0.01)), w)
    moment[1] = -moment[1]  # cannot be factored
    out = corrected(w, moment, torch.ones(2, 5, 24), torch.full((2,), 0.01))
    assert not torch.equal(out[0], w[0])
    assert torch.equal(out[1], w[1])


def test_miss_counts_common_rows_over_all_rows() -> None:
    reference, x = (rows.float() for rows in streams(4))
    moments = SiteMoments(2, 24, torch.device("cpu"), miss_rows=24)
    moments.add(0, x)
    moments.add_miss(0, x[:150], reference[:150] - x[:150])  # 50 rows went to another expert in the reference
    tau = 0.1 * 24
    expected = (reference[:150] - x[:150]).T @ x[:150] / (200 + tau)  # 200 / (200 + tau) of the mean over 200
    miss = moments.miss(0.1, slice(0, 2))
    assert miss is not None
    torch.testing.assert_close(miss[0], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(miss[1], torch.zeros(24, 24)), "an expert without rows is not corrected"
    assert SiteMoments(2, 24, torch.device("cpu")).miss(0.1, slice(0, 2)) is None


def test_weights_count_as_repetitions_would() -> None:
    """A row of weight 3 counts like three such rows of weight 1, except in the number of rows."""
    x = streams(6, rows=40)[1].float()
    weight = torch.ones(40)
    weight[7] = 3
    weighted, repeated = SiteMoments(1, 24, torch.device("cpu")), SiteMoments(1, 24, torch.device("cpu"))
    weighted.add(0, x, weight)
    repeated.add(0, torch.cat([x, x[7:8], x[7:8]]))
    one = slice(0, 1)
    torch.testing.assert_close(weighted.shrunk(0.1, one), repeated.shrunk(0.1, one))
    assert weighted.rows == [40]
