"""`inspect`: the facts of an original and of a checkpoint, and known faults of published config.json files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file

from command_line import FAMILIES, one_line
from onecard.models.families import load_adapter

# --- inspect


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_an_original(onecard: Callable[..., Result], baby: Callable[..., Path], family: str) -> None:
    result = onecard("inspect", baby(family))
    facts = one_line(result)
    size = os.stat(baby(family) / "model.safetensors").st_size
    tensors = load_file(baby(family) / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    llama = family != "qwen3"
    expected = {
        "family": "llama4" if llama else "qwen3_moe",
        "blocks": 2,
        "experts": 8,
        "experts_per_token": 1 if llama else 2,
        "moe_blocks": {"maverick": 1, "qwen3": 1}.get(family, 2),
        "hidden_size": 64,
        "vocab_size": 256,
        "vision": family in ("scout", "maverick"),
        "quantized": False,
        "parameters": parameters,
        "file_bytes": size,
        "shards": 1,
        "bits_per_weight": size * 8 / parameters,
        "config_faults": [],
    }
    assert {key: facts[key] for key in expected} == expected
    assert sum(role["parameters"] for role in facts["roles"].values()) == parameters
    assert {width for role in facts["roles"].values() for width in role["widths"]} == {"BF16"}
    assert f"{parameters:,}" in result.stderr


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_inspect_a_quantized_checkpoint(
    onecard: Callable[..., Result], baby: Callable[..., Path], emitted: Callable[..., tuple[Path, Result]], family: str
) -> None:
    """Invariant 2 as a user sees it: every expert in int4, nothing else."""
    out, _ = emitted(family)
    before, facts = one_line(onecard("inspect", baby(family))), one_line(onecard("inspect", out))
    assert facts["quantized"]
    assert facts["parameters"] == before["parameters"]
    assert facts["file_bytes"] == sum(os.stat(path).st_size for path in out.glob("*.safetensors"))
    low = {"expert", "shared_expert", "mlp"}
    for role, entry in facts["roles"].items():
        assert entry["widths"] == {"int4 group 32" if role in low else "BF16": before["roles"][role]["parameters"]}


# --- published faults of config.json


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "rope scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "factor 16",
    ),
    "rope parameters": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
        "factor 16",
    ),
    "eps": ({"rms_norm_eps": 1e-6}, "1e-05"),
    "layers": ({"num_hidden_layers": 80}, "48"),
    "hidden size": ({"hidden_size": 8192}, "5120"),
    "heads": ({"num_attention_heads": 64}, "40"),
    "active experts": ({"num_experts_per_tok": 2}, "1"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["text", "multimodal"])
@pytest.mark.parametrize("kind", FAULTS)
def test_published_faults_are_known(baby: Callable[..., Path], kind: str, nested: bool) -> None:
    """A raw config.json with one fault, at the top level or under text_config. The message states the correct value."""
    adapter = load_adapter(baby("scout" if nested else "llama4-text"))
    sound = {
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 48,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    }
    change, true = FAULTS[kind]
    faulty = {k: v for k, v in sound.items() if k != "rope_scaling" or "rope_parameters" not in change} | change
    assert adapter.faults({"text_config": sound} if nested else sound) == []
    (found,) = adapter.faults({"text_config": faulty} if nested else faulty)
    key = next(iter(change))
    assert key in found or "rope" in found
    assert true in found


def test_every_fault_is_told_at_once(baby: Callable[..., Path]) -> None:
    changes: dict[str, Any] = {}
    for kind, (change, _) in FAULTS.items():
        changes |= change if kind != "rope parameters" else {}
    assert len(load_adapter(baby("llama4-text")).faults(changes)) == len(FAULTS) - 1


def test_qwen_has_no_faults_of_llama(baby: Callable[..., Path]) -> None:
    """Qwen3's eps is 1e-6, and rightly so."""
    assert load_adapter(baby("qwen3")).faults({"rms_norm_eps": 1e-6, "num_hidden_layers": 80}) == []


def test_inspect_plan_and_quantize_warn_of_faults(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """A fault gives a warning and is not repaired: the walk follows the user's file."""
    model = copied("scout")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    config["text_config"]["rope_parameters"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    (model / "config.json").write_text(json.dumps(config))
    inspected = onecard("inspect", model)
    faults = one_line(inspected)["config_faults"]
    assert len(faults) == 2
    use = recipe(method="rtn")
    planned = onecard("plan", model, "--recipe", use)
    made = onecard("quantize", model, tmp_path / "out", "--recipe", use, *texts)
    for result in (inspected, planned, made):
        assert result.exit_code == 0
        assert "rms_norm_eps is 1e-06" in result.stderr
        assert "high_freq_factor 4" in result.stderr
    *told, few = json.loads((tmp_path / "out" / "onecard.json").read_text())["warnings"]
    assert told == faults
    assert few.startswith("6 evaluation documents")
