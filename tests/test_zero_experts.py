"""A pruned model has experts of zeros: `check` knows those of the source, and takes no others for faithful."""

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from babies import edit_json
from damage import damaged, edit
from onecard.checkpoint.model import open_model
from onecard.checkpoint.source import open_folder
from onecard.checkpoint.source_checks import refuse_nonfinite, zero_matrices
from papers import resum

PRUNED = {
    "scout": ("language_model.model.layers.0.feed_forward.experts", 5),
    "qwen3": ("model.layers.0.mlp.experts", 5),
    "mixtral": ("model.layers.1.block_sparse_moe.experts", 2),
}


def prune(model: Path, family: str) -> list[str]:
    """Sets an expert of a baby to zero. Gives the canonical names of its matrices."""
    stem, expert = PRUNED[family]
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(f"{stem}.{expert}."):
            tensor.zero_()
        elif name.startswith(stem) and tensor.dim() == 3:
            tensor[expert].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    leaves = ("w1", "w2", "w3") if family == "mixtral" else ("down_proj", "gate_proj", "up_proj")
    return [f"{stem}.{expert}.{leaf}.weight" for leaf in leaves]


@pytest.mark.parametrize("family", PRUNED)
@pytest.mark.parametrize("method", ["rtn", "balanced"])
def test_a_pruned_expert_is_sound_and_another_zero_is_not(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    family: str,
    method: str,
) -> None:
    model, out = copied(family), tmp_path / "out"
    names = prune(model, family)
    result = onecard("quantize", model, out, "--recipe", recipe(method=method), *texts)
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "onecard.json").read_text())["model"]["zero_matrices"] == names
    result = onecard("check", out)
    assert (result.exit_code, json.loads(result.stdout)["not_checked"]) == (0, []), result.output
    other = names[0].replace(f".{PRUNED[family][1]}.", ".3.").removesuffix(".weight")
    codes = f"{other}.weight_packed"
    edit(out, codes, lambda tensors: tensors[codes].fill_(struct.unpack("<i", b"\x88" * 4)[0]))
    damaged(out, f"{other} is all zeros")


@pytest.mark.parametrize("format_name", ["bf16", "gptq"])
def test_a_pruned_expert_stays_sound_in_another_format(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    format_name: str,
) -> None:
    """bf16 fuses the experts again, so a slice of a stack is zero."""
    model = copied("scout")
    prune(model, "scout")
    assert onecard("quantize", model, tmp_path / "int4", "--recipe", recipe(method="rtn"), *texts).exit_code == 0
    result = onecard("export", tmp_path / "int4", "--format", format_name, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    result = onecard("check", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert not [what for what in json.loads(result.stdout)["not_checked"] if what.startswith("zeros")]


def test_an_older_record_does_not_know_and_check_says_so(folder: Path, onecard: Callable[..., Result]) -> None:
    name = "language_model.model.layers.1.feed_forward.experts.3.down_proj"
    codes = f"{name}.weight_packed"
    edit(folder, codes, lambda tensors: tensors[codes].fill_(struct.unpack("<i", b"\x88" * 4)[0]))
    damaged(folder, f"{name} is all zeros")
    edit_json(folder / "onecard.json", lambda record: record["model"].pop("zero_matrices"))
    resum(folder)
    result = onecard("check", folder)
    assert result.exit_code == 0
    (said,) = json.loads(result.stdout)["not_checked"]
    assert said.startswith(f"zeros: {name} is all zeros")
    assert "onecard verify" in said


@pytest.mark.parametrize("half", ["gate_proj", "up_proj", None])
def test_half_of_a_fused_expert_is_found_too(copied: Callable[..., Path], half: str | None) -> None:
    """Gate and up lie side by side in one tensor; a single value that is not zero counts."""
    path = copied("scout")
    stem = "language_model.model.layers.1.feed_forward.experts"
    tensors = load_file(path / "model.safetensors")
    both = tensors[f"{stem}.gate_up_proj"][4]
    width = both.shape[1] // 2
    cut = both[:, :width] if half == "gate_proj" else both[:, width:]
    cut.zero_()
    if half is None:
        cut[3, 3] = torch.finfo(cut.dtype).tiny
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = open_model(str(path))
    found = zero_matrices(model.adapter, model.source, refuse_nonfinite(model.folder, "m"))
    assert found == ([f"{stem}.4.{half}.weight"] if half else [])


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    half=st.sampled_from(
        ["first rows", "last rows", "first columns", "last columns", "even rows", "odd columns", "all"]
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn]),
    seed=st.integers(0, 99),
)
def test_no_half_of_zeros_escapes(shape: tuple[int, int, int], half: str, dtype: torch.dtype, seed: int) -> None:
    """However a fused tensor holds its two matrices, one that is zeros makes the tensor a suspect."""
    experts, rows, columns = shape[0], 2 * shape[1], 2 * shape[2]
    fused = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(-9, 9).to(dtype)
    cuts = {
        "first rows": (slice(shape[1]), slice(None)),
        "last rows": (slice(shape[1], None), slice(None)),
        "first columns": (slice(None), slice(shape[2])),
        "last columns": (slice(None), slice(shape[2], None)),
        "even rows": (slice(0, None, 2), slice(None)),
        "odd columns": (slice(None), slice(1, None, 2)),
        "all": (slice(None), slice(None)),
    }
    fused[(seed % experts, *cuts[half])] = 0
    with tempfile.TemporaryDirectory() as folder:
        save_file({"fused": fused}, Path(folder) / "model.safetensors")
        assert refuse_nonfinite(open_folder(Path(folder)), "m") == {"fused"}


def test_a_tensor_without_values_passes(tmp_path: Path) -> None:
    save_file({"none": torch.ones(0, 4), "narrow": torch.ones(3, 2, 0)}, tmp_path / "model.safetensors")
    refuse_nonfinite(open_folder(tmp_path), "m")
