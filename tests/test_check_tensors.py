"""`onecard check` finds damage that digests cannot show, because SHA256SUMS was made anew.

Somebody who swaps files on purpose would do so; the tensors themselves must then tell."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from babies import edit_json
from damage import EXPERT, Tensors, damaged, drop, edit, holder
from papers import resum


def test_a_missing_shard_that_nobody_lists(folder: Path) -> None:
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    resum(folder)
    damaged(folder, f"{gone.name} is in onecard.json and not in SHA256SUMS", f"the shard {gone.name} is missing")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_no_number(folder: Path, value: float) -> None:
    scale = f"{EXPERT}.weight_scale"
    edit(folder, scale, lambda tensors: tensors[scale][2].fill_(value))
    damaged(folder, f"{scale} holds")


def test_a_norm_that_is_no_number(folder: Path) -> None:
    norm = "language_model.model.layers.0.input_layernorm.weight"
    edit(folder, norm, lambda tensors: tensors[norm][2].fill_(math.nan))
    damaged(folder, f"{norm} holds 1 NaN, 0 Inf")


def test_scales_of_zero(folder: Path) -> None:
    scale = f"{EXPERT}.weight_scale"
    edit(folder, scale, lambda tensors: tensors[scale].zero_())
    damaged(folder, f"{scale} is all zeros")


def test_an_expert_whose_codes_are_zero(folder: Path) -> None:
    """Every field holds 0x8, the code of zero."""
    codes = f"{EXPERT}.weight_packed"
    zero = struct.unpack("<i", b"\x88" * 4)[0]
    edit(folder, codes, lambda tensors: tensors[codes].fill_(zero))
    damaged(folder, f"{EXPERT} is all zeros")


def test_an_original_with_a_zeroed_expert(copied: Callable[..., Path], onecard: Callable[..., Result]) -> None:
    """Fused experts: one of a stack. Nothing says whether it was pruned or damaged, and check doesn't either."""
    model = copied("scout")
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    tensors = load_file(model / "model.safetensors")
    tensors[name][5] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = onecard("check", model)
    assert result.exit_code == 0, result.output
    (said,) = [what for what in json.loads(result.stdout)["not_checked"] if what.startswith("zeros: ")]
    assert f"{name}[5] is all zeros" in said
    assert "onecard verify" in said


def test_a_zeroed_expert_of_an_asymmetric_checkpoint(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    onecard: Callable[..., Result],
) -> None:
    """Every code equals its zero point."""
    out = tmp_path / "out"
    use = recipe(method="rtn", symmetric=False, max_shard_bytes=10**9)
    assert onecard("quantize", baby("qwen3"), out, "--recipe", use, *texts).exit_code == 0
    assert onecard("check", out).exit_code == 0
    module = "model.layers.0.mlp.experts.2.up_proj"
    # Every field of both holds 3; none holds 8, which would mean zero without zero points.
    three = struct.unpack("<i", b"\xbb" * 4)[0]

    def change(tensors: Tensors) -> None:
        for part in ("weight_packed", "weight_zero_point"):
            tensors[f"{module}.{part}"].fill_(three)

    edit(out, f"{module}.weight_packed", change)
    damaged(out, f"{module} is all zeros")


def test_a_missing_expert(folder: Path) -> None:
    """All its tensors are gone from the shard and the index. Only config.json and the record know of it."""
    drop(folder, *(f"{EXPERT}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")))
    damaged(folder, f"{EXPERT}.weight is missing", "bytes, and onecard.json says")


def test_a_part_of_an_expert_is_missing(folder: Path) -> None:
    part = f"{EXPERT}.weight_scale"
    drop(folder, part)
    damaged(folder, f"{part} is missing", only=False)


def test_an_expert_left_in_bf16(folder: Path) -> None:
    """No engine loads it, though every byte is sound: the plan and the config tell."""
    parts = [f"{EXPERT}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")]

    def change(tensors: Tensors) -> None:
        shape = tensors[parts[2]].tolist()
        for part in parts:
            del tensors[part]
        tensors[f"{EXPERT}.weight"] = torch.ones(shape, dtype=torch.bfloat16)

    name = holder(folder, parts[0]).name
    edit(folder, parts[0], change)

    def index(value: Any) -> None:
        for part in parts:
            del value["weight_map"][part]
        value["weight_map"][f"{EXPERT}.weight"] = name

    edit_json(folder / "model.safetensors.index.json", index)
    resum(folder)
    damaged(
        folder,
        f"{EXPERT} is stored as BF16, and config.json announces int4",
        f"{EXPERT} is stored as BF16, and onecard.json says int4",
        only=False,
    )


def test_an_index_that_names_the_wrong_shard(folder: Path) -> None:
    name = f"{EXPERT}.weight_packed"
    right = holder(folder, name).name
    wrong = next(shard.name for shard in folder.glob("*.safetensors") if shard.name != right)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: wrong}))
    resum(folder)
    damaged(folder, f"{name} is in {right}, and model.safetensors.index.json says {wrong}")


def test_a_shape_that_contradicts_the_config(folder: Path) -> None:
    name = "language_model.model.norm.weight"
    edit(folder, name, lambda tensors: tensors.update({name: torch.ones(32, dtype=torch.bfloat16)}))
    damaged(folder, f"{name} is [32], and config.json says [64]", only=False)


def test_weight_shape_that_contradicts_the_codes(folder: Path) -> None:
    name = f"{EXPERT}.weight_shape"
    edit(folder, name, lambda tensors: tensors[name].fill_(7))
    damaged(folder, f"{name} says [7, 7]")


def _other_width(config: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def _nothing_ignored(config: Any) -> None:
    config["quantization_config"]["ignore"] = []


def _no_block(config: Any) -> None:
    del config["quantization_config"]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (_other_width, "config.json announces int8"),
        (_nothing_ignored, "q_proj is stored as BF16, and config.json"),
        (_no_block, "config.json has no quantization_config"),
    ],
)
def test_a_swapped_config(folder: Path, change: Callable[[Any], None], needle: str) -> None:
    edit_json(folder / "config.json", change)
    resum(folder)
    damaged(folder, needle, only=False)


def test_the_config_of_another_model(folder: Path, emitted: Callable[..., tuple[Path, Result]]) -> None:
    shutil.copy(emitted("qwen3")[0] / "config.json", folder / "config.json")
    resum(folder)
    damaged(folder, "onecard.json says family llama4, and config.json qwen3_moe", only=False)
