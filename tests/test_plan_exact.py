"""`plan` states the bytes of every file and tensor before a weight is read, and `quantize` writes exactly those."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command_line import FAMILIES, one_line
from onecard import forecast
from onecard.checkpoint.model import open_model
from onecard.checkpoint.source import Folder, open_folder
from onecard.checkpoint.stored_widths import stored_widths
from onecard.models.families import load_adapter
from onecard.recipe import load_recipe


def test_plan_shows_the_note_of_a_recipe(
    onecard: Callable[..., Result], baby: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    result = onecard("plan", baby("llama4-text"), "--recipe", recipe(note="needs the newest engine"))
    assert one_line(result)["recipe"] == "test"
    assert "needs the newest engine" in result.stderr


PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"quantize_roles": ["expert", "shared_expert", "mlp", "attention"], "max_shard_bytes": 20_000},
    "int8 asymmetric": {"bits": 8, "symmetric": False},
    "int4 asymmetric": {"symmetric": False, "group_size": 16},
    "kept": {"keep_modules": ["*.layers.0.*"]},
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "default") for family in FAMILIES),
        *(("qwen3", kind) for kind in PLANS if kind != "default"),
        ("scout", "attention"),
        *((family, kind) for family in ("deepseek", "mixtral") for kind in ("default", "attention")),
    ],
)
def test_plan_is_exact_before_a_weight_is_read(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: str,
) -> None:
    """Invariant 3: bytes of every file and tensor, as os.stat and the safetensors library see them afterwards."""
    use, out = recipe(method="rtn", **PLANS[kind]), tmp_path / "out"

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "get", never)
        promised = one_line(onecard("plan", baby(family), "--recipe", use))
        listed = onecard("plan", baby(family), "--recipe", use, "--tensors").stderr
        plan = forecast.plan(str(baby(family)), load_recipe(str(use))).plan
    line = one_line(onecard("quantize", baby(family), out, "--recipe", use, *texts))
    sizes = {path.name: os.stat(path).st_size for path in out.glob("*.safetensors")}
    assert {shard.file: shard.file_bytes for shard in plan.shards} == sizes
    assert promised["emitted_bytes"] == line["emitted_bytes"] == sum(sizes.values())
    assert promised["shards"] == len(sizes)
    stored = {}
    for name in sizes:
        with safe_open(out / name, framework="pt") as file:
            stored |= {key: (name, file.get_tensor(key).nbytes) for key in file.keys()}  # noqa: SIM118
    assert {tensor.name: (shard.file, tensor.nbytes) for shard, tensor in plan.tensors()} == stored
    assert sum(promised["role_bytes"].values()) == sum(nbytes for _, nbytes in stored.values())
    found = stored_widths(open_model(str(out)))
    assert {(w.role, w.width): w for w in found} == {(w.role, w.width): w for w in plan.widths}
    assert promised["widths"] == [asdict(width) for width in plan.widths]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: file for tensor, (file, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(nbytes for _, nbytes in stored.values())
    parameters = sum(torch.Size(shape).numel() for shape in load_adapter(baby(family)).expected().values())
    assert promised["parameters"] == parameters
    assert line["bits_per_weight"] == promised["bits_per_weight"] == sum(sizes.values()) * 8 / parameters
    squeezed = "".join(listed.split())
    assert all(tensor.split(".")[-1] in squeezed for tensor in stored)
    check_kept_tensors(baby(family), out)


def check_kept_tensors(source: Path, out: Path) -> None:
    """Invariant 5: unquantized tensors are byte-identical, dtype included, except that Llama 4's stored experts are
    split. Tensors that the record lists as aimed keep dtype and shape and stay near their old values."""
    before = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    after = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    kept = {name for name in before if name in after}
    roles = load_adapter(source).role
    must = {name for name in before if roles(name).value in ("router", "norm", "embedding", "head", "vision")}
    assert must <= kept
    blocks = json.loads((out / "onecard.json").read_text())["blocks"]
    aimed = {f"{module}.weight" for block in blocks for module in block["aimed"]}
    assert {roles(name).value for name in aimed} <= {"router", "attention"}
    for name in kept:
        assert before[name].dtype == after[name].dtype
        if name in aimed:
            gone = (before[name].float() - after[name].float()).norm() / before[name].float().norm()
            assert 0 < gone < 0.5, (name, float(gone))
            continue
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_plan_of_a_tied_head(
    onecard: Callable[..., Result],
    copied: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """With tied embeddings neither the source nor OUT stores a head, and the walk still finds one."""
    model = copied("qwen3")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    use = recipe(method="rtn")
    promised = one_line(onecard("plan", model, "--recipe", use))
    line = one_line(onecard("quantize", model, tmp_path / "out", "--recipe", use, *texts))
    sizes = [os.stat(path).st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert promised["emitted_bytes"] == line["emitted_bytes"] == sum(sizes)
    assert "lm_head.weight" not in open_folder(tmp_path / "out").names
