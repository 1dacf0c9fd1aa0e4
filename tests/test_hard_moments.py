"""Second moments that are degenerate, indefinite or empty: weights stay sound, and every fallback is counted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import METHODS, SCHEMES, correlated, dequantized, methods, output_error, schemes
from onecard.calibration.moments import SiteMoments
from onecard.core.method import Method
from onecard.core.scheme import Scheme
from onecard.quantize import gptq as module
from onecard.quantize.gptq import factor, gptq, prepare
from onecard.quantize.grid import (
    absmax_scales,
    round_to_nearest,
)
from onecard.quantize.site import quantize_batch


def degenerate(kind: str, inputs: int) -> torch.Tensor:
    """Moments fp32 [2, I, I]. The second one is sound and must not suffer from its neighbour."""
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
        # Nothing is known of these inputs, so their weights get the nearest code under the stored scale.
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
    """All inputs then count alike, so rounding to the nearest code of the best grid is optimal."""
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
        root = got.root[b]
        assert torch.equal(root, root.triu())
        damped = moments[b] + damping * moments[b].diagonal().mean() * torch.eye(24, dtype=torch.float64)
        torch.testing.assert_close(root @ root.T, damped, rtol=1e-12, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1),
    damping=st.floats(0.001, 1),
    together=st.booleans(),
    ordered=st.booleans(),
)
def test_both_dampings_are_in_the_factor_and_in_the_objective(
    seed: int, share: float, damping: float, together: bool, ordered: bool
) -> None:
    moments = correlated(2, 90, 30, seed)[1]
    moments[1] *= torch.logspace(-3, 3, 30)[:, None] * torch.logspace(-3, 3, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FACTORED_TOGETHER", 512 if together else 0)
        prepared = prepare(moments, damping, ordered, share)
    for b, moment in enumerate(moments):
        wanted = moment.clone()
        for i in range(30):
            wanted[i, i] += share * moment[i, i] + damping * moment.trace() / 30
        torch.testing.assert_close(prepared.objective[b], wanted, rtol=1e-12, atol=0)
        order, root = prepared.order_BI[b], prepared.factor.root[b]
        torch.testing.assert_close(root @ root.T, wanted[order][:, order], rtol=1e-9, atol=1e-9 * float(wanted.max()))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), inputs=st.sampled_from([24, 96, 160]), together=st.booleans())
def test_a_factor_in_fp32_is_as_exact_as_by_way_of_the_inverse(seed: int, inputs: int, together: bool) -> None:
    """The paper's factor is the inverse of R. Both are held against fp64, in the rule that GPTQ takes from them: the
    errors of earlier columns over R_jj."""
    moments = correlated(2, 3 * inputs, inputs, seed)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FACTORED_TOGETHER", 512 if together else 0)
        exact, ours = factor(moments, 0.01).root, factor(moments.float(), 0.01).root.double()
    damped = moments + 0.01 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(inputs)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.float()))
    papers = torch.linalg.inv(torch.linalg.cholesky(inverse, upper=True).double())

    def off(root: torch.Tensor) -> torch.Tensor:
        rule, wanted = (r / r.diagonal(dim1=1, dim2=2)[:, None] for r in (root, exact))
        return (rule - wanted).norm(dim=(1, 2))

    assert (off(ours) <= off(papers) + 1e-6 * exact.norm(dim=(1, 2))).all()


@methods
@pytest.mark.parametrize("least", [-0.001, -0.05, -5.0])
def test_weights_stay_sound_where_damping_had_to_rise(least: float, method: Method) -> None:
    """No step after the factorisation may assume that the moment is positive definite."""
    method = method.model_copy(update={"damping": 0.01, "correlation_damping": 0.0})
    w = correlated(2, 10, 64, seed=10)[0].float()
    moment = torch.stack([with_eigenvalue(least, 64), with_eigenvalue(0.5, 64)]).float()
    result = quantize_batch(w, moment, SCHEMES[0], method, torch.bfloat16)
    assert result.damping_raised == {-0.001: 0, -0.05: 1, -5.0: 3}[least]
    assert float((w[0] - dequantized(result.weight)[0]).norm()) < 0.25 * float(w[0].norm())


@pytest.mark.parametrize("bad", ["indefinite", "nan", "inf"])
def test_a_hopeless_moment_falls_back_to_its_diagonal_and_is_counted(bad: str) -> None:
    hopeless = with_eigenvalue(0.5, 64)
    if bad == "indefinite":  # the diagonal, a sum of squares, stays positive
        hopeless = torch.full((64, 64), 1e8, dtype=torch.float64) + torch.diag(torch.linspace(1, 2, 64) - 1e8)
    else:
        hopeless[3, 5] = hopeless[5, 3] = hopeless[7, 7] = float(bad)
    moments = torch.stack([with_eigenvalue(0.5, 64), hopeless])
    got = factor(moments, 0.01)
    assert got.diagonal_fallbacks == 1
    assert torch.isfinite(got.root).all()
    assert torch.equal(got.root[1], torch.diag(got.root[1].diagonal()))
    torch.testing.assert_close(got.root[0], factor(moments[:1], 0.01).root[0])
    w, _ = correlated(2, 10, 64, seed=10)
    scale, _ = absmax_scales(w, SCHEMES[0], torch.bfloat16)
    weight = gptq(w, prepare(moments, 0.01), scale, None, SCHEMES[0]).weight()
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
    """Held-out tokens have the expert's own distribution, which shares half of its directions with the layer's."""
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
