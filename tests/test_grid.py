"""Grids of scales and zero points against scalar loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import SCHEMES, correlated, dequantized, limits, schemes
from onecard.core.method import Method
from onecard.core.scheme import Scheme
from onecard.quantize.grid import (
    SEARCH_HIGH,
    SEARCH_LOW,
    SEARCH_STEPS,
    TINY_SCALE,
    absmax_scales,
    round_to_nearest,
    searched_scales,
)
from onecard.quantize.site import quantize_batch


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
    # Half a step for rounding, half for the rounded zero point, and bf16's rounding of the scale over the whole range.
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
