"""GPTQ's layout: packed codes are read back bit for bit, and every word is the specification's."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign
from onecard.checkpoint.formats import gptq_read, gptq_write
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import BY_ROW, Scheme
from onecard.core.tensors import DTYPE_NAMES


@st.composite
def weights(draw: st.DrawFn) -> tuple[QuantizedWeight, int]:
    """Any codes, zero points and bf16 scales in range, and a version that holds them."""
    symmetric = draw(st.booleans())
    scheme = Scheme(draw(st.sampled_from([4, 8])), draw(st.sampled_from([8, 32, 64, 128, BY_ROW])), symmetric)
    outputs, inputs = 32 * draw(st.integers(1, 3)), 128 * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    groups = scheme.groups(inputs)
    drawn = torch.randn(outputs, groups, generator=generator).clamp(-30, 30)
    # fp16 does not hold smaller ones exactly: test_a_scale_that_fp16_cannot_hold_is_refused.
    scales = torch.where(drawn.abs() < 2.0**-17, 2.0**-17, drawn).to(torch.bfloat16)
    zero = None if symmetric else codes(outputs, groups)
    weight = QuantizedWeight(codes(outputs, inputs), scales, zero, scheme)
    return weight, draw(st.sampled_from([1, 2])) if symmetric else 2


@settings(max_examples=30)
@given(weights())
def test_unpack_of_pack_is_the_weight_bit_for_bit(given_weight: tuple[QuantizedWeight, int]) -> None:
    weight, version = given_weight
    stored = gptq_write.pack(weight, version)
    back = gptq_read.quantized(stored, scheme=weight.scheme, version=version)
    assert torch.equal(back.codes, weight.codes)
    assert back.scales.dtype == torch.float16
    assert torch.equal(back.scales.to(torch.bfloat16), weight.scales)  # exact: bf16 in fp16's range has fewer bits
    assert back.zero_points is weight.zero_points or torch.equal(back.zero_points, weight.zero_points)  # type: ignore[arg-type]
    outputs, inputs = weight.codes.shape
    assert gptq_write.layout(weight.scheme, outputs, inputs, "BF16") == {
        leaf: (DTYPE_NAMES[part.dtype], tuple(part.shape)) for leaf, part in stored.items()
    }


@settings(max_examples=10)
@given(weights())
def test_words_are_those_of_the_specification(given_weight: tuple[QuantizedWeight, int]) -> None:
    weight, version = given_weight
    bits, half = weight.scheme.bits, 2 ** (weight.scheme.bits - 1)
    stored = gptq_write.pack(weight, version)
    groups = weight.scales.shape[1]
    zeros = torch.zeros_like(weight.scales, dtype=torch.int8) if weight.zero_points is None else weight.zero_points
    for o in range(0, weight.codes.shape[0], 7):
        assert stored["qweight"][:, o].tolist() == foreign.words_of([int(c) + half for c in weight.codes[o]], bits)
    for g in range(groups):
        fields = [int(z) + half - (version == 1) for z in zeros[:, g]]
        assert stored["qzeros"][g].tolist() == foreign.words_of(fields, bits)
    size = weight.codes.shape[1] // groups
    assert stored["g_idx"].tolist() == [i // size for i in range(weight.codes.shape[1])]


@pytest.mark.parametrize("scale", [1e-9, 1e6, float("nan")])
def test_a_scale_that_fp16_cannot_hold_is_refused(scale: float) -> None:
    scales = torch.ones(32, 1)
    scales[3, 0] = scale
    weight = QuantizedWeight(torch.ones(32, 32, dtype=torch.int8), scales, None, Scheme(4, 32))
    with pytest.raises(ValueError, match="1 scales"):
        gptq_write.pack(weight, 1)
    scales[3, 0] = -(2.0**-17)  # the smallest bf16 scale that fp16 holds exactly
    gptq_write.pack(weight, 1)


def test_expressions_stand_for_all_blocks_and_no_other_module() -> None:
    modules = [f"a.layers.{n}.x.q_proj" for n in (0, 2)] + [f"a.layers.1.experts.{e}.up" for e in range(3)] + ["head"]
    units = {m: m.replace("q_proj", "qkv_proj") for m in modules[:2]} | dict.fromkeys(
        modules[2:5], "a.layers.1.experts"
    )
    found = gptq_write.expressions(modules, units)
    assert len(found) == 4
    match = [
        name
        for name in (
            "a.layers.2.x.q_proj",
            "model.a.layers.0.x.qkv_proj",
            "a.layers.1.experts",
            "m.head",
            "a.layers.1.experts.2.up",
        )
        if any(re.match(rule, name) for rule in found)
    ]
    assert len(match) == 5
    for name in (
        "a.layers.1.x.q_proj",
        "a.layers.20.x.q_proj",
        "a.layers.0.experts.1.up",
        "a.layers.1.experts_x",
        "ahead",
        "a.layers.0.x.q_projs",
    ):
        assert not any(re.match(rule, name) for rule in found), name
