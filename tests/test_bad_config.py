"""Configs and tokenizers that cannot be used, and code that must never run."""

import json
import os
import pickle
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, Llama4TextConfig

from babies import edit_json
from command_line import Refuse
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row
from onecard.models.llama4 import NO_CHUNK
from walking import relative, walk_logits, whole_logits

# --- config.json


def test_unknown_model_type(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied()
    edit_json(model / "config.json", lambda c: c.update(model_type="mamba"))
    refuse_model(model, "mamba", "deepseek_v3", "llama4", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("content", [None, "{", "[]", "null", b"\xff"])
def test_config_that_is_no_config(copied: Callable[..., Path], refuse_model: Refuse, content: str | bytes) -> None:
    model = copied()
    if content is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse_model(model, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": ["llama4"]},
        {"hidden_size": "many"},
        {"hidden_act": "nonsense"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": -1},
        {"num_local_experts": 0},
        {"num_experts_per_tok": 99},
        {"vocab_size": -5},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"quantization_config": []},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"auto_map": 5},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_config_with_a_senseless_value(
    copied: Callable[..., Path], refuse_model: Refuse, changes: dict[str, Any]
) -> None:
    model = copied()
    edit_json(model / "config.json", lambda c: c.update(changes))
    refuse_model(model, model)


# --- code that must never run


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_named_and_never_unpickled(
    copied: Callable[..., Path], refuse_model: Refuse, tmp_path: Path
) -> None:
    model = copied()
    shutil.rmtree(tmp_path / "mark", ignore_errors=True)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    torch.save(Evil(tmp_path / "mark"), model / "consolidated.00.pth")
    refuse_model(model, "pytorch_model.bin", "consolidated.00.pth", "safetensors")
    assert not (tmp_path / "mark").exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())  # the trap was a real one
    assert (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_left_alone(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model = copied()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    result = onecard("quantize", model, tmp_path / "out", "--recipe", recipe(method="rtn"), *texts)
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.fixture
def evil_code(tmp_path: Path) -> Iterator[str]:
    """Python code that leaves a mark when imported. Afterwards the fixture proves that it would have, and did not."""
    code = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass EvilConfig: pass\nclass EvilTokenizer: pass\n"
    yield code
    assert not (tmp_path / "mark").exists()
    (tmp_path / "evil.py").write_text(code)
    runpy.run_path(str(tmp_path / "evil.py"))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("model_type", ["llama4_text", "evil"])
def test_remote_code_of_the_model_is_never_run(
    copied: Callable[..., Path], refuse_model: Refuse, evil_code: str, model_type: str
) -> None:
    model = copied()
    (model / "modeling_evil.py").write_text(evil_code)
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    edit_json(model / "config.json", lambda c: c.update(model_type=model_type, auto_map=auto_map))
    refuse_model(model, "auto_map", "AutoConfig", "AutoModelForCausalLM", "remote code")


def test_remote_code_of_the_tokenizer_is_never_run(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    evil_code: str,
    tmp_path: Path,
    refused: Refuse,
) -> None:
    """The model is refused, or its plain tokenizer.json is used instead. The code neither runs nor is copied to OUT."""
    model = copied()
    (model / "tokenization_evil.py").write_text(evil_code)
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    edit_json(model / "tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer", auto_map=auto_map))
    result = onecard("quantize", model, tmp_path / "out", "--recipe", recipe(method="rtn"), *texts)
    if result.exit_code:
        refused(result, model)
    assert not list(tmp_path.glob("out/*.py"))


# --- values that a family cannot have, and published ones that transformers refuses by now


@pytest.mark.parametrize("written", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_in_a_config(
    copied: Callable[..., Path], refuse_model: Refuse, written: str
) -> None:
    """Python reads them, and no other JSON reader does: an emitted config.json could not hold them."""
    model = copied()
    config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": "here"}
    (model / "config.json").write_text(json.dumps(config).replace('"here"', written))
    refuse_model(model, "config.json", "rms_norm_eps is")


@pytest.mark.parametrize(
    ("key", "value"), [("attention_chunk_size", 0), ("num_experts_per_tok", 0), ("hidden_size", 0), ("head_dim", -8)]
)
def test_sizes_that_are_none(copied: Callable[..., Path], refuse_model: Refuse, key: str, value: int) -> None:
    model = copied()
    edit_json(model / "config.json", lambda c: c.get("text_config", c).update({key: value}))
    refuse_model(model, model / "config.json", key)


def test_early_scout_configs_are_read_warned_of_and_mended(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """transformers 4.51 wrote attn_temperature_tuning as the number 4, which transformers 5 refuses."""
    model = Path(shutil.copytree(baby("scout"), tmp_path / "early"))
    edit_json(model / "config.json", lambda c: c["text_config"].update(attn_temperature_tuning=4))
    assert onecard("generate", model, "hello", "--max-new-tokens", "1").exit_code == 0
    inspected = onecard("inspect", model)
    assert inspected.exit_code == 0, inspected.stderr
    assert any("attn_temperature_tuning is 4" in fault for fault in json.loads(inspected.stdout)["config_faults"])
    same = {}
    for name, folder in (("early", model), ("plain", baby("scout"))):
        done = onecard(
            "quantize",
            folder,
            tmp_path / name / "out" if name == "plain" else tmp_path / "early-out",
            "--recipe",
            recipe(method="rtn"),
            *texts,
        )
        assert done.exit_code == 0, done.stderr
        same[name] = json.loads(done.stdout)["kl_mean_nats"]
        assert ("attn_temperature_tuning" in done.stderr) == (name == "early")
    assert same["early"] == same["plain"]
    assert (
        json.loads((tmp_path / "early-out" / "config.json").read_text())["text_config"]["attn_temperature_tuning"]
        is True
    )
    assert onecard("generate", tmp_path / "early-out", "hello", "--max-new-tokens", "1").exit_code == 0


# --- tokenizers


def test_tokenizer_that_is_missing_or_damaged(copied: Callable[..., Path], refuse: Refuse) -> None:
    model = copied()
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    refuse(model, model, "tokenizer")
    for path in model.glob("tokenizer*"):
        path.unlink()
    refuse(model, model, "tokenizer")


def test_tokenizer_of_another_model(copied: Callable[..., Path], refuse: Refuse) -> None:
    model = copied()

    def shift(tokenizer: Any) -> None:
        tokenizer["model"]["vocab"]["a"] = 4000

    edit_json(model / "tokenizer.json", shift)
    refuse(model, model, "tokenizer", "ids up to 4,000", "256 rows")


def test_a_contradiction_in_the_attention_is_told_when_the_model_is_opened(
    copied: Callable[..., Path], refuse_model: Refuse
) -> None:
    """Half of a head rotates, and Qwen3's layer rotates all of it."""
    model = copied("qwen3")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    edit_json(model / "config.json", lambda c: c.update(rope_parameters=rope))
    refuse_model(model, "is not a valid qwen3_moe config", "RuntimeError", "broadcast")


def test_a_contradiction_in_the_vision_tower_is_told_when_the_model_is_opened(
    copied: Callable[..., Path], refuse_model: Refuse
) -> None:
    model = copied("scout")
    edit_json(model / "config.json", lambda c: c["vision_config"].update(pixel_shuffle_ratio=0.25))
    refuse_model(model, "is not a valid llama4 config")


def test_another_activation_is_refused_with_the_reason(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied("mixtral")
    edit_json(model / "config.json", lambda c: c.update(hidden_act="gelu"))
    refuse_model(model, "hidden_act is 'gelu', and onecard computes with 'silu' alone")


def test_settings_of_single_layers_are_refused(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied("qwen3")
    edit_json(model / "config.json", lambda c: c.update(per_layer_config={"0": {"rms_norm_eps": 0.1}}))
    refuse_model(model, "per_layer_config")


def test_no_attention_chunk_means_that_every_layer_sees_everything(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """transformers cannot run with null: read and emitted is a number that no text reaches."""
    model, out = copied("llama4-text"), tmp_path / "out"
    edit_json(model / "config.json", lambda c: c.update(attention_chunk_size=None))
    result = onecard("quantize", model, out, "--recipe", recipe(method="rtn"), *texts)
    assert result.exit_code == 0, result.stderr
    assert "attention_chunk_size is null" in " ".join(result.stderr.split())
    config = json.loads((out / "config.json").read_text())
    assert config["attention_chunk_size"] == NO_CHUNK
    # The judge: transformers on the same weights, all layers with full attention.
    whole = AutoModelForCausalLM.from_pretrained(str(model), config=full_attention(model), dtype=torch.float32).eval()
    opened, row = open_model(str(model)), Row("x", "text", torch.arange(300) % 250)
    assert len(row.tokens) > config["max_position_embeddings"] > 8, (
        "longer than the baby's own chunk, and than it should"
    )
    (walked,) = walk_logits(opened.adapter, opened.source, [row])
    assert relative(walked, whole_logits(whole, row)) < 1e-5


def full_attention(model: Path) -> Any:
    """A config without chunked layers; its chunk is of no account."""
    raw = json.loads((model / "config.json").read_text())
    return Llama4TextConfig(**raw | {"layer_types": ["full_attention"] * 2, "attention_chunk_size": 8})
