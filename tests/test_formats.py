"""compressed-tensors pack-quantized: unpack(pack(x)) is x bit for bit, and the format's own package reads the same.

The twins: words built bit by bit in Python from facts.md, and the reader of the compressed-tensors package.
"""

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.checkpoint.formats import compressed_tensors as ct
from onecard.checkpoint.formats.compressed_tensors_read import read_groups
from onecard.core.scheme import QuantizedWeight, Scheme
from onecard.core.tensors import DTYPE_NAMES


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    """Any codes and zero points in range, outputs that fill no whole word included."""
    scheme = Scheme(draw(st.sampled_from([4, 8])), draw(st.sampled_from([8, 16, 24, 32, 128])), draw(st.booleans()))
    outputs, groups = draw(st.integers(1, 21)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    scales = torch.rand(outputs, groups, generator=generator).add(0.01).to(dtype)
    zero = None if scheme.symmetric else codes(outputs, groups)
    return QuantizedWeight(codes(outputs, groups * scheme.group_size), scales, zero, scheme)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@given(weights())
def test_unpack_of_pack_is_the_weight_bit_for_bit(weight: QuantizedWeight) -> None:
    back = ct.unpack(ct.pack(weight), weight.scheme)
    assert same_bits(back.codes, weight.codes)
    assert torch.equal(back.scales.view(torch.uint8), weight.scales.view(torch.uint8))
    assert back.scales.dtype == weight.scales.dtype
    assert same_bits(back.zero_points, weight.zero_points)
    assert back.scheme == weight.scheme


@given(weights())
def test_layout_is_what_pack_stores(weight: QuantizedWeight) -> None:
    outputs, inputs = weight.codes.shape
    stored = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in ct.pack(weight).items()}
    assert stored == ct.layout(weight.scheme, outputs, inputs, DTYPE_NAMES[weight.scales.dtype])
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in ct.pack(weight).values())


def word(values: list[int], bits: int) -> int:
    """One int32 from codes: value + 2^(bits-1) unsigned, element j at bits `bits * j`."""
    unsigned = sum((v + 2 ** (bits - 1)) << (bits * j) for j, v in enumerate(values))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


@settings(max_examples=30)
@given(weights())
def test_words_are_those_of_the_specification(weight: QuantizedWeight) -> None:
    bits, per_word = weight.scheme.bits, 32 // weight.scheme.bits
    stored = ct.pack(weight)
    outputs, inputs = weight.codes.shape
    for o in range(outputs):
        row = weight.codes[o].tolist()
        expected = [word(row[i : i + per_word], bits) for i in range(0, inputs, per_word)]
        assert stored["weight_packed"][o].tolist() == expected
    assert stored["weight_shape"].tolist() == [outputs, inputs]
    if weight.zero_points is not None:  # packed along the outputs
        for g in range(weight.zero_points.shape[1]):
            column = weight.zero_points[:, g].tolist()
            for n in range(math.ceil(outputs / per_word)):
                got = stored["weight_zero_point"][n, g].item() & 0xFFFFFFFF
                part = column[n * per_word : (n + 1) * per_word]
                mask = (1 << (bits * len(part))) - 1  # bits past the last output are nobody's
                assert got & mask == word(part, bits) & mask


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=scheme.bits, type="int", symmetric=scheme.symmetric, strategy="group", group_size=scheme.group_size
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@settings(deadline=None)
@given(weights())
def test_the_formats_own_package_reads_the_same(weight: QuantizedWeight) -> None:
    stored, bits = ct.pack(weight), weight.scheme.bits
    shape = torch.Size(stored["weight_shape"].tolist())
    assert same_bits(unpack_from_int32(stored["weight_packed"], bits, shape).contiguous(), weight.codes)
    if weight.zero_points is not None:
        zero = unpack_from_int32(stored["weight_zero_point"], bits, weight.scales.shape, packed_dim=0)
        assert same_bits(zero.contiguous(), weight.zero_points)
    assert set(stored) == set(PackedQuantizationCompressor.compression_param_names(their_scheme(weight.scheme)))
    theirs = PackedQuantizationCompressor.decompress(stored, their_scheme(weight.scheme))["weight"]
    ours = weight.dequantize(weight.scales.dtype)
    assert theirs.dtype == ours.dtype
    assert torch.equal(theirs, ours)


@settings(deadline=None)
@given(weights())
def test_what_the_package_writes_is_what_we_write(weight: QuantizedWeight) -> None:
    """fp32 scales, so that the package's own rounding of the dequantized weight gives our codes back."""
    exact = QuantizedWeight(weight.codes, weight.scales.float(), weight.zero_points, weight.scheme)
    state = {"weight": exact.dequantize(), "weight_scale": exact.scales}
    if exact.zero_points is not None:
        state["weight_zero_point"] = exact.zero_points
    theirs = PackedQuantizationCompressor.compress(state, their_scheme(weight.scheme))
    ours = ct.pack(exact)
    assert theirs.keys() == ours.keys()
    for name in ours:
        if name != "weight_zero_point" or weight.codes.shape[0] % (32 // weight.scheme.bits) == 0:
            assert torch.equal(theirs[name], ours[name]), name


@given(weights())
def test_dequantize_is_code_minus_zero_times_scale(weight: QuantizedWeight) -> None:
    got = weight.dequantize()
    size = weight.scheme.group_size
    for o in range(weight.codes.shape[0]):
        for i in range(0, weight.codes.shape[1], 5):
            zero = 0 if weight.zero_points is None else int(weight.zero_points[o, i // size])
            value = (int(weight.codes[o, i]) - zero) * float(weight.scales[o, i // size])
            assert float(got[o, i]) == float(torch.tensor(value, dtype=torch.float64).float())


def test_one_matrix_of_a_batch_is_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(4, 32, False)
    codes = torch.randint(-8, 8, (3, 10, 64), generator=generator, dtype=torch.int8)
    scales, zeros = torch.rand(3, 10, 2, generator=generator), codes[:, :, :2].contiguous()
    part = QuantizedWeight(codes, scales, zeros, scheme).item(1, slice(4, 9))
    assert part.zero_points is not None
    for got, whole in ((part.codes, codes), (part.scales, scales), (part.zero_points, zeros)):
        assert torch.equal(got, whole[1, 4:9])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_config_block_is_the_packages_own(bits: int, group: int, symmetric: bool) -> None:
    scheme, ignore = Scheme(bits, group, symmetric), ["lm_head", "model.layers.0.mlp.gate"]
    block = ct.quantization_config(scheme, ignore)
    config = QuantizationConfig.model_validate(block)
    assert config.model_dump(mode="json", exclude_none=True) == block
    assert (block["quant_method"], block["format"], block["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    (theirs,) = config.config_groups.values()
    assert theirs.targets == ["Linear"]
    assert theirs.weights is not None
    got = (theirs.weights.num_bits, theirs.weights.group_size, theirs.weights.symmetric, theirs.weights.strategy)
    assert got == (bits, group, symmetric, "group")
    assert (theirs.weights.type, theirs.weights.dynamic) == ("int", False)
    assert theirs.input_activations is None
    assert config.ignore == ignore
    (group,) = read_groups(block)
    assert (group.bits, group.group_size, group.symmetric) == (scheme.bits, scheme.group_size, scheme.symmetric)


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"bits": 16}, {"group_size": 0}, {"group_size": -32}, {"group_size": 12}, {"grid": "nf4"}]
)
def test_a_contradictory_scheme_is_refused_at_construction(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scheme(**wrong)  # type: ignore[arg-type]
