"""Other tools' files are read as the tools mean them, and verified by the same command as ours.

Three kinds of proof: each format's own package or a slow twin (foreign.py) gives the same weights; on the real command
line a quantized baby has the KL of the folder with its dequantized weights; and a checkpoint that contradicts itself is
refused in one message.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from pretend import unpack_on_a_pretended_device

import foreign
from foreign import Block, ct_block, opened
from onecard.checkpoint.source import open_folder
from onecard.core.tensors import DTYPE_NAMES

GPTQ: Block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BNB: Block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8: Block = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


@pytest.fixture(autouse=True)
def unpacked_where_the_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of this file is unpacked as on a GPU."""
    unpack_on_a_pretended_device(monkeypatch)


def ct_write(weight: torch.Tensor, block: Block, dtype: torch.dtype = torch.float32) -> foreign.Written:
    """The package's own compressor and decompressor, with scales that we choose."""
    config = QuantizationConfig.model_validate(block)
    scheme = config.config_groups["group_0"]
    args, (rows, columns) = scheme.weights, weight.shape
    shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // (args.group_size or 1))}.get(
        args.strategy
    )
    if args.strategy == "block":
        shape = tuple(-(-n // b) for n, b in zip(weight.shape, args.block_structure, strict=True))
    top = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1)
    state = {"weight": weight.to(dtype), "weight_scale": torch.rand(shape).add(0.5).to(dtype) * 3 / top}
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-4, 4, shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"].double()


def a_weight(rows: int = 96, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_fields_are_cut_out_of_words_wherever_they_lie(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randint(0, 2**bits, (rows, count), generator=generator)
    words = torch.tensor([foreign.words_of(row, bits) for row in fields.tolist()], dtype=torch.int32)
    codes = unpack_from_int32(words, bits, torch.Size((rows, count)))
    assert torch.equal(codes.long() + 2 ** (bits - 1), fields)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 64}),
        ("pack-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("naive-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [40, 48]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value.values()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_tensors_is_what_its_own_package_reads(
    form: str, weights: Block, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    block = ct_block({"type": "int", "symmetric": True} | weights, form=form)
    stored, meant = ct_write(a_weight(97, 64), block, dtype)
    source = opened(tmp_path, stored, block)
    assert list(source.names) == ["m.weight"]
    assert source.info("m.weight").dtype == DTYPE_NAMES[dtype]
    got = source.get("m.weight")
    assert got.dtype == dtype
    assert torch.equal(got.double(), meant)
    assert torch.equal(source.get("m.weight", (slice(3, 9),)), got[3:9])


@pytest.mark.parametrize("targets", [("Linear", "re:^m$"), ("Linear", "m"), ("re:.*", "m")], ids=str)
def test_of_groups_that_all_fit_the_narrowest_target_counts(targets: tuple[str, str], tmp_path: Path) -> None:
    """Blocks of 64 and of 96 rows both cut 97 rows in two."""
    blocks = [{"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [n, 64]} for n in (64, 96)]
    stored, meant = ct_write(a_weight(97), ct_block(blocks[1], form="naive-quantized"))
    source = opened(tmp_path, stored, ct_block(*blocks, form="naive-quantized", targets=targets))
    assert source.schemes == {"m": "fp8 block 96x64"}
    assert torch.equal(source.get("m.weight").double(), meant)


def test_an_order_of_columns_names_each_inputs_group(tmp_path: Path) -> None:
    """Older llm-compressor wrote `weight_g_idx`, which the package no longer reads. All -1 means no order."""
    block = ct_block({"num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "group"})
    plain = ct_block({"num_bits": 4, "strategy": "group", "group_size": 16})
    stored, in_order = ct_write(a_weight(), plain)
    order = (torch.randperm(64, generator=torch.Generator().manual_seed(2)) // 16).to(torch.int32)
    codes = in_order / stored["weight_scale"].double().repeat_interleave(16, 1)
    meant = codes * stored["weight_scale"].double()[:, order.long()]
    got = opened(tmp_path, stored | {"weight_g_idx": order}, block).dense("m.weight", torch.float64)
    assert torch.allclose(got, meant, rtol=1e-6, atol=0)
    none = torch.full((64,), -1, dtype=torch.int32)
    assert torch.equal(opened(tmp_path, stored | {"weight_g_idx": none}, block).get("m.weight").double(), in_order)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_the_slow_twin_reads(bits: int, version: int, shuffled: bool, tmp_path: Path) -> None:
    stored, meant = foreign.gptq(a_weight(), bits, 32, version, shuffled)
    block = GPTQ | {"bits": bits, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
    source = opened(tmp_path, stored, block)
    assert torch.allclose(source.dense("m.weight", torch.float64), meant, rtol=1e-6, atol=1e-9)
    assert source.info("m.weight").dtype == "F16"
    assert source.schemes == {"m": f"int{bits} group 32"}
    without = {leaf: part for leaf, part in stored.items() if leaf != "g_idx"}
    if not shuffled:
        assert torch.equal(opened(tmp_path / "without", without, block).get("m.weight"), source.get("m.weight"))


def test_gptq_version_1_gets_a_borrowed_zero_point_back(tmp_path: Path) -> None:
    """GPTQModel takes 1 off every field by one subtraction from the word, so a zero point of 0 borrows from its
    neighbour."""
    stored, _ = foreign.gptq(a_weight(), version=2)
    zeros = torch.tensor([[0, 5, 0, 0, 15, 1, 0, 7] * 12] * 2)
    plain = torch.tensor([foreign.words_of(row, 4) for row in zeros.tolist()], dtype=torch.int32)
    less = torch.tensor(
        [[foreign.signed((int(w) - 0x11111111) & 0xFFFFFFFF) for w in row] for row in plain], dtype=torch.int32
    )
    one = opened(tmp_path / "1", stored | {"qzeros": less}, GPTQ).get("m.weight")
    two = opened(tmp_path / "2", stored | {"qzeros": plain}, GPTQ | {"checkpoint_format": "gptq_v2"}).get("m.weight")
    assert torch.equal(one, two)


def test_gptq_modules_may_have_widths_of_their_own(tmp_path: Path) -> None:
    stored, meant = foreign.gptq(a_weight(), bits=8)
    source = opened(tmp_path, stored, GPTQ | {"dynamic": {"+:m": {"bits": 8}}})
    assert source.schemes == {"m": "int8 group 32"}
    assert torch.allclose(source.dense("m.weight", torch.float64), meant, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_is_what_its_own_package_and_the_twin_read(
    kind: str, nested: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    stored, meant = foreign.nf4(a_weight(), kind, nested, storage)
    source = opened(tmp_path, stored, BNB)
    assert torch.equal(source.get("m.weight").double(), meant)
    assert (list(source.names), source.info("m.weight").shape) == (["m.weight"], (96, 64))
    twin = foreign.nf4_twin(stored)
    assert torch.allclose(source.dense("m.weight", torch.float32).double(), twin, rtol=1e-5, atol=1e-7)


def test_bitsandbytes_int8_is_code_times_absmax_over_127(tmp_path: Path) -> None:
    weight = a_weight().float()
    absmax = weight.abs().amax(1)
    stored = {
        "weight": (weight / absmax[:, None] * 127).round().to(torch.int8),
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    source = opened(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    meant = stored["weight"].double() * absmax.double()[:, None] / 127
    assert torch.allclose(source.get("m.weight").double(), meant, rtol=1e-6)
    assert list(source.names) == ["m.weight"]
    assert any("activations" in warning for warning in source.warnings)


@pytest.mark.parametrize(
    ("block", "suffix", "size"),
    [
        ((32, 32), "weight_scale_inv", [32, 32]),
        ((40, 48), "weight_scale_inv", [40, 48]),
        ((1, 64), "weight_scale", None),
        ((96, 64), "weight_scale", None),
    ],
)
def test_fp8_is_what_the_slow_twin_reads(
    block: tuple[int, int], suffix: str, size: list[int] | None, tmp_path: Path
) -> None:
    stored, meant = foreign.fp8(a_weight(), block, suffix)
    source = opened(tmp_path, stored | {"input_scale": torch.ones(1)}, FP8 | {"weight_block_size": size})
    assert torch.allclose(source.dense("m.weight", torch.float64), meant, rtol=1e-6)
    assert list(source.names) == ["m.weight"]
    assert any("activations" in warning for warning in source.warnings)


def test_scales_that_are_powers_of_two_are_read(tmp_path: Path) -> None:
    """`scale_fmt: ue8m0` stores them as F8_E8M0, of which dense weights could not be made: they get bf16."""
    parts, _ = foreign.fp8(a_weight())
    scale = parts["weight_scale_inv"].to(torch.float8_e8m0fnu)
    source = opened(tmp_path, parts | {"weight_scale_inv": scale, "norm": torch.ones(4).bfloat16()}, FP8)
    exponents = scale.view(torch.uint8).double() - 127
    meant = parts["weight"].double() * (2**exponents).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(source.dense("m.weight", torch.float64), meant)
    assert source.info("m.weight").dtype == "BF16"


def test_one_expert_of_a_fused_tensor_is_read_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [foreign.fp8(a_weight(seed=n)) for n in range(4)]
    stored = {
        f"experts.down_proj{suffix}": torch.stack([parts[f"weight{suffix}"] for parts, _ in experts])
        for suffix in ("", "_scale_inv")
    }
    source = opened(tmp_path, stored, FP8)
    read_bytes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            read_bytes.append(super().readinto(buffer) or 0)
            return read_bytes[-1]

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Counted(path, mode))
    got = source.dense("m.experts.down_proj", torch.float64, (2, slice(None), slice(16, 48)))
    assert torch.allclose(got, experts[2][1][:, 16:48], rtol=1e-6)
    assert sum(read_bytes) == 96 * 64 + 4 * 3 * 2
    whole = source.dense("m.experts.down_proj", torch.float64)
    assert torch.allclose(whole, torch.stack([meant for _, meant in experts]), rtol=1e-6)


@pytest.mark.parametrize("outputs_first", [False, True])
def test_fbgemm_keeps_an_experts_outputs_on_the_last_axis(outputs_first: bool, tmp_path: Path) -> None:
    """Llama 4 `[experts, in, out]`; the scale's axes are turned for `down_proj`, and square experts are no excuse."""
    experts = [foreign.fp8(a_weight(64, 64, seed=n), (1, 64)) for n in range(3)]
    scale = torch.stack([parts["weight_scale_inv"] for parts, _ in experts])  # [experts, out, 1]
    stored = {
        "experts.down_proj": torch.stack([parts["weight"].T for parts, _ in experts]),
        "experts.down_proj_scale": scale if outputs_first else scale.transpose(1, 2),
    }
    source = opened(tmp_path, stored, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    meant = torch.stack([meant.T for _, meant in experts])
    assert torch.allclose(source.dense("m.experts.down_proj", torch.float64), meant, rtol=1e-6)
    assert torch.allclose(source.dense("m.experts.down_proj", torch.float64, (1,)), meant[1], rtol=1e-6)


def experts_only(name: str) -> bool:
    return ".experts." in name


def linear(name: str) -> bool:
    return name.endswith("_proj.weight") and "vision" not in name


INT4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def mixed(weight_of: dict[str, Block]) -> Callable[[torch.Tensor], foreign.Written]:
    """Writes experts' matrices one way and all others another. Shapes tell them apart: a baby's attention has 64 or 32
    inputs and outputs."""

    def write(weight: torch.Tensor) -> foreign.Written:
        return ct_write(weight, ct_block(weight_of["expert" if 96 in weight.shape else "other"]), torch.bfloat16)

    return write


@pytest.mark.parametrize(
    ("family", "write", "chosen", "block", "dtype"),
    [
        (
            "llama4-text",
            mixed({"expert": INT4, "other": INT8}),
            linear,
            ct_block(INT8, INT4, targets=("Linear", "re:.*(experts|shared_expert).*")),
            torch.bfloat16,
        ),
        ("qwen3", lambda w: foreign.gptq(w, shuffled=True), linear, GPTQ | {"desc_act": True}, torch.float16),
        ("llama4-text", foreign.nf4, linear, BNB, torch.bfloat16),
        ("qwen3", foreign.fp8, experts_only, FP8, torch.bfloat16),
    ],
    ids=["compressed-tensors-mixed", "gptq", "nf4", "fp8"],
)
def test_a_baby_has_the_kl_of_its_dequantized_twin(
    family: str,
    write: foreign.Writer,
    chosen: Callable[[str], bool],
    block: Block,
    dtype: torch.dtype,
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    packed, twin = foreign.quantized_pair(baby(family), tmp_path, write, chosen, block, dtype)
    lines = []
    for checkpoint in (packed, twin):
        result = onecard("verify", baby(family), checkpoint, *texts[2:])
        assert result.exit_code == 0, result.stderr
        lines.append(json.loads(result.stdout))
    assert lines[0]["kl_mean_nats"] > 1e-4
    assert lines[0]["kl_mean_nats"] == pytest.approx(lines[1]["kl_mean_nats"], rel=1e-6)
    facts = json.loads(onecard("inspect", packed).stdout)
    assert (facts["quantized"], facts["format"].split()[0]) == (True, block["quant_method"])
    assert set(facts["roles"]["expert"]["widths"]).isdisjoint({"BF16", "F16"})


def test_experts_left_fused_and_as_they_were_are_seen(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """transformers quantizes Llama 4 by bitsandbytes so: Linear modules in four bits, all experts in bf16. It cannot
    load the result (5.23 then expects the experts one by one)."""
    original = baby("llama4-text")
    source, packed = open_folder(original), {}
    for name in source.names:
        weight = source.get(name)
        if linear(name) and weight.ndim == 2:
            packed |= {name.removesuffix("weight") + leaf: part for leaf, part in foreign.nf4(weight)[0].items()}
        else:
            packed[name] = weight
    assert any(name.endswith("experts.gate_up_proj") for name in packed)
    folder = foreign.write_like(original, tmp_path / "packed", packed, BNB)
    result = onecard("inspect", folder)
    assert result.exit_code == 0, result.stderr
    roles = json.loads(result.stdout)["roles"]
    assert list(roles["expert"]["widths"]) == ["BF16"]
    assert list(roles["attention"]["widths"]) == ["nf4 block 64, double quantized"]
    assert onecard("verify", original, folder, *texts[2:]).exit_code == 0
    refused(onecard("generate", folder, "hello"), "transformers", "cannot load", folder)
