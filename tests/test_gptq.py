"""GPTQ against a slow twin: one matrix and one column at a time, in fp64.

The twin eliminates each column from the inverse second moment, as the paper's section on OBQ does. It uses no Cholesky
factor, no blocks of columns and no batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import SCHEMES, correlated, dequantized, limits, output_error, schemes
from onecard.core.method import Method
from onecard.core.scheme import Scheme
from onecard.quantize.gptq import gptq, prepare
from onecard.quantize.grid import (
    absmax_scales,
    round_to_nearest,
)
from onecard.quantize.site import quantize_batch


def slow_gptq(
    w_OI: torch.Tensor,
    moment_II: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    scheme: Scheme,
    damping: float,
    activation_order: bool,
) -> torch.Tensor:
    """Codes [O, I] by the paper's equations, in fp64: round a column, correct the rest, eliminate it from H^-1."""
    inputs = w_OI.shape[1]
    diagonal = [float(moment_II[i, i]) for i in range(inputs)]
    damped = moment_II.clone()
    for i in range(inputs):
        damped[i, i] += damping * sum(diagonal) / inputs
    inverse = torch.linalg.inv(damped)
    order = sorted(range(inputs), key=lambda i: -diagonal[i]) if activation_order else list(range(inputs))
    least, most = limits(scheme)
    w = w_OI.clone()
    codes = torch.empty(w.shape, dtype=torch.int8)
    for n, i in enumerate(order):
        group = (
            i // scheme.group_size
        )  # static groups: by the column's own number, in whatever order columns are rounded
        scale = scale_OG[:, group].double()
        zero = torch.zeros_like(scale) if zero_OG is None else zero_OG[:, group].double()
        code = torch.clamp(torch.round(w[:, i] / scale) + zero, least, most)
        codes[:, i] = code.to(torch.int8)
        error = (w[:, i] - (code - zero) * scale) / inverse[i, i]
        for j in order[n + 1 :]:
            w[:, j] -= error * inverse[i, j]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("activation_order", [True, False], ids=["by activation", "in order"])
@schemes
def test_gptq_equals_the_paper_column_by_column(scheme: Scheme, activation_order: bool) -> None:
    """Five groups, more columns than one lazy block of 128, three matrices at once. The codes must be equal, without a
    tolerance for ties."""
    w, moment = correlated(3, 500, 160, seed=scheme.bits)
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    prepared = prepare(moment, 0.01, activation_order)
    got, factored = gptq(w, prepared, scale, zero, scheme).weight(), prepared.factor
    assert (factored.damping_raised, factored.diagonal_fallbacks) == (0, 0)
    for b in range(3):
        z = None if zero is None else zero[b]
        slow = slow_gptq(w[b], moment[b], scale[b], z, scheme, 0.01, activation_order)
        assert torch.equal(got.codes[b], slow)
    rtn = round_to_nearest(w, scale, zero, scheme)
    assert not torch.equal(got.codes, rtn.codes), "the error feedback must show, or the test proves nothing"


@schemes
def test_a_batch_of_experts_equals_each_expert_alone(scheme: Scheme) -> None:
    w, moment = correlated(5, 300, 96, seed=3)
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    together = gptq(w, prepare(moment, 0.01), scale, zero, scheme).weight()
    for b in range(5):
        one = slice(b, b + 1)
        alone = gptq(
            w[one], prepare(moment[one], 0.01), scale[one], None if zero is None else zero[one], scheme
        ).weight()
        assert torch.equal(alone.codes, together.codes[one])


def test_gptq_changes_neither_weights_nor_moments_nor_scales() -> None:
    w, moment = correlated(2, 300, 64, seed=4)
    scale, _ = absmax_scales(w, SCHEMES[0], torch.bfloat16)
    kept = [t.clone() for t in (w, moment, scale)]
    got = gptq(w, prepare(moment, 0.01), scale, None, SCHEMES[0]).weight()
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, moment, scale), strict=True))
    assert torch.equal(got.scales, scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from([32, 64, 160]))
def test_gptq_errs_less_than_rounding_under_its_own_moment(seed: int, scheme: Scheme, inputs: int) -> None:
    w, moment = correlated(2, 400, inputs, seed)
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    got = gptq(w, prepare(moment, 0.01), scale, zero, scheme).weight()
    rtn = round_to_nearest(w, scale, zero, scheme)
    for b in range(2):
        by_gptq = output_error(w[b], dequantized(got)[b], moment[b])
        assert by_gptq < output_error(w[b], dequantized(rtn)[b], moment[b])


@schemes
@pytest.mark.parametrize("name", ["rtn", "fast"])
def test_codes_and_zero_points_are_within_range(scheme: Scheme, name: str) -> None:
    w, moment = correlated(2, 300, 64, seed=5)
    w[:, 0] *= 40  # an outlier row
    w[:, 1, 3] = 7.0  # an outlier weight
    w[:, 2] = w[:, 2].abs()  # one sign only
    result = quantize_batch(w.float(), moment.float(), scheme, Method(method=name, refine_rounds=0), torch.bfloat16)
    least, most = limits(scheme)
    assert result.weight.codes.min() >= least
    assert result.weight.codes.max() <= most
    if result.weight.zero_points is not None:
        assert result.weight.zero_points.min() >= least
        assert result.weight.zero_points.max() <= most
    assert torch.isfinite(result.weight.scales).all()
    assert (result.weight.scales != 0).all()
