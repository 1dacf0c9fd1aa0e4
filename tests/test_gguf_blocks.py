"""Codes in GGUF's blocks come back bit for bit, and the gguf package's own dequantizer reads the same weights."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.checkpoint.gguf import blocks
from onecard.checkpoint.gguf import file as gguf_file
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import BY_ROW, Scheme

GROUPS = st.sampled_from([32, 64, 128, BY_ROW])
four = st.builds(Scheme, st.just(4), GROUPS, st.booleans())
eight = st.builds(Scheme, st.just(8), GROUPS, st.just(True))


def a_weight(outputs: int, groups: int, scheme: Scheme, seed: int, power: float = -8.0) -> QuantizedWeight:
    """Any codes and zero points, bf16 scales of both signs around 2^power."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    size = 2 ** (power + 2 * torch.rand(outputs, groups, generator=generator))
    sign = torch.randint(0, 2, (outputs, groups), generator=generator) * 2 - 1
    inputs = groups * (scheme.group_size if scheme.group_size != BY_ROW else 96)
    size, sign = size[:, : scheme.groups(inputs)], sign[:, : scheme.groups(inputs)]
    zero = None if scheme.symmetric else codes(*size.shape)
    return QuantizedWeight(codes(outputs, inputs), (size * sign).bfloat16(), zero, scheme)


def read_by_gguf(packed: torch.Tensor, scheme: Scheme, inputs: int) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(packed.numpy(), GGMLQuantizationType[blocks.kind_of(scheme, inputs)])))


@settings(max_examples=40)
@given(four | eight, st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31), st.floats(-17, 8))
def test_what_is_packed_comes_back_bit_for_bit(
    scheme: Scheme, outputs: int, groups: int, seed: int, power: float
) -> None:
    weight = a_weight(outputs, groups, scheme, seed, power)
    packed = blocks.pack(weight)
    inputs = weight.codes.shape[1]
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[blocks.kind_of(scheme, inputs)]]
    assert packed.shape == (outputs, inputs // block * block_bytes)
    assert gguf_file.GgufTensor("w", blocks.kind_of(scheme, inputs), (outputs, inputs)).nbytes == packed.nbytes
    back = blocks.unpack(packed, scheme, torch.bfloat16)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    if weight.zero_points is not None:
        assert back.zero_points is not None
        assert torch.equal(back.zero_points, weight.zero_points)
    ours, theirs = weight.dequantize(), read_by_gguf(packed, scheme, weight.codes.shape[1])
    if scheme.symmetric:
        assert torch.equal(ours, theirs)
    else:  # a group's smallest value has 12 bits, and fp16 holds 11
        step = weight.scales.float().abs().repeat_interleave(ours.shape[1] // weight.scales.shape[1], -1)
        assert bool(((ours - theirs).abs() <= 15 * step * 2**-11 + 2**-25).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_scales_below_fp16s_normal_numbers_are_exact_or_refused(sign: int) -> None:
    """A scale's eight bits fit into fp16 above 2^-17. Of smaller scales fp16 drops bits, the smaller the more."""
    odd = sign * (1 + 2**-7)  # bf16's last bit is set
    for power, held in ((-14, True), (-17, True), (-20, False), (-24, False), (-30, False)):
        scale = torch.tensor([[odd * 2.0**power]]).bfloat16()
        weight = QuantizedWeight(torch.ones(1, 32, dtype=torch.int8), scale, None, Scheme(4, 32))
        if held:
            assert torch.equal(blocks.unpack(blocks.pack(weight), weight.scheme, torch.bfloat16).scales, scale)
        else:
            with pytest.raises(ValueError, match="fp16 cannot hold"):
                blocks.pack(weight)


@pytest.mark.parametrize("scale", [70000.0, float("inf"), float("nan")])
def test_scales_that_fp16_has_no_number_for_are_refused(scale: float) -> None:
    weight = QuantizedWeight(torch.ones(1, 32, dtype=torch.int8), torch.tensor([[scale]]), None, Scheme(4, 32))
    with pytest.raises(ValueError, match="fp16 cannot hold"):
        blocks.pack(weight)


def test_blocks_of_one_group_must_agree() -> None:
    packed = blocks.pack(a_weight(2, 4, Scheme(4, 32), 0))
    with pytest.raises(ValueError, match="different scales"):
        blocks.unpack(packed, Scheme(4, 64), torch.bfloat16)


@pytest.mark.parametrize(("scheme", "why"), [(Scheme(8, 32, False), "zero points"), (Scheme(4, 48), "whole blocks")])
def test_schemes_without_a_block_type_are_refused(scheme: Scheme, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        blocks.kind_of(scheme, 96)
