"""Integer codes are read back from a folder bit for bit, and nothing else is taken for codes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign
from foreign import Block, ct_block, opened
from onecard.checkpoint.formats import compressed_tensors_write as ct
from onecard.core.errors import InputError
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import BY_ROW, Scheme

Place = Callable[[], Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Gives a new folder with each call, because hypothesis calls a test many times."""
    number, home = itertools.count(), tmp_path_factory.mktemp("codes")
    return lambda: home / str(next(number))


def weight_args(scheme: Scheme, strategy: str) -> Block:
    """What a group of compressed-tensors says of its weights."""
    args = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy}
    return args | ({"group_size": scheme.group_size} if strategy == "group" else {})


def a_weight(outputs: int, inputs: int, scheme: Scheme, seed: int, dtype: torch.dtype) -> QuantizedWeight:
    """Any codes and zero points in range, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    groups = scheme.groups(inputs)
    scales = torch.randn(outputs, groups, generator=generator).to(dtype)
    zero = None if scheme.symmetric else codes(outputs, groups)
    return QuantizedWeight(codes(outputs, inputs), scales, zero, scheme)


def same(a: QuantizedWeight | None, b: QuantizedWeight) -> bool:
    assert a is not None
    assert (a.scheme, a.scales.dtype) == (b.scheme, b.scales.dtype)
    both_zero = (a.zero_points, b.zero_points)
    zeros = torch.equal(*both_zero) if None not in both_zero else both_zero == (None, None)  # type: ignore[arg-type]
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


# (bits, group size, symmetric), with outputs that fill no whole word.
schemes = st.builds(Scheme, st.sampled_from([4, 8]), st.sampled_from([8, 32, 64, 128]), st.booleans())


@settings(max_examples=25)
@given(schemes, st.integers(1, 21), st.integers(1, 3), st.integers(0, 2**31))
def test_compressed_tensors_gives_the_codes_that_were_packed(
    place: Place, scheme: Scheme, outputs: int, groups: int, seed: int
) -> None:
    weight = a_weight(outputs, groups * scheme.group_size, scheme, seed, torch.bfloat16)
    source = opened(place(), ct.pack(weight), ct_block(weight_args(scheme, "group")))
    assert source.weights["m.weight"].scheme == scheme
    got = source.quantized("m.weight")
    assert same(got, weight)
    assert got is not None
    assert torch.equal(got.dequantize(torch.bfloat16), source.get("m.weight"))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_row_or_for_all_is_one_group(place: Place, strategy: str, symmetric: bool) -> None:
    weight = a_weight(16, 64, Scheme(8, BY_ROW, symmetric), 0, torch.bfloat16)
    stored = ct.pack(weight)
    if strategy == "tensor":
        first = None if weight.zero_points is None else weight.zero_points[:1].expand(16, 1).contiguous()
        weight = QuantizedWeight(weight.codes, weight.scales[:1].expand(16, 1).contiguous(), first, weight.scheme)
        stored |= {"weight_scale": weight.scales[:1, 0]} | (
            {} if first is None else {"weight_zero_point": first[:1, 0]}
        )
    source = opened(place(), stored, ct_block(weight_args(weight.scheme, strategy)))
    assert same(source.quantized("m.weight"), weight)
    assert torch.equal(weight.dequantize(torch.bfloat16), source.get("m.weight"))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_gives_the_codes_that_the_slow_twin_packed(place: Place, bits: int, version: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits))
    stored, meant = foreign.gptq(weight, bits, 32, version)
    block = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False}
    source = opened(place(), stored, block | {"checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]})
    got = source.quantized("m.weight")
    assert got is not None
    assert (got.scheme, got.scales.dtype) == (Scheme(bits, 32, False), torch.float16)
    assert torch.allclose(got.dequantize().double(), meant, rtol=1e-6, atol=1e-9)
    assert torch.equal(got.dequantize(torch.float16), source.get("m.weight"))
    codes, scales, zeros = foreign.rounded(weight, bits, [i // 32 for i in range(64)])
    assert torch.equal(got.codes.long() + 2 ** (bits - 1), codes)
    assert got.zero_points is not None
    assert torch.equal(got.zero_points.long() + 2 ** (bits - 1), zeros)
    assert torch.equal(got.scales.double(), scales)


def test_symmetric_gptq_has_no_zero_points_and_may_not_hide_any(place: Place) -> None:
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    stored, _ = foreign.gptq(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))
    middle = torch.full_like(stored["qzeros"], 0x77777777)
    got = opened(place(), stored | {"qzeros": middle}, block).quantized("m.weight")
    assert got is not None
    assert got.scheme == Scheme(4, 32, True)
    with pytest.raises(InputError, match="symmetric"):
        opened(place(), stored, block).quantized("m.weight")


def test_what_has_no_codes_of_ours_gives_none(place: Place) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    order, _ = foreign.gptq(weight, shuffled=True)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    assert opened(place(), order, gptq | {"desc_act": True}).quantized("m.weight") is None
    with pytest.raises(InputError, match="order"):  # config.json says that there is none
        opened(place(), order, gptq).quantized("m.weight")
    three, _ = foreign.gptq(weight, bits=3)
    assert opened(place(), three, gptq | {"bits": 3}).quantized("m.weight") is None
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert opened(place(), foreign.nf4(weight)[0], bnb).quantized("m.weight") is None
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    source = opened(place(), foreign.fp8(weight)[0] | {"kept": weight}, fp8)
    assert source.quantized("m.weight") is None
    assert source.quantized("m.kept") is None
