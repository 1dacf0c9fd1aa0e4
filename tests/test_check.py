"""`onecard check`: a sound folder is sound, and every kind of damage is found, named, and ends in exit code 1.

The folder is a baby's, as `quantize` emitted it. Where the damage is one that digests would find at once, SHA256SUMS is
made anew (`resum`), as somebody would who swaps files on purpose: the tensors themselves must then tell.
"""

import json
import math
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from babies import edit_json
from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sums_text
from papers import resum

EXPERT = "language_model.model.layers.1.feed_forward.experts.3.down_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(emitted: Callable[..., tuple[Path, Result]], tmp_path: Path) -> Path:
    """An emitted Scout baby to be spoilt."""
    return Path(shutil.copytree(emitted("scout")[0], tmp_path / "checkpoint"))


def holder(folder: Path, tensor: str) -> Path:
    """The shard of a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


def edit(folder: Path, tensor: str, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of the shard that holds `tensor`, and make SHA256SUMS anew."""
    shard = holder(folder, tensor)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    resum(folder)


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of their shard and out of the index."""

    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    def index(value: Any) -> None:
        for name in names:
            del value["weight_map"][name]

    edit(folder, names[0], change)
    edit_json(folder / "model.safetensors.index.json", index)
    resum(folder)


@pytest.fixture
def damaged(onecard: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Exit code 1, one JSON line, one message; every needle is in a problem of its own. Gives the line."""

    def check(folder: Path, *needles: str, only: bool = True) -> dict[str, Any]:
        result = onecard("check", folder)
        assert result.exit_code == 1, result.output + repr(result.exception)
        line: dict[str, Any] = json.loads(result.stdout)
        assert line["sound"] is False
        assert result.stderr.count("error: ") == 1
        for needle in needles:
            assert any(needle in problem for problem in line["problems"]), (needle, line["problems"])
            assert needle in result.stderr
        assert not only or len(line["problems"]) == len(needles), line["problems"]
        return line

    return check


# --- sound folders


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_what_quantize_emits_is_sound(
    emitted: Callable[..., tuple[Path, Result]], onecard: Callable[..., Result], family: str
) -> None:
    out = emitted(family)[0]
    result = onecard("check", out)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert (line["sound"], line["problems"], line["not_checked"]) == (True, [], [])
    record = json.loads((out / "onecard.json").read_text())
    assert line["weight_bytes"] == record["plan"]["emitted_bytes"]
    assert line["files"] == len(record["files"]) - 1  # it does not name itself
    assert "sound" in result.stderr


def test_sha256sum_itself_agrees(emitted: Callable[..., tuple[Path, Result]]) -> None:
    """The file is coreutils' own format, and names every file of the folder but itself."""
    out = emitted("scout")[0]
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS_NAME], cwd=out, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_sums(out / SUMS_NAME).keys() == {path.name for path in out.iterdir()} - {SUMS_NAME}


def test_a_card_and_a_notice_beside_it_are_no_damage(folder: Path, onecard: Callable[..., Result]) -> None:
    (folder / "README.md").write_text("# mine")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "NOTICE").write_text("of somebody")
    assert onecard("check", folder).exit_code == 0


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same folder as another tool would leave it: without papers."""
    (folder / "onecard.json").unlink()
    (folder / SUMS_NAME).unlink()
    return folder


def test_another_tools_folder_is_checked_for_the_rest(foreign: Path, onecard: Callable[..., Result]) -> None:
    """What could not be checked is said, and what can be is."""
    result = onecard("check", foreign)
    line = json.loads(result.stdout)
    assert (result.exit_code, line["sound"]) == (0, True)
    assert [what.split(":")[0] for what in line["not_checked"]] == ["digests", "the plan", "widths"]
    assert "files" not in line
    assert line["quantized_modules"] > 0


def test_damage_of_another_tools_folder(foreign: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    """A zeroed expert, and a value that is no number."""
    shard = holder(foreign, f"{EXPERT}.weight_packed")
    tensors = load_file(shard)
    tensors[f"{EXPERT}.weight_packed"].fill_(struct.unpack("<i", b"\x88" * 4)[0])
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[norm][0] = math.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    damaged(foreign, f"{EXPERT}.weight is all zeros", f"{norm} holds 1 NaN")
    del tensors[f"{EXPERT}.weight_scale"]
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_json(foreign / "model.safetensors.index.json", lambda i: i["weight_map"].pop(f"{EXPERT}.weight_scale"))
    damaged(foreign, EXPERT, only=False)


def test_a_format_that_nobody_here_reads(foreign: Path, onecard: Callable[..., Result]) -> None:
    edit_json(foreign / "config.json", lambda config: config.update(quantization_config={"quant_method": "quux"}))
    result = onecard("check", foreign)
    assert result.exit_code == 0, result.output
    assert "'quux' is not read here" in json.loads(result.stdout)["not_checked"][2]


def test_an_original_is_checked_too(baby: Callable[..., Path], onecard: Callable[..., Result]) -> None:
    """bf16 with fused experts, and no papers."""
    assert onecard("check", baby("scout")).exit_code == 0


# --- damage that the digests find


def test_a_scale_of_one_expert_ten_percent_larger(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    """Every value is sound by itself: only the digest can tell."""
    scale = f"{EXPERT}.weight_scale"
    shard = holder(folder, scale)
    tensors = load_file(shard)
    tensors[scale][0, 0] *= 1.1
    save_file(tensors, shard, metadata={"format": "pt"})
    damaged(folder, f"{shard.name} has another digest")


def test_a_missing_and_a_truncated_shard_are_both_named(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    line = damaged(folder, f"{first.name} is missing", f"{second.name} has another digest")
    assert "tensors" in line["not_checked"][0]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "onecard.json", "LICENSE"])
def test_a_side_file_that_changed(folder: Path, damaged: Callable[..., dict[str, Any]], name: str) -> None:
    (folder / name).write_text((folder / name).read_text() + "\n")
    damaged(folder, f"{name} has another digest")


@pytest.mark.parametrize("name", ["model-00099-of-00099.safetensors", "pytorch_model.bin", "modeling_llama4.py"])
def test_an_extra_file_that_a_loader_may_take(folder: Path, damaged: Callable[..., dict[str, Any]], name: str) -> None:
    save_file({"x": torch.ones(2)}, folder / name)
    damaged(folder, f"{name} is in the folder and belongs to nothing")


def test_papers_that_contradict_each_other(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    sums = read_sums(folder / SUMS_NAME)
    del sums["LICENSE"]
    (folder / SUMS_NAME).write_text(sums_text(sums))
    damaged(folder, "LICENSE is in onecard.json and not in SHA256SUMS")


@pytest.mark.parametrize("name", [SUMS_NAME, "onecard.json"])
def test_damaged_papers(folder: Path, damaged: Callable[..., dict[str, Any]], name: str) -> None:
    (folder / name).write_text("what?\n")
    damaged(folder, f"{name}", only=False)


@pytest.mark.parametrize("content", ["[" * 100_000, {"model": [1]}, {"kl": [1]}], ids=["deep", "model", "kl"])
def test_a_record_of_other_shapes(
    folder: Path, damaged: Callable[..., dict[str, Any]], content: str | dict[str, Any]
) -> None:
    if isinstance(content, str):
        (folder / "onecard.json").write_text(content)
    else:
        edit_json(folder / "onecard.json", lambda record: record.update(content))
    resum(folder)
    damaged(folder, "onecard.json is damaged")


def test_digests_that_the_record_names_and_that_are_gone(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    (folder / SUMS_NAME).unlink()
    damaged(folder, f"{SUMS_NAME} is missing, and onecard.json names it")


# --- damage with SHA256SUMS made anew


def test_a_missing_shard_that_nobody_lists(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    resum(folder)
    damaged(folder, f"{gone.name} is in onecard.json and not in SHA256SUMS", f"the shard {gone.name} is missing")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_no_number(folder: Path, damaged: Callable[..., dict[str, Any]], value: float) -> None:
    scale = f"{EXPERT}.weight_scale"
    edit(folder, scale, lambda tensors: tensors[scale][2].fill_(value))
    damaged(folder, f"{scale} holds")


def test_a_norm_that_is_no_number(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    norm = "language_model.model.layers.0.input_layernorm.weight"
    edit(folder, norm, lambda tensors: tensors[norm][2].fill_(math.nan))
    damaged(folder, f"{norm} holds 1 NaN, 0 Inf")


def test_scales_of_zero(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    scale = f"{EXPERT}.weight_scale"
    edit(folder, scale, lambda tensors: tensors[scale].zero_())
    damaged(folder, f"{scale} is all zeros")


def test_an_expert_whose_codes_are_zero(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    """0x8 in every field: the code of zero."""
    codes = f"{EXPERT}.weight_packed"
    zero = struct.unpack("<i", b"\x88" * 4)[0]
    edit(folder, codes, lambda tensors: tensors[codes].fill_(zero))
    damaged(folder, f"{EXPERT} is all zeros")


def test_an_original_with_a_zeroed_expert(copied: Callable[..., Path], damaged: Callable[..., dict[str, Any]]) -> None:
    """Fused experts: one of a stack."""
    model = copied("scout")
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    tensors = load_file(model / "model.safetensors")
    tensors[name][5] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    damaged(model, f"{name}[5] is all zeros")


def test_a_zeroed_expert_of_an_asymmetric_checkpoint(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    onecard: Callable[..., Result],
    damaged: Callable[..., dict[str, Any]],
) -> None:
    """Every code equals its zero point."""
    out = tmp_path / "out"
    use = recipe(method="rtn", symmetric=False, max_shard_bytes=10**9)
    assert onecard("quantize", baby("qwen3"), out, "--recipe", use, *texts).exit_code == 0
    assert onecard("check", out).exit_code == 0
    module = "model.layers.0.mlp.experts.2.up_proj"
    # 3 in every field of both, and in none of them the code that is zero where there are no zero points.
    three = struct.unpack("<i", b"\xbb" * 4)[0]

    def change(tensors: Tensors) -> None:
        for part in ("weight_packed", "weight_zero_point"):
            tensors[f"{module}.{part}"].fill_(three)

    edit(out, f"{module}.weight_packed", change)
    damaged(out, f"{module} is all zeros")


def test_a_missing_expert(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    """All its tensors gone, from the shard and from the index: nothing but config.json and the record know of it."""
    drop(folder, *(f"{EXPERT}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")))
    damaged(folder, f"{EXPERT}.weight is missing", "bytes, and onecard.json says")


def test_a_part_of_an_expert_is_missing(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    part = f"{EXPERT}.weight_scale"
    drop(folder, part)
    damaged(folder, f"{part} is missing", only=False)


def test_an_expert_left_in_bf16(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    """It loads nowhere, but the bytes look well: the plan and the config tell."""
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


def test_an_index_that_names_the_wrong_shard(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    name = f"{EXPERT}.weight_packed"
    right = holder(folder, name).name
    wrong = next(shard.name for shard in folder.glob("*.safetensors") if shard.name != right)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: wrong}))
    resum(folder)
    damaged(folder, f"{name} is in {right}, and model.safetensors.index.json says {wrong}")


def test_a_shape_that_contradicts_the_config(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    name = "language_model.model.norm.weight"
    edit(folder, name, lambda tensors: tensors.update({name: torch.ones(32, dtype=torch.bfloat16)}))
    damaged(folder, f"{name} is [32], and config.json says [64]", only=False)


def test_weight_shape_that_contradicts_the_codes(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
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
def test_a_swapped_config(
    folder: Path, damaged: Callable[..., dict[str, Any]], change: Callable[[Any], None], needle: str
) -> None:
    edit_json(folder / "config.json", change)
    resum(folder)
    damaged(folder, needle, only=False)


def test_the_config_of_another_model(
    folder: Path, emitted: Callable[..., tuple[Path, Result]], damaged: Callable[..., dict[str, Any]]
) -> None:
    shutil.copy(emitted("qwen3")[0] / "config.json", folder / "config.json")
    resum(folder)
    damaged(folder, "onecard.json says family llama4, and config.json qwen3_moe", only=False)


# --- folders that are no checkpoint


def _unfinished(record: Any) -> None:
    for key in [key for key in record if key != "files"]:
        del record[key]


def test_what_is_no_checkpoint(
    folder: Path, tmp_path: Path, onecard: Callable[..., Result], refused: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    refused(onecard("check", tmp_path / "empty"), "config.json")
    refused(onecard("check", tmp_path / "nowhere"), "is no folder")
    (folder / "config.json").unlink()
    (folder / SUMS_NAME).unlink()
    edit_json(folder / "onecard.json", _unfinished)
    refused(onecard("check", folder), "not finished", "--resume")


def test_a_finished_folder_without_its_config_is_damaged(folder: Path, damaged: Callable[..., dict[str, Any]]) -> None:
    (folder / "config.json").unlink()
    damaged(folder, "config.json is missing", only=False)
