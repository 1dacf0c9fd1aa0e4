"""Quantized checkpoints that cannot be used: one clean message that names every damaged module."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from babies import edit_json, shard_files
from command_line import Refuse


def test_quantized_already(
    emitted: Callable[..., Any],
    refuse: Refuse,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Refuse,
) -> None:
    checkpoint, _ = emitted("qwen3")
    refuse(checkpoint, checkpoint, "quantized already", "original")
    refused(onecard("plan", checkpoint, "--recipe", recipe()), checkpoint, "quantized already")


def _drop_scales(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        del tensors[f"{module}.weight_scale"]


def _cut_scales(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][:5].contiguous()


def _no_groups(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][:, :0].contiguous()


def _flat_codes(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_packed"] = tensors[f"{module}.weight_packed"].flatten()


def _narrow_codes(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_packed"] = tensors[f"{module}.weight_packed"][:, :2].contiguous()


def _no_module(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for name in [n for n in tensors if n.rpartition(".")[0] in modules]:
        del tensors[name]


@pytest.mark.parametrize("spoil", [_drop_scales, _cut_scales, _no_groups, _flat_codes, _narrow_codes, _no_module])
def test_damaged_quantized_checkpoint(
    baby: Callable[..., Path],
    emitted: Callable[..., Any],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    spoil: Callable[[dict[str, torch.Tensor], list[str]], None],
    refused: Refuse,
) -> None:
    """Two modules of an emitted checkpoint are spoilt: `verify` and `inspect` name both and compute nothing."""
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    stem = "model.layers.0.mlp.experts"
    modules = [f"{stem}.2.down_proj", f"{stem}.5.gate_proj"]
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        if f"{modules[0]}.weight_packed" in tensors:
            spoil(tensors, modules)
            save_file(tensors, shard, metadata={"format": "pt"})
    if spoil in (_drop_scales, _no_module):  # the index would name too many tensors, which is not tested here
        edit_json(
            checkpoint / "model.safetensors.index.json",
            lambda index: [
                index["weight_map"].pop(f"{m}.{s}")
                for m in modules
                for s in (
                    ["weight_scale"] if spoil is _drop_scales else ["weight_packed", "weight_scale", "weight_shape"]
                )
            ],
        )
    refused(onecard("inspect", checkpoint), *modules)
    refused(onecard("verify", baby("qwen3"), checkpoint, *texts[2:]), *modules)


def test_verify_refuses_scales_that_are_no_numbers(
    baby: Callable[..., Path],
    emitted: Callable[..., Any],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    refused: Refuse,
) -> None:
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    name = "model.layers.0.mlp.experts.2.down_proj.weight_scale"
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
    refused(onecard("verify", baby("qwen3"), checkpoint, *texts[2:]), name, "NaN", code=1)


def test_verify_with_swapped_arguments(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    texts: list[str],
) -> None:
    checkpoint, _ = emitted("qwen3")
    refused(onecard("verify", checkpoint, baby("qwen3"), *texts[2:]), checkpoint, baby("qwen3"), "original first")


def test_a_stored_shape_that_contradicts_the_codes(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    texts: list[str],
    tmp_path: Path,
) -> None:
    broken = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "broken"))
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(".weight_shape"):
                tensors[name] = torch.tensor([1, 2])
        save_file(tensors, file, metadata={"format": "pt"})
    refused(onecard("verify", baby("qwen3"), broken, *texts[2:]), "weight_shape", "[1, 2]")


def test_verify_refuses_a_checkpoint_of_another_model(
    baby: Callable[..., Path],
    emitted: Callable[..., Any],
    onecard: Callable[..., Result],
    texts: list[str],
    refused: Refuse,
) -> None:
    checkpoint, _ = emitted("qwen3")
    refused(onecard("verify", baby("llama4-text"), checkpoint, *texts[2:]), checkpoint, baby("llama4-text"))
    # Scout and Maverick: one family, with the same number of blocks and the same width.
    checkpoint, _ = emitted("scout")
    refused(onecard("verify", baby("maverick"), checkpoint, *texts[2:]), checkpoint, baby("maverick"))


def test_generate_refuses_a_picture_that_is_not_there(
    baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path, refused: Refuse
) -> None:
    picture = tmp_path / "cat.png"
    refused(onecard("generate", baby("scout"), "what?", "--image", picture), picture)
    picture.write_bytes(b"no picture")
    refused(onecard("generate", baby("scout"), "what?", "--image", picture), picture)
    refused(onecard("generate", baby("qwen3"), "what?", "--image", picture), "vision")


def test_a_mistyped_path_is_no_hub_id(onecard: Callable[..., Result], refused: Refuse, tmp_path: Path) -> None:
    """models/nosuch looks like a hub id, but the folder models exists here: the path is mistyped."""
    (tmp_path / "models").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for verb in ("plan", "inspect", "export"):
            more = ("--format", "bf16", "-o", "out") if verb == "export" else ()
            refused(onecard(verb, "models/nosuch", *more), "models", "nosuch", "mistyped")
