"""What goes along with the weights belongs to what is emitted; what does not is named; an adapter is not overlooked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from transformers import AutoTokenizer

from command_line import Refuse
from damage import damaged
from onecard.checkpoint.checksums import SUMS_NAME, read_sums
from onecard.checkpoint.side_files import left_behind, refuse_adapter, side_files
from onecard.core.errors import InputError
from onecard.core.file_names import is_own_name

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8, "target_modules": ["q_proj"]}
# Leftovers that a loader would take for facts about what is emitted.
FOREIGN = {
    "hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}',
    "params.json": '{"dim": 64}',
    "consolidated.safetensors.index.json": '{"weight_map": {}}',
    "pytorch_model.bin.index.json": '{"weight_map": {}}',
    "requirements.txt": "torch",
    "modeling_baby.py": "print('run')",
    "notes.md": "mine",
}
OURS = {
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "added_tokens.json": "{}",
    "merges.txt": "a b",
    "vocab.json": "{}",
    "tokenizer.model": "x",
    "qwen.tiktoken": "x",
    "tekken.json": "{}",
    "NOTICE.txt": "of somebody",
    "USE_POLICY.md": "be good",
}


def put(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def run(
    onecard: Callable[..., Result], recipe: Callable[..., Path], texts: list[str], tmp_path: Path
) -> Callable[..., Result]:
    """`quantize MODEL OUT` by rtn; OUT is tmp_path / out."""
    return lambda model, *more: onecard(
        "quantize", model, tmp_path / "out", "--recipe", recipe(method="rtn"), *texts, *more
    )


def test_what_belongs_is_carried_and_the_rest_is_named(
    copied: Callable[..., Path], run: Callable[..., Result], onecard: Callable[..., Result], tmp_path: Path
) -> None:
    model, out = copied(), tmp_path / "out"
    put(model, FOREIGN | OURS)
    result = run(model)
    assert result.exit_code == 0, result.stderr
    assert {name: (out / name).read_text() for name in OURS} == OURS
    assert [name for name in FOREIGN if (out / name).exists()] == []
    (said,) = [w for w in json.loads((out / "onecard.json").read_text())["warnings"] if "left behind" in w]
    assert all(name in said for name in FOREIGN), said
    assert "left behind" in " ".join(result.stderr.split())
    assert onecard("check", out).exit_code == 0


def test_nothing_is_left_behind_of_an_ordinary_checkpoint(baby: Callable[..., Path], demo_model: Path) -> None:
    used = {"config.json", "model.safetensors"}
    assert left_behind(baby("llama4-text"), used) == []
    assert left_behind(demo_model, used) == []
    assert set(side_files(demo_model)) == {path.name for path in demo_model.iterdir()} - used


@pytest.fixture
def demo_model() -> Path:
    return Path(__file__).parents[1] / "demo" / "model"


def test_chat_templates_with_names_of_their_own_go_along(
    copied: Callable[..., Path],
    run: Callable[..., Result],
    onecard: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """In a folder of their own, where transformers looks for them; checked, exported and replaced like all files."""
    model, out = copied(), tmp_path / "out"
    put(model, {"additional_chat_templates/tools.jinja": "tools: {{ messages[0].content }}"})
    result = run(model)
    assert result.exit_code == 0, result.stderr
    assert "left behind" not in result.stderr
    name = "additional_chat_templates/tools.jinja"
    assert name in json.loads((out / "onecard.json").read_text())["files"]
    assert name in read_sums(out / SUMS_NAME)
    loaded: Any = AutoTokenizer.from_pretrained(out)
    said = loaded.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="tools", tokenize=False)
    assert said == "tools: hi"
    assert onecard("check", out).exit_code == 0
    exported = onecard("export", out, "--format", "bf16", "-o", tmp_path / "bf16")
    assert exported.exit_code == 0, exported.stderr
    assert (tmp_path / "bf16" / name).read_bytes() == (model / name).read_bytes()
    (out / name).write_text("spoilt")
    damaged(out, f"{name} has another digest")
    (model / name).unlink()
    assert run(model, "--overwrite").exit_code == 0
    assert not (out / name).parent.exists()


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("config.json", True),
        ("additional_chat_templates/a.jinja", True),
        ("a/b", False),
        ("additional_chat_templates/../config.json", False),
        ("additional_chat_templates/..", False),
        ("additional_chat_templates/", False),
        ("additional_chat_templates/additional_chat_templates/a", False),
        ("/etc/passwd", False),
        ("..", False),
        ("", False),
    ],
)
def test_a_name_in_papers_leads_nowhere_else(name: str, own: bool) -> None:
    assert is_own_name(name) is own


def test_overwrite_follows_no_link_out_of_the_folder(
    copied: Callable[..., Path], run: Callable[..., Result], tmp_path: Path
) -> None:
    model, out = copied(), tmp_path / "out"
    put(model, {"additional_chat_templates/tools.jinja": "x"})
    assert run(model).exit_code == 0
    (out / "additional_chat_templates" / "tools.jinja").unlink()
    (out / "additional_chat_templates").rmdir()
    put(tmp_path / "elsewhere", {"tools.jinja": "of somebody else"})
    (out / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (model / "additional_chat_templates" / "tools.jinja").unlink()
    run(model, "--overwrite")
    assert (tmp_path / "elsewhere" / "tools.jinja").read_text() == "of somebody else"


# --- adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_weights_is_refused_unless_told(tmp_path: Path, name: str) -> None:
    refuse_adapter(tmp_path, False)
    (tmp_path / name).write_text(json.dumps(ADAPTER))
    with pytest.raises(InputError, match=rf"{name}.*--without-adapter"):
        refuse_adapter(tmp_path, False)
    refuse_adapter(tmp_path, True)


def test_the_weights_alone_are_quantized_when_told(
    copied: Callable[..., Path],
    refuse_model: Refuse,
    refused: Refuse,
    run: Callable[..., Result],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model, out = copied(), tmp_path / "out"
    put(model, {"adapter_config.json": json.dumps(ADAPTER)})
    refused(run(model), "adapter_config.json", "merge", "--without-adapter")
    assert not out.exists()
    refused(onecard("export", model, "--format", "bf16", "-o", out), "adapter_config.json", "--without-adapter")
    result = run(model, "--without-adapter")
    assert result.exit_code == 0, result.stderr
    assert not (out / "adapter_config.json").exists()
    warnings = json.loads((out / "onecard.json").read_text())["warnings"]
    assert any("adapter_config.json lies beside" in warning for warning in warnings)
    put(out, {"adapter_config.json": json.dumps(ADAPTER)})
    result = onecard("verify", model, out, *texts[2:])
    assert result.exit_code == 0
    assert result.stderr.count("adapter_config.json lies beside") == 2, "of both sides"


def test_check_finds_an_adapter_that_belongs_to_nothing(folder: Path) -> None:
    put(folder, {"adapter_config.json": json.dumps(ADAPTER)})
    damaged(folder, "adapter_config.json is in the folder and belongs to nothing in it")
