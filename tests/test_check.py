"""`onecard check`: a sound folder is sound; every kind of damage is found, named, and ends in exit code 1."""

import json
import math
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
from damage import EXPERT, damaged, holder
from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sums_text
from papers import resum

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
    """The same folder without papers, as another tool would leave it."""
    (folder / "onecard.json").unlink()
    (folder / SUMS_NAME).unlink()
    return folder


def test_another_tools_folder_is_checked_for_the_rest(foreign: Path, onecard: Callable[..., Result]) -> None:
    """`check` says what it could not check, and checks the rest."""
    result = onecard("check", foreign)
    line = json.loads(result.stdout)
    assert (result.exit_code, line["sound"]) == (0, True)
    assert [what.split(":")[0] for what in line["not_checked"]] == ["digests", "the plan", "widths"]
    assert "files" not in line
    assert line["quantized_modules"] > 0


def test_damage_of_another_tools_folder(foreign: Path) -> None:
    """A NaN is found, and a zeroed expert is told: whether it was pruned, only its original shows."""
    shard = holder(foreign, f"{EXPERT}.weight_packed")
    tensors = load_file(shard)
    tensors[f"{EXPERT}.weight_packed"].fill_(struct.unpack("<i", b"\x88" * 4)[0])
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[norm][0] = math.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    line = damaged(foreign, f"{norm} holds 1 NaN")
    assert [f"{EXPERT}.weight is all zeros" in what for what in line["not_checked"]].count(True) == 1
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


def test_a_scale_of_one_expert_ten_percent_larger(folder: Path) -> None:
    """Every value is plausible by itself, so only the digest can tell."""
    scale = f"{EXPERT}.weight_scale"
    shard = holder(folder, scale)
    tensors = load_file(shard)
    tensors[scale][0, 0] *= 1.1
    save_file(tensors, shard, metadata={"format": "pt"})
    damaged(folder, f"{shard.name} has another digest")


def test_a_missing_and_a_truncated_shard_are_both_named(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    line = damaged(folder, f"{first.name} is missing", f"{second.name} has another digest")
    assert "tensors" in line["not_checked"][0]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "onecard.json", "LICENSE"])
def test_a_side_file_that_changed(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text() + "\n")
    damaged(folder, f"{name} has another digest")


@pytest.mark.parametrize("name", ["model-00099-of-00099.safetensors", "pytorch_model.bin", "modeling_llama4.py"])
def test_an_extra_file_that_a_loader_may_take(folder: Path, name: str) -> None:
    save_file({"x": torch.ones(2)}, folder / name)
    damaged(folder, f"{name} is in the folder and belongs to nothing")


def test_papers_that_contradict_each_other(folder: Path) -> None:
    sums = read_sums(folder / SUMS_NAME)
    del sums["LICENSE"]
    (folder / SUMS_NAME).write_text(sums_text(sums))
    damaged(folder, "LICENSE is in onecard.json and not in SHA256SUMS")


@pytest.mark.parametrize("name", [SUMS_NAME, "onecard.json"])
def test_damaged_papers(folder: Path, name: str) -> None:
    (folder / name).write_text("what?\n")
    damaged(folder, f"{name}", only=False)


@pytest.mark.parametrize("content", ["[" * 100_000, {"model": [1]}, {"kl": [1]}], ids=["deep", "model", "kl"])
def test_a_record_of_other_shapes(folder: Path, content: str | dict[str, Any]) -> None:
    if isinstance(content, str):
        (folder / "onecard.json").write_text(content)
    else:
        edit_json(folder / "onecard.json", lambda record: record.update(content))
    resum(folder)
    damaged(folder, "onecard.json is damaged")


@pytest.mark.parametrize("section", ["files", "plan"])
def test_a_record_without_its_files_or_its_plan(folder: Path, section: str) -> None:
    """Every record of `quantize` is written with them, so one without them was changed."""
    edit_json(folder / "onecard.json", lambda record: record.pop(section))
    resum(folder)
    damaged(folder, "onecard.json is damaged")


def test_digests_that_the_record_names_and_that_are_gone(folder: Path) -> None:
    (folder / SUMS_NAME).unlink()
    damaged(folder, f"{SUMS_NAME} is missing, and onecard.json names it")


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


def test_a_finished_folder_without_its_config_is_damaged(folder: Path) -> None:
    (folder / "config.json").unlink()
    damaged(folder, "config.json is missing", only=False)
