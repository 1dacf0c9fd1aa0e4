"""compressed-tensors pack-quantized: unpack(pack(x)) is x bit for bit, and the format's own package reads the same.

The twins: words built bit by bit in Python from facts.md, and the reader of the compressed-tensors package.
"""

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.checkpoint.formats import compressed_tensors_config as ct_config
from onecard.checkpoint.formats import compressed_tensors_read as ct_read
from onecard.checkpoint.formats import compressed_tensors_write as ct
from onecard.checkpoint.formats.compressed_tensors_config import read_groups
from onecard.checkpoint.formats.packing import unpack_columns
from onecard.core import device
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import BY_ROW, Scheme
from onecard.core.tensors import DTYPE_NAMES


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    """Any codes and zero points in range, outputs that fill no whole word included."""
    group = draw(st.sampled_from([8, 16, 24, 32, 128, BY_ROW]))
    scheme = Scheme(draw(st.sampled_from([4, 8])), group, draw(st.booleans()))
    outputs, groups = draw(st.integers(1, 21)), 1 if group == BY_ROW else draw(st.integers(1, 5))
    inputs = draw(st.integers(1, 9)) * 8 if group == BY_ROW else groups * group
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    scales = torch.rand(outputs, groups, generator=generator).add(0.01).to(dtype)
    zero = None if scheme.symmetric else codes(outputs, groups)
    return QuantizedWeight(codes(outputs, inputs), scales, zero, scheme)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@given(weights())
def test_unpack_of_pack_is_the_weight_bit_for_bit(weight: QuantizedWeight) -> None:
    back = ct_read.unpack(ct.pack(weight), weight.scheme)
    assert same_bits(back.codes, weight.codes)
    assert torch.equal(back.scales.view(torch.uint8), weight.scales.view(torch.uint8))
    assert back.scales.dtype == weight.scales.dtype
    assert same_bits(back.zero_points, weight.zero_points)
    assert back.scheme == weight.scheme


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 64), (16, 8), (5, 24), (8, 1), (2, 12)])
def test_a_gpus_way_makes_the_packages_words(
    bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    assert torch.equal(ct._words(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(ct._words(codes.T, bits), pack_to_int32(codes.T, bits))


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
                mask = (1 << (bits * len(part))) - 1  # bits past the last output are unused
                assert got & mask == word(part, bits) & mask


@settings(deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 21), st.integers(1, 77), st.sampled_from([0, 1]), st.integers(0, 2**31))
def test_the_packages_words_are_those_of_the_twin(bits: int, rows: int, columns: int, along: int, seed: int) -> None:
    """For any shape: the last word of a row is padded with zero bits, and unpacking drops them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)
    per_word = 32 // bits
    lines = (codes.T if along == 0 else codes).tolist()
    fill = -len(lines[0]) % per_word  # the lowest code is a field of zero bits
    expected = [
        [word((line + [-(2 ** (bits - 1))] * fill)[i : i + per_word], bits) for i in range(0, len(line), per_word)]
        for line in lines
    ]
    packed = pack_to_int32(codes, bits, packed_dim=along)
    assert (packed.T if along == 0 else packed).tolist() == expected
    if along == 0:
        assert same_bits(unpack_columns(packed, bits, rows), codes)
    else:
        assert same_bits(unpack_from_int32(packed, bits, codes.shape).contiguous(), codes)


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    over = {"strategy": "channel"} if scheme.group_size == BY_ROW else {"group_size": scheme.group_size}
    args = QuantizationArgs(
        num_bits=scheme.bits, type="int", symmetric=scheme.symmetric, **{"strategy": "group"} | over
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
    """Scales are fp32, so that the package's own rounding of the dequantized weight gives our codes back."""
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
    size = weight.scheme.width(weight.codes.shape[1])
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
    block = ct_config.quantization_config({"a.b": scheme}, {"a.b": "a.b"}, {"a.b": 1}, ignore)
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


def test_several_schemes_are_groups_of_which_the_largest_is_the_class() -> None:
    most, some, few = Scheme(4, 128), Scheme(8, BY_ROW), Scheme(4, 32, False)
    units = {"m.0.q_proj": "m.0.qkv_proj", "m.0.k_proj": "m.0.qkv_proj", "m.0.o_proj": "m.0.o_proj"}
    units |= {
        f"m.{b}.experts.{e}.{p}_proj": f"m.{b}.experts" for b in (0, 1, 10) for e in (0, 11) for p in ("up", "down")
    }
    schemes = {m: {"m.0.qkv_proj": some, "m.0.o_proj": few, "m.1.experts": some}.get(u, most) for m, u in units.items()}
    block = ct_config.quantization_config(schemes, units, dict.fromkeys(units, 64), ["lm_head"])
    config = QuantizationConfig.model_validate(block)
    assert config.config_groups["group_0"].targets == ["Linear"]
    assert ct_config.announced(block, [*units, "lm_head"]) == schemes
    # vLLM asks for a fused module by its own name first, and for a layer's experts by the first expert's projections.
    fused = ct_config.announced(block, ["m.0.qkv_proj", "m.1.experts.0.gate_proj", "m.10.experts.0.gate_proj"])
    assert fused == {"m.0.qkv_proj": some, "m.1.experts.0.gate_proj": some, "m.10.experts.0.gate_proj": most}
    # The package asks for each module of a model with these names.
    model = torch.nn.Module()
    for name in (*units, "lm_head"):
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.add_module(name.rpartition(".")[2], torch.nn.Linear(128, 32, device="meta"))
    apply_quantization_config(model, config)
    for name, scheme in schemes.items():
        args = model.get_submodule(name).quantization_scheme.weights
        assert (args.num_bits, args.group_size or BY_ROW, args.symmetric) == (
            scheme.bits,
            scheme.group_size,
            scheme.symmetric,
        )
    assert not hasattr(model.lm_head, "quantization_scheme")


@given(st.sampled_from([4, 8]), st.one_of(st.just(BY_ROW), st.integers(1, 64).map(lambda n: 8 * n)), st.booleans())
def test_a_schemes_words_are_read_back(bits: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group, symmetric)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("words", ["", "int4", "int3 group 128", "int4 group 12", "bf16", "int4 by row x"])
def test_other_words_are_no_scheme(words: str) -> None:
    with pytest.raises(ValueError, match=r"width|group_size"):
        Scheme.parse(words)


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"bits": 16}, {"group_size": 0}, {"group_size": -32}, {"group_size": 12}, {"grid": "nf4"}]
)
def test_a_contradictory_scheme_is_refused_at_construction(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scheme(**wrong)  # type: ignore[arg-type]
