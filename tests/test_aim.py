"""Routers and kept attention stay in the source's dtype, and are aimed at the reference stream."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from onecard.models.families import load_adapter


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def quantized(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> Callable[..., tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[str], dict[str, float]]]:
    """(family, recipe keys) -> source tensors, emitted tensors, names of what was aimed, the record's KL."""

    def go(family: str, **keys: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[str], dict]:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        result = onecard("quantize", baby(family), out, "--recipe", recipe(**keys), *texts)
        assert result.exit_code == 0, result.stderr
        record = json.loads((out / "onecard.json").read_text())
        aimed = {f"{module}.weight" for block in record["blocks"] for module in block["aimed"]}
        return tensors(baby(family)), tensors(out), aimed, record["kl"]

    return go


@pytest.mark.parametrize("family", ["maverick", "qwen3", "deepseek", "mixtral"])
def test_routers_and_kept_attention_are_aimed_and_nothing_else(
    family: str, baby: Callable[..., Path], quantized: Callable[..., tuple]
) -> None:
    source, out, aimed, _ = quantized(family)
    role = load_adapter(baby(family)).role
    wanted = {name for name in source if role(name).value in ("router", "attention") and name.endswith(".weight")}
    changed = {name for name in source if name in out and not torch.equal(source[name], out[name])}
    assert changed == aimed
    # Nothing is to be made good before the first quantized weight: attention of block 0, and the router after it.
    first = {name for name in wanted if ".layers.0." in name}
    assert wanted - first <= aimed <= wanted
    assert all(out[name].dtype == source[name].dtype and out[name].shape == source[name].shape for name in aimed)


def test_aim_kept_false_leaves_every_byte(quantized: Callable[..., tuple]) -> None:
    source, out, aimed, _ = quantized("qwen3", aim_kept=False)
    assert not aimed
    assert all(torch.equal(source[name], out[name]) for name in source if name in out)


def test_keep_modules_are_not_aimed_either(quantized: Callable[..., tuple]) -> None:
    source, out, aimed, _ = quantized(
        "qwen3", keep_modules=["*.layers.1.*"], quantize_roles=["expert", "mlp", "attention"]
    )
    assert aimed
    assert not [name for name in aimed if ".layers.1." in name]
    same = [name for name in source if ".layers.1." in name and name in out]
    assert same
    assert all(torch.equal(source[name], out[name]) for name in same)


def test_with_little_to_make_good_little_is_moved(quantized: Callable[..., tuple]) -> None:
    """With eight bits the quantized stream almost equals the reference's, so routers hardly move."""
    shifts = []
    for bits in (8, 4):
        source, out, aimed, _ = quantized("scout", bits=bits)
        assert aimed
        shifts.append(sum(float((out[n].float() - source[n].float()).norm() / source[n].float().norm()) for n in aimed))
    assert shifts[0] < 0.3 * shifts[1]
