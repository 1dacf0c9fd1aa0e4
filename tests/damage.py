"""Damage done to an emitted checkpoint: tensors changed or dropped, with SHA256SUMS made anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from babies import edit_json
from command_line import run_onecard
from papers import resum

EXPERT = "language_model.model.layers.1.feed_forward.experts.3.down_proj"
Tensors = dict[str, torch.Tensor]


def holder(folder: Path, tensor: str) -> Path:
    """The file of a tensor: a shard, or the one file of a folder without an index."""
    if not (folder / "model.safetensors.index.json").exists():
        return folder / "model.safetensors"
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


def damaged(folder: Path, *needles: str, only: bool = True) -> dict[str, Any]:
    """`check` ends with exit code 1, one JSON line and one message; every needle is in a problem of its own. Gives the
    line. With `only`, there are no problems but these."""
    result = run_onecard("check", folder)
    assert result.exit_code == 1, result.output + repr(result.exception)
    line: dict[str, Any] = json.loads(result.stdout)
    assert line["sound"] is False
    assert result.stderr.count("error: ") == 1
    for needle in needles:
        assert any(needle in problem for problem in line["problems"]), (needle, line["problems"])
        assert needle in result.stderr
    assert not only or len(line["problems"]) == len(needles), line["problems"]
    return line
