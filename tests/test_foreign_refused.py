"""A quantized checkpoint that contradicts itself is refused before a weight is read, in one message with every
offender.

Its config and JSON parts are believed only as far as the stored shapes agree.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

import foreign
from foreign import Block, ct_block
from onecard.checkpoint.model import open_model
from onecard.checkpoint.packed import open_packed
from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError

Parts = dict[str, torch.Tensor]
GPTQ: Block = {"quant_method": "gptq", "bits": 4, "group_size": 32}
BNB: Block = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8: Block = {"quant_method": "fp8", "weight_block_size": [32, 32]}
WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def int4_block(weights: Block | None = None, **more: Any) -> Block:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | (weights or {})
    return ct_block(args) | more


def packed() -> Parts:
    return {
        "weight_packed": torch.zeros(96, 8, dtype=torch.int32),
        "weight_scale": torch.ones(96, 2),
        "weight_shape": torch.tensor([96, 64]),
    }


def state_of(change: Callable[[Block], None]) -> Parts:
    """NF4 parts whose JSON was changed."""
    parts = foreign.nf4(WEIGHT)[0]
    key = next(k for k in parts if ".quant_state." in k)
    state = json.loads(bytes(parts[key].tolist()))
    change(state)
    return parts | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def without(parts: Parts, leaf: str) -> Parts:
    return {name: part for name, part in parts.items() if name != leaf}


def refusal(folder: Path, parts: Parts, block: object, stems: tuple[str, ...] = ("m.",)) -> str:
    save_file(
        {stem + leaf: p.contiguous().clone() for stem in stems for leaf, p in parts.items()},
        folder / "model.safetensors",
    )
    with pytest.raises(InputError) as caught:
        open_packed(open_folder(folder), block)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("parts", "block", "needles"),
    [
        (packed, [], ("no object",)),
        (packed, {"quant_method": "awq"}, ("'awq'", "gptq", "bitsandbytes", "fp8", "compressed-tensors")),
        (packed, {"quant_method": ["gptq"]}, ("['gptq']",)),
        (packed, {}, ("None",)),
        (packed, GPTQ, ("no weight is stored in that format",)),
        # compressed-tensors
        (lambda: without(packed(), "weight_scale"), int4_block(), ("has no weight_scale",)),
        (lambda: packed() | {"weight_scale": torch.ones(96, 3)}, int4_block(), ("group_0", "[96, 8]", "[96, 3]")),
        (packed, int4_block({"num_bits": 8}), ("[96, 8]", "[96, 2]")),
        (packed, int4_block({"symmetric": False}), ("no weight_zero_point",)),
        (packed, int4_block({"type": "float"}), ("float4",)),
        (lambda: packed() | {"weight": WEIGHT}, int4_block(), ("stored twice",)),
        (packed, int4_block(format="nvfp4-pack-quantized"), ("nvfp4-pack-quantized", "int-quantized")),
        (packed, int4_block(format="dense"), ("dense", "save_compressed=True")),
        (packed, int4_block(sparsity_config={"format": "sparse-24-bitmask"}), ("sparse-24-bitmask",)),
        (packed, int4_block(transform_config={"config_groups": {"R1": {}}}), ("rotated",)),
        (
            packed,
            int4_block(config_groups={"group_0": {"targets": ["re:("], "weights": {"num_bits": 4}}}),
            ("re:(",),
        ),
        (packed, int4_block(config_groups=3), ("not understood",)),
        (
            lambda: {"weight": torch.zeros(96, 64, dtype=torch.int8), "weight_scale": torch.ones(96, 1)},
            int4_block(),
            ("none is stored plainly",),
        ),
        # GPTQ
        (lambda: without(without(foreign.gptq(WEIGHT)[0], "scales"), "qzeros"), GPTQ, ("no qzeros and no scales",)),
        (lambda: foreign.gptq(WEIGHT)[0], GPTQ | {"group_size": 64}, ("groups of 64", "scales F16 [2, 96]")),
        (lambda: foreign.gptq(WEIGHT)[0], GPTQ | {"bits": 8}, ("8 bits",)),
        (lambda: foreign.gptq(WEIGHT)[0], GPTQ | {"bits": 5}, ("bits 5", "2, 3, 4, 8")),
        (lambda: foreign.gptq(WEIGHT)[0], GPTQ | {"checkpoint_format": "marlin"}, ("marlin", "gptq_v2")),
        (lambda: foreign.gptq(WEIGHT)[0] | {"g_idx": torch.zeros(63, dtype=torch.int32)}, GPTQ, ("g_idx I32 [63]",)),
        (lambda: foreign.gptq(WEIGHT)[0] | {"qzeros": torch.zeros(2, 12)}, GPTQ, ("qzeros F32", "must be I32")),
        # bitsandbytes: the package reads as many bytes as the shapes say, so the parts must be that long
        (lambda: without(foreign.nf4(WEIGHT)[0], "weight.quant_map"), BNB, ("no quant_map",)),
        (
            lambda: foreign.nf4(WEIGHT)[0] | {"weight.absmax": torch.zeros(3, dtype=torch.uint8)},
            BNB,
            ("absmax U8 [3]",),
        ),
        (lambda: state_of(lambda s: s.update(shape=[96, 640])), BNB, ("[96, 640]", "bytes of codes")),
        (lambda: state_of(lambda s: s.update(shape=[-96, -64])), BNB, ("[-96, -64]",)),
        (lambda: state_of(lambda s: s.update(dtype="load")), BNB, ("'load'",)),
        (lambda: state_of(lambda s: s.update(blocksize=0)), BNB, ("blocksize 0",)),
        (lambda: state_of(lambda s: s.update(nested_offset="1")), BNB, ("nested_offset",)),
        (lambda: state_of(lambda s: s.update(quant_type="fp4")), BNB, ("'fp4'",)),
        (
            lambda: (
                foreign.nf4(WEIGHT)[0] | {"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
            ),
            BNB,
            ("no JSON",),
        ),
        (lambda: {"weight": torch.zeros(96, 64, dtype=torch.int8)}, BNB, ("no SCB",)),
        (lambda: {"weight": torch.zeros(3072, 1, dtype=torch.uint8)}, BNB, ("no m.weight.quant_state",)),
        # fp8
        (lambda: without(foreign.fp8(WEIGHT)[0], "weight_scale_inv"), FP8, ("neither m.weight_scale_inv nor",)),
        (lambda: foreign.fp8(WEIGHT, (48, 48))[0], FP8, ("[2, 2]", "32 x 32")),
        (lambda: foreign.fp8(WEIGHT)[0], FP8 | {"weight_block_size": "32"}, ("weight_block_size '32'",)),
    ],
)
def test_what_contradicts_itself_is_refused(
    parts: Callable[[], Parts], block: Block, needles: tuple[str, ...], tmp_path: Path
) -> None:
    said = refusal(tmp_path, parts(), block)
    assert [needle for needle in needles if needle not in said] == [], said


def test_one_message_names_every_offender_and_counts_what_it_does_not_show(tmp_path: Path) -> None:
    stems = tuple(f"layers.{n}." for n in range(50))
    said = refusal(tmp_path, without(packed(), "weight_scale"), int4_block(), stems)
    assert said.count("has no weight_scale") == 40
    assert "... and 10 more" in said


def test_codes_that_name_groups_which_are_not_there_are_found_when_they_are_read(tmp_path: Path) -> None:
    parts = foreign.gptq(WEIGHT)[0]
    parts["g_idx"][5] = 2
    save_file({f"m.{leaf}": part.contiguous() for leaf, part in parts.items()}, tmp_path / "model.safetensors")
    source = open_packed(open_folder(tmp_path), GPTQ)
    with pytest.raises(InputError, match=r"m\.weight.*g_idx names groups 0 to 2 of 2"):
        source.get("m.weight")


@pytest.mark.parametrize("place", ["quantize_config.json", "compression_config", "text_config"])
def test_the_config_block_is_found_where_tools_put_it(place: str, baby: Callable[..., Path], tmp_path: Path) -> None:
    family = "scout" if place == "text_config" else "qwen3"
    folder, _ = foreign.quantized_pair(
        baby(family),
        tmp_path,
        foreign.gptq,
        lambda name: "shared" in name or ".mlp.gate_proj." in name,
        GPTQ,
        torch.half,
    )
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    if place == "quantize_config.json":
        (folder / place).write_text(json.dumps({k: v for k, v in block.items() if k != "quant_method"}))
    elif place == "text_config":
        config["text_config"]["quantization_config"] = block
    else:
        config[place] = block
    (folder / "config.json").write_text(json.dumps(config))
    assert open_model(str(folder)).packed


def test_the_command_line_says_it_in_one_message(
    baby: Callable[..., Path], onecard: Callable[..., Result], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder, _ = foreign.quantized_pair(
        baby("qwen3"), tmp_path, foreign.gptq, lambda name: ".mlp.gate_proj." in name, GPTQ | {"bits": 8}, torch.half
    )
    for verb in (("inspect", folder), ("verify", baby("qwen3"), folder), ("plan", folder, "--recipe", "rtn-int4")):
        refused(onecard(*verb), "no sound gptq checkpoint", "layers.1.mlp.gate_proj", "8 bits")
