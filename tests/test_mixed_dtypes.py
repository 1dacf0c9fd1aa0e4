"""Stored dtypes that differ inside one site: plan and run give its scales one dtype, and no weight is rounded first."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import babies
from inputs import write_tokenizer
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import open_model
from onecard.planner.candidates import entries_of, recipe_candidate
from onecard.recipe import load_recipe
from walking import cpu_walk

MIXED = "model.layers.0.mlp.experts.3."


def with_dtypes(model: Path, *kinds: torch.dtype) -> Path:
    """Stores the matrices of one expert in these dtypes, in values that bf16 does not hold."""
    tensors = load_file(model / "model.safetensors")
    for number, name in enumerate(sorted(name for name in tensors if name.startswith(MIXED))):
        tensors[name] = (tensors[name].float() * (1 + 2**-10)).to(kinds[number % len(kinds)])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("kinds", "keys"),
    [
        ((torch.float16,), {"method": "rtn"}),
        ((torch.float16,), {"method": "balanced", "compute_dtype": "bfloat16"}),
        ((torch.float32, torch.bfloat16), {"method": "rtn"}),
    ],
    ids=["fp16", "fp16 in a bf16 walk", "fp32"],
)
def test_what_was_planned_is_emitted_whatever_the_dtypes(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    kinds: tuple[torch.dtype, ...],
    keys: dict[str, str],
) -> None:
    model = with_dtypes(copied("qwen3"), *kinds)
    chosen, out = recipe(**keys), tmp_path / "out"
    result = onecard("quantize", model, out, "--recipe", chosen, *texts)
    assert result.exit_code == 0, result.stderr
    plan = json.loads((out / "onecard.json").read_text())["plan"]
    assert plan["emitted_bytes"] == sum(path.stat().st_size for path in babies.shard_files(out))
    emitted = {name: t for shard in babies.shard_files(out) for name, t in load_file(shard).items()}
    scales = {t.dtype for name, t in emitted.items() if ".experts." in name and name.endswith("weight_scale")}
    assert scales == {torch.bfloat16}
    assert onecard("check", out).exit_code == 0
    opened, loaded = open_model(str(model)), load_recipe(str(chosen))
    candidate = recipe_candidate(opened, entries_of(opened), loaded)
    assert sum(width.bytes for width in candidate.widths) == plan_for(opened, loaded).weight_bytes


def test_a_format_that_quantizes_by_itself_gets_one_dtype(
    onecard: Callable[..., Result], recipe: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    """NF4's quant state names the dtype, so its length follows from it."""
    config = babies.qwen3_config(2)
    config.moe_intermediate_size, config.intermediate_size = 64, 192
    weights = babies.published("qwen3", AutoModelForCausalLM.from_config(config).state_dict())
    model = babies.save(tmp_path / "model", config, weights)
    write_tokenizer(model)
    with_dtypes(model, torch.float16, torch.float32, torch.bfloat16)
    use = recipe(method="bnb-nf4", group_size=64)
    result = onecard("quantize", model, tmp_path / "out", "--recipe", use, *texts)
    assert result.exit_code == 0, result.stderr
    emitted = {name: t for shard in babies.shard_files(tmp_path / "out") for name, t in load_file(shard).items()}
    states = [bytes(t.tolist()) for name, t in emitted.items() if ".experts." in name and "quant_state" in name]
    assert {json.loads(state)["dtype"] for state in states} == {"bfloat16"}


def test_a_walk_keeps_every_experts_values(copied: Callable[..., Path]) -> None:
    """Experts that are stored in several dtypes are held in the walk's own."""
    model = open_model(str(with_dtypes(copied("qwen3"), torch.float16)))
    walk = cpu_walk(model)
    block = walk.load(0)
    for name in (f"{MIXED}{leaf}_proj" for leaf in ("gate", "up", "down")):
        assert torch.equal(block.weight(name), walk.read(f"{name}.weight").float())
