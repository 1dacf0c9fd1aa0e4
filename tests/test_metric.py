"""The cost of output errors: slopes and metrics against autograd, and row blocks against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F

from onecard.calibration.moments import SiteMoments
from onecard.core.method import Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize.gptq import prepare
from onecard.quantize.metric import METRIC_DAMPING, quantize_by_row_blocks, swiglu_metric, swiglu_slopes
from onecard.quantize.site import quantize_batch

SCHEME = Scheme(4, 32, True)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coarse(rows_BRI: torch.Tensor) -> QuantizedWeight:
    """Rounds to multiples of a half: a quantizer with an obvious error."""
    codes = torch.round(rows_BRI * 2).clamp(-8, 7).to(torch.int8)
    scales = torch.full((*rows_BRI.shape[:2], rows_BRI.shape[2] // 32), 0.5, dtype=torch.bfloat16)
    return QuantizedWeight(codes, scales, None, SCHEME)


def metrics(batch: int, outputs: int, seed: int) -> torch.Tensor:
    mix = normal(batch, outputs, outputs // 3, seed=seed)
    return mix @ mix.transpose(1, 2) + 0.1 * torch.eye(outputs, dtype=torch.float64)


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_what_is_left_of_the_rows_is_aimed_at_the_least_squares_answer(blocks: int) -> None:
    """At every step the rest's targets are W_r + A_rr^-1 A_rb E_b, with E_b = W_b - Q_b against the original rows."""
    w, metric = normal(2, 12, 64, seed=1), metrics(2, 12, seed=2)
    seen: list[torch.Tensor] = []

    def watched(rows_BRI: torch.Tensor) -> QuantizedWeight:
        seen.append(rows_BRI)
        return coarse(rows_BRI)

    got = quantize_by_row_blocks(w, metric, blocks, watched).dequantize(torch.float64)
    assert len(seen) == blocks
    for b in range(2):
        order = torch.argsort(metric[b].diagonal(), descending=True, stable=True)
        a = metric[b][order][:, order]
        a = a + METRIC_DAMPING * a.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        original, quantized = w[b][order], got[b][order]
        start = 0
        for rows in seen:
            expected = original[start:]
            if start:
                error = original[:start] - quantized[:start]
                expected = expected + torch.linalg.solve(a[start:, start:], a[start:, :start] @ error)
            torch.testing.assert_close(rows[b], expected[: rows.shape[1]], rtol=1e-9, atol=1e-9)
            start += rows.shape[1]
        assert start == 12


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_coupled_metric_is_met_better_and_an_uncoupled_one_alike(symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    w = normal(3, 48, 64, seed=3, dtype=torch.float32) * 0.05
    mix = normal(3, 64, 64, seed=4, dtype=torch.float32)
    moment = mix @ mix.transpose(1, 2) / 64
    metric = metrics(3, 48, seed=5).float()

    def cost(method: Method, given: torch.Tensor | None) -> float:
        result = quantize_batch(w, moment, scheme, method, torch.bfloat16, given)
        e = (w - result.weight.dequantize(torch.float32)).double()
        return float((metric.double() @ e @ moment.double() @ e.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum())

    plain = cost(Method(refine_rounds=1, output_blocks=0), None)
    assert cost(Method(refine_rounds=1, output_blocks=12), metric) < 0.6 * plain
    assert cost(Method(refine_rounds=1, output_blocks=0), metric) == plain
    alike = torch.eye(48).expand(3, -1, -1)
    assert cost(Method(refine_rounds=1, output_blocks=12), alike) == pytest.approx(plain, rel=1e-6)


def test_slopes_are_the_derivatives_of_the_product() -> None:
    x, weight = normal(5, 16, seed=6), normal(12, 16, seed=7)
    both = F.linear(x, weight).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    (derivative,) = torch.autograd.grad((F.silu(gate) * up).sum(), both)
    torch.testing.assert_close(swiglu_slopes(x, weight), derivative)


def test_the_metric_of_gate_and_up_is_the_mean_cost_at_the_residual_stream() -> None:
    """For one error of the gate-up output that is the same at every token: mean |W_down (t dg + s du)|^2 under M."""
    slopes, down, residual = normal(40, 12, seed=8), normal(1, 10, 6, seed=9), metrics(1, 10, seed=10)[0]
    error = normal(12, seed=11)
    steps = (slopes * error).unflatten(1, (2, 6)).sum(1) @ down[0].T  # [tokens, H]
    expected = torch.einsum("th,hk,tk->t", steps, residual, steps).mean()
    got = swiglu_metric((slopes.T @ slopes / 40)[None], down, residual)[0]
    torch.testing.assert_close(error @ got @ error, expected)


def test_slopes_are_kept_and_shrunk_as_moments_are() -> None:
    moments = SiteMoments(2, 4, torch.device("cpu"), slopes=6)
    v = normal(30, 6, seed=15, dtype=torch.float32)
    weight = torch.rand(30, generator=torch.Generator().manual_seed(16)) + 0.5
    moments.add(0, v[:, :4], weight)
    moments.add_slopes(0, v, weight)
    own = (v * weight[:, None]).T @ v / weight.sum()
    first, second = moments.slopes(0.5, slice(0, 2))
    torch.testing.assert_close(first, own)  # the pooled moment equals its own, since the other expert saw nothing
    torch.testing.assert_close(second, own)
    assert torch.linalg.cholesky_ex(prepare(first[None], 0.01).objective).info == 0
