"""Quantizers against slow, obvious twins: scalar loops for grids, and GPTQ one matrix and one column at a time in fp64.

The GPTQ twin eliminates each column from the inverse second moment as the paper's section on OBQ has it; it knows no
Cholesky factor, no blocks of columns and no batch.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.calibration.moments import SiteMoments
from onecard.core.method import Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize.gptq import factor, gptq, prepare
from onecard.quantize.grid import (
    SEARCH_HIGH,
    SEARCH_LOW,
    SEARCH_STEPS,
    TINY_SCALE,
    absmax_scales,
    round_to_nearest,
    searched_scales,
)
from onecard.quantize.site import cuts, quantize_batch, relative_output_error, working_bytes

SCHEMES = [Scheme(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]
NAMES = [f"{s.bits} bits, {'symmetric' if s.symmetric else 'asymmetric'}" for s in SCHEMES]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)


def correlated(batch: int, rows: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [B, 12, I], second moments [B, I, I]) in fp64; inputs share a few directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = normal(batch, inputs // 4, inputs) * torch.exp(normal(batch, 1, inputs))
    x = normal(batch, rows, inputs // 4) @ mix + 0.1 * normal(batch, rows, inputs)
    return 0.05 * normal(batch, 12, inputs) + 0.01, x.transpose(1, 2) @ x / rows


def output_error(w_OI: torch.Tensor, q_OI: torch.Tensor, moment_II: torch.Tensor) -> float:
    """Expected squared error of the output, row by row: sum of e H e^T."""
    return math.fsum(float(e @ moment_II @ e) for e in (w_OI - q_OI).double())


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """(code - zero) * scale in fp64, by columns and not by groups."""
    size = weight.scheme.group_size
    columns = []
    for i in range(weight.codes.shape[-1]):
        code, scale = weight.codes[..., i].double(), weight.scales[..., i // size].double()
        zero = 0.0 if weight.zero_points is None else weight.zero_points[..., i // size].double()
        columns.append((code - zero) * scale)
    return torch.stack(columns, -1)


def limits(scheme: Scheme) -> tuple[int, int]:
    return (-8, 7) if scheme.bits == 4 else (-128, 127)


def slow_gptq(
    w_OI: torch.Tensor,
    moment_II: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    scheme: Scheme,
    damping: float,
    activation_order: bool,
) -> torch.Tensor:
    """Codes [O, I] by the paper's equations, in fp64: round a column, pay with those left, eliminate it from H^-1."""
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
        group = i // scheme.group_size  # static: by the column's own number, whenever it is rounded
        scale = scale_OG[:, group].double()
        zero = torch.zeros_like(scale) if zero_OG is None else zero_OG[:, group].double()
        code = torch.clamp(torch.round(w[:, i] / scale) + zero, least, most)
        codes[:, i] = code.to(torch.int8)
        error = (w[:, i] - (code - zero) * scale) / inverse[i, i]
        for j in order[n + 1 :]:
            w[:, j] -= error * inverse[i, j]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return codes


# GPTQ


@pytest.mark.parametrize("activation_order", [True, False], ids=["by activation", "in order"])
@schemes
def test_gptq_equals_the_paper_column_by_column(scheme: Scheme, activation_order: bool) -> None:
    """Five groups, more columns than one lazy block of 128, three matrices at once. No tie is allowed for."""
    w, moment = correlated(3, 500, 160, seed=scheme.bits)
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    prepared = prepare(moment, 0.01, activation_order)
    got, factored = gptq(w, prepared, scale, zero, scheme), prepared.factor
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
    together = gptq(w, prepare(moment, 0.01), scale, zero, scheme)
    for b in range(5):
        one = slice(b, b + 1)
        alone = gptq(w[one], prepare(moment[one], 0.01), scale[one], None if zero is None else zero[one], scheme)
        assert torch.equal(alone.codes, together.codes[one])


def test_gptq_changes_neither_weights_nor_moments_nor_scales() -> None:
    w, moment = correlated(2, 300, 64, seed=4)
    scale, _ = absmax_scales(w, SCHEMES[0], torch.bfloat16)
    kept = [t.clone() for t in (w, moment, scale)]
    got = gptq(w, prepare(moment, 0.01), scale, None, SCHEMES[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, moment, scale), strict=True))
    assert torch.equal(got.scales, scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from([32, 64, 160]))
def test_gptq_errs_less_than_rounding_under_its_own_moment(seed: int, scheme: Scheme, inputs: int) -> None:
    w, moment = correlated(2, 400, inputs, seed)
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    got = gptq(w, prepare(moment, 0.01), scale, zero, scheme)
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


# Moments that are not what one hopes for


METHODS = {
    "absmax scales": Method(scale_search=False, refine_rounds=0),
    "searched scales": Method(refine_rounds=0),
    "refined": Method(refine_rounds=2),
    "refined, restarted": Method(refine_rounds=1, restarts=3),
    "refined, searched": Method(refine_rounds=1, tabu_moves=20),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def degenerate(kind: str, inputs: int) -> torch.Tensor:
    """fp32 [2, I, I]; the second matrix is a sound one, which must not suffer from its neighbour."""
    _, sound = correlated(2, 300, inputs, seed=6)
    bad = sound[0]
    if kind == "rank one":
        x = torch.linspace(0.5, 2, inputs, dtype=torch.float64)
        bad = torch.outer(x, x)
    elif kind == "zero diagonal entries":
        bad = bad.clone()
        bad[::3], bad[:, ::3] = 0, 0
    elif kind == "zero":
        bad = torch.zeros_like(bad)
    elif kind == "tiny":
        bad = bad * 1e-30
    elif kind == "huge":
        bad = bad * 1e30
    return torch.stack([bad, sound[1]]).float()


@methods
@pytest.mark.parametrize("kind", ["rank one", "zero diagonal entries", "zero", "tiny", "huge"])
@schemes
def test_a_degenerate_moment_zeroes_and_spoils_no_weight(scheme: Scheme, kind: str, method: Method) -> None:
    w, _ = correlated(2, 10, 64, seed=7)
    w, moment = w.float(), degenerate(kind, 64)
    result = quantize_batch(w, moment, scheme, method, torch.bfloat16)
    q = dequantized(result.weight)
    assert torch.isfinite(q).all()
    assert all(math.isfinite(e) for e in result.output_error)
    unseen = moment[0].diagonal() == 0
    if unseen.any():
        # Nothing is known of these inputs: their weights keep the code that is nearest under the stored scale.
        weight = result.weight
        nearest = round_to_nearest(w, weight.scales, weight.zero_points, scheme).codes[0]
        assert torch.equal(weight.codes[0, :, unseen], nearest[:, unseen])
        assert (q[0, :, unseen].norm(dim=-1) > 0.75 * w[0, :, unseen].norm(dim=-1)).all()
    assert float((w[0] - q[0]).norm()) < 0.25 * float(w[0].norm())
    alone = quantize_batch(w[1:], moment[1:], scheme, method, torch.bfloat16)
    assert torch.equal(alone.weight.codes, result.weight.codes[1:])


@schemes
@methods
def test_with_a_moment_of_zeros_gptq_is_no_worse_than_rounding(scheme: Scheme, method: Method) -> None:
    """Every input counts alike then, and rounding to the nearest code of the best grid is optimal."""
    w, _ = correlated(1, 10, 64, seed=8)
    w = w.float()
    result = quantize_batch(w, torch.zeros(1, 64, 64), scheme, method, torch.bfloat16)
    rtn = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    assert float((w - dequantized(result.weight)).norm()) <= float((w - dequantized(rtn)).norm())


def with_eigenvalue(least: float, inputs: int = 24) -> torch.Tensor:
    """A symmetric fp64 matrix of mean diagonal 1 with one eigenvalue `least` and the others equal."""
    q, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(9)).double())
    values = torch.full((inputs,), (inputs - least) / (inputs - 1), dtype=torch.float64)
    values[0] = least
    return q @ torch.diag(values) @ q.T


def test_damping_rises_where_the_factorisation_fails_and_is_counted() -> None:
    """Eigenvalue -0.05 needs 0.1 in place of 0.01 (one step), -5 needs 10 (three steps); their neighbours need none."""
    moments = torch.stack([with_eigenvalue(v) for v in (0.5, -0.05, 0.2, -5.0)])
    got = factor(moments, 0.01)
    assert (got.damping_raised, got.diagonal_fallbacks) == (1 + 3, 0)
    for b, damping in enumerate([0.01, 0.1, 0.01, 10.0]):
        upper = got.upper[b]
        assert torch.equal(upper, upper.triu())
        damped = moments[b] + damping * moments[b].diagonal().mean() * torch.eye(24, dtype=torch.float64)
        torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)


@methods
@pytest.mark.parametrize("least", [-0.001, -0.05, -5.0])
def test_weights_stay_sound_where_damping_had_to_rise(least: float, method: Method) -> None:
    """No step after the factorisation may take the moment for what it is not: a positive definite matrix."""
    w = correlated(2, 10, 64, seed=10)[0].float()
    moment = torch.stack([with_eigenvalue(least, 64), with_eigenvalue(0.5, 64)]).float()
    result = quantize_batch(w, moment, SCHEMES[0], method, torch.bfloat16)
    assert result.damping_raised == {-0.001: 0, -0.05: 1, -5.0: 3}[least]
    assert float((w[0] - dequantized(result.weight)[0]).norm()) < 0.25 * float(w[0].norm())


@pytest.mark.parametrize("bad", ["indefinite", "nan", "inf"])
def test_a_hopeless_moment_falls_back_to_its_diagonal_and_is_counted(bad: str) -> None:
    hopeless = with_eigenvalue(0.5, 64)
    if bad == "indefinite":  # the diagonal of a sum of squares stays positive, whatever became of the rest
        hopeless = torch.full((64, 64), 1e8, dtype=torch.float64) + torch.diag(torch.linspace(1, 2, 64) - 1e8)
    else:
        hopeless[3, 5] = hopeless[5, 3] = hopeless[7, 7] = float(bad)
    moments = torch.stack([with_eigenvalue(0.5, 64), hopeless])
    got = factor(moments, 0.01)
    assert got.diagonal_fallbacks == 1
    assert torch.isfinite(got.upper).all()
    assert torch.equal(got.upper[1], torch.diag(got.upper[1].diagonal()))
    torch.testing.assert_close(got.upper[0], factor(moments[:1], 0.01).upper[0])
    w, _ = correlated(2, 10, 64, seed=10)
    scale, _ = absmax_scales(w, SCHEMES[0], torch.bfloat16)
    weight = gptq(w, prepare(moments, 0.01), scale, None, SCHEMES[0])
    rtn = round_to_nearest(w, scale, None, SCHEMES[0])
    assert torch.equal(weight.codes[1], rtn.codes[1]), "a diagonal moment feeds nothing back"
    for method in METHODS.values():
        result = quantize_batch(w.float(), moments.float(), SCHEMES[0], method, torch.bfloat16)
        assert result.diagonal_fallbacks == 1
        assert float((w[1] - dequantized(result.weight)[1]).norm()) < 0.25 * float(w[1].norm()), method


@methods
@pytest.mark.parametrize("shrinkage", [0.1, 0.01])
def test_an_expert_that_saw_no_token_keeps_sound_weights(shrinkage: float, method: Method) -> None:
    moments = SiteMoments(4, 64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(11)
    mix = torch.randn(64, 64, generator=generator)
    for expert, rows in enumerate([400, 300, 0, 1]):
        moments.add(expert, torch.randn(rows, 64, generator=generator) @ mix)
    w = correlated(4, 10, 64, seed=12)[0].float()
    result = quantize_batch(w, moments.shrunk(shrinkage, slice(0, 4)), SCHEMES[0], method, torch.bfloat16)
    rtn = quantize_batch(w, None, SCHEMES[0], Method(method="rtn"), torch.bfloat16)
    assert result.diagonal_fallbacks == 0
    pooled = (moments.sum_EII.sum(0) / 701).double()
    q, plain = dequantized(result.weight), dequantized(rtn.weight)
    assert torch.isfinite(q).all()
    for expert in range(4):
        assert float((w[expert] - q[expert]).norm()) < 0.25 * float(w[expert].norm())
    assert output_error(w[2], q[2], pooled) < 0.9 * output_error(w[2], plain[2], pooled)


@methods
@pytest.mark.parametrize("own_rows", [0, 1, 3, 10, 30])
def test_a_starved_experts_error_on_its_own_tokens_is_below_roundings(own_rows: int, method: Method) -> None:
    """What is held out are tokens of the expert's own kind, which is not the layer's: half of its directions are."""
    shrinkage, inputs = Method.model_fields["shrinkage"].default, 128
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, g: torch.Generator = g) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        shared = normal(inputs // 2, inputs) * torch.exp(0.7 * normal(inputs))
        kinds = [torch.cat([shared, normal(inputs // 2, inputs)]) for _ in range(16)]
        draw = {e: normal(own_rows if e == 0 else 400, inputs) @ kinds[e] for e in range(16)}
        moments = SiteMoments(16, inputs, torch.device("cpu"))
        for expert, rows in draw.items():
            moments.add(expert, rows)
        w = 0.05 * normal(1, 32, inputs)
        only = slice(0, 1)
        result = quantize_batch(w, moments.shrunk(shrinkage, only), SCHEMES[0], method, torch.bfloat16)
        rtn = quantize_batch(w, None, SCHEMES[0], Method(method="rtn"), torch.bfloat16)
        held_out = (normal(2000, inputs) @ kinds[0]).double()
        own = held_out.T @ held_out / 2000
        error, plain = (output_error(w[0], dequantized(r.weight)[0], own) for r in (result, rtn))
        assert error < plain, (seed, error / plain)


# Cutting, and the error that is reported


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.integers(1, 10**8))
def test_cuts_cover_the_batch_in_order_within_the_budget(batch: int, outputs: int, inputs: int, budget: int) -> None:
    parts = list(cuts(batch, outputs, inputs, budget, Method(refine_rounds=0)))
    assert [b for part in parts for b in range(batch)[part]] == list(range(batch))
    one = 4 * (5 * outputs * inputs + 4 * inputs * inputs)
    for part in parts:
        assert part.stop - part.start == 1 or (part.stop - part.start) * one <= budget


@pytest.mark.parametrize("method", [Method(method="rtn"), *METHODS.values()], ids=["rtn", *METHODS])
@schemes
def test_cutting_the_batch_by_a_budget_changes_no_code(scheme: Scheme, method: Method) -> None:
    """In fp32, as a run does it."""
    w, moment = (t.float() for t in correlated(7, 300, 160, seed=13))
    whole = quantize_batch(w, moment, scheme, method, torch.bfloat16)
    for step in (1, 2, 3):
        budget = step * working_bytes(12, 160, False, method)
        slices = cuts(7, 12, 160, budget, method)
        parts = [quantize_batch(w[c], moment[c], scheme, method, torch.bfloat16) for c in slices]
        assert len(parts) == -(-7 // step)
        assert torch.equal(torch.cat([p.weight.codes for p in parts]), whole.weight.codes)
        assert torch.equal(torch.cat([p.weight.scales for p in parts]), whole.weight.scales)


def test_the_reported_error_is_the_formula() -> None:
    w, moment = correlated(3, 300, 64, seed=14)
    q = dequantized(round_to_nearest(w, *absmax_scales(w, SCHEMES[0], torch.bfloat16), SCHEMES[0]))
    zero = torch.zeros_like(w)
    for b, got in enumerate(relative_output_error(w, q, moment)):
        expected = output_error(w[b], q[b], moment[b]) / output_error(w[b], zero[b], moment[b])
        assert got == pytest.approx(expected, rel=1e-9)
    for b, got in enumerate(relative_output_error(w, q, None)):
        assert got == pytest.approx(float(((w[b] - q[b]) ** 2).sum() / (w[b] ** 2).sum()), rel=1e-9)


# Grids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_absmax_over_eight_equals_a_scalar_loop(bits: int, dtype: torch.dtype) -> None:
    scheme = Scheme(bits, 32, True)
    w = correlated(2, 10, 64, seed=15)[0].float()
    got = round_to_nearest(w, *absmax_scales(w, scheme, dtype), scheme)
    least, most = limits(scheme)
    for b in range(2):
        for o in range(12):
            for g in range(2):
                group = [np.float32(v) for v in w[b, o, 32 * g : 32 * g + 32].tolist()]
                peak = max(abs(v) for v in group) / np.float32(2 ** (bits - 1))
                stored = torch.tensor(peak, dtype=torch.float32).to(dtype)
                assert got.scales[b, o, g] == stored
                codes = [max(least, min(most, round(float(v / np.float32(stored.item()))))) for v in group]
                assert got.codes[b, o, 32 * g : 32 * g + 32].tolist() == codes


def test_codes_belong_to_the_stored_scale_not_to_the_unrounded_one() -> None:
    w = correlated(1, 10, 640, seed=16)[0].float()
    scheme = Scheme(8, 32, True)
    got = round_to_nearest(w, *absmax_scales(w, scheme, torch.bfloat16), scheme)
    assert got.scales.dtype == torch.bfloat16

    def nearest(scale: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(w / scale.repeat_interleave(32, -1)), -128, 127).to(torch.int8)

    exact = w.unflatten(-1, (-1, 32)).abs().amax(-1) / 128
    assert torch.equal(got.codes, nearest(got.scales.float()))
    assert not torch.equal(got.codes, nearest(exact)), "the two must differ, or the test proves nothing"


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_range_reaches_both_ends(bits: int) -> None:
    scheme = Scheme(bits, 32, False)
    w = correlated(1, 10, 320, seed=17)[0].float()
    w[0, 0] = w[0, 0].abs() + 0.1  # all positive: zero itself must still have a code
    scale, zero = absmax_scales(w, scheme, torch.bfloat16)
    assert zero is not None
    weight = round_to_nearest(w, scale, zero, scheme)
    least, most = limits(scheme)
    groups = w.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    torch.testing.assert_close(scale.float(), (high - low) / (most - least), rtol=2**-8, atol=0)
    assert torch.equal(zero, zero.round())
    assert ((zero >= least) & (zero <= most)).all(), "zero has a code of its own"
    # Half a step for rounding, half for the rounded zero point, and what bf16's scale lost over the whole range.
    step = scale.float().repeat_interleave(32, -1)
    assert ((w - dequantized(weight)).abs() <= step * (1 + (most - least) * 2**-9)).all()


def weighted_error(w_g: torch.Tensor, importance_g: torch.Tensor, scale: float, zero: float, scheme: Scheme) -> float:
    least, most = limits(scheme)
    codes = torch.clamp(torch.round(w_g / scale) + zero, least, most)
    return float((importance_g * (w_g - (codes - zero) * scale) ** 2).sum())


@schemes
def test_scale_search_equals_a_loop_over_its_grid_and_beats_absmax(scheme: Scheme) -> None:
    w, moment = correlated(2, 300, 64, seed=18)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    scale, zero = searched_scales(w, importance, scheme, torch.bfloat16)
    plain, plain_zero = absmax_scales(w, scheme, torch.bfloat16)
    least, most = limits(scheme)
    for b in range(2):
        for o in range(12):
            for g in range(2):
                part = slice(32 * g, 32 * g + 32)
                w_g, d_g = w[b, o, part], importance[b, part]
                candidates = []
                for multiple in torch.linspace(SEARCH_LOW, SEARCH_HIGH, SEARCH_STEPS).tolist():
                    if scheme.symmetric:
                        s, z = w_g.abs().max() / 2 ** (scheme.bits - 1) * multiple, 0.0
                        s = float(s.to(torch.bfloat16))
                    else:
                        low, high = min(0.0, float(w_g.min())) * multiple, max(0.0, float(w_g.max())) * multiple
                        s = float(torch.tensor((high - low) / (most - least)).to(torch.bfloat16))
                        z = float(max(least, min(most, round(least - low / s))))
                    candidates.append((weighted_error(w_g, d_g, s, z, scheme), s, z))
                best = min(candidates)[0]
                chosen_zero = 0.0 if zero is None else float(zero[b, o, g])
                chosen = weighted_error(w_g, d_g, float(scale[b, o, g]), chosen_zero, scheme)
                assert chosen == pytest.approx(best, rel=1e-9)
                z = 0.0 if plain_zero is None else float(plain_zero[b, o, g])
                assert chosen <= weighted_error(w_g, d_g, float(plain[b, o, g]), z, scheme) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from([0.0, 0.5, 3.0]))
def test_scale_search_is_never_worse_than_absmax(seed: int, scheme: Scheme, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 40, 96, generator=generator) ** 3
    importance = torch.exp(spread * torch.randn(1, 96, generator=generator))
    searched = searched_scales(w, importance, scheme, torch.bfloat16)
    plain = absmax_scales(w, scheme, torch.bfloat16)

    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        q = dequantized(round_to_nearest(w, scale, zero, scheme))
        return ((w - q) ** 2 * importance[:, None]).unflatten(-1, (-1, 32)).sum(-1)

    # The search compares sums in fp32.
    assert (error(*searched) <= error(*plain) * (1 + 1e-5)).all()


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_of_zeros_stays_zero_and_its_scale_does_not(scheme: Scheme, dtype: torch.dtype) -> None:
    w, moment = (t.float() for t in correlated(1, 300, 64, seed=19))
    w[0, 3, :32] = 0
    for name in ("rtn", "fast"):
        method = Method(method=name, activation_order=False, refine_rounds=0)
        weight = quantize_batch(w, moment, scheme, method, dtype).weight
        assert weight.scales[0, 3, 0] == TINY_SCALE
        assert (dequantized(weight)[0, 3, :32] == 0).all()
        assert (dequantized(weight)[0, 3, 32:] != 0).any()
