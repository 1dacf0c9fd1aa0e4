"""What can be refused from a name or a config.json alone is refused before torch is loaded, by every verb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onecard

RUN = """
import sys
from click.testing import CliRunner
from onecard.cli import main
for words in {commands!r}:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, (words, result.exit_code, result.output)
    assert {needle!r} in result.stderr, (words, result.stderr)
    assert not {{'torch', 'transformers'}} & set(sys.modules), words
"""


def refused(needle: str, *commands: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(onecard.__file__).parent.parent)}
    code = RUN.format(commands=commands, needle=needle)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def verbs(model: Path) -> list[list[str]]:
    """Every verb that opens a model, with `model` in each place."""
    name = str(model)
    return [
        ["inspect", name],
        ["generate", name, "hello"],
        ["plan", name],
        ["plan", name, "--recipe", "demo", "--gpu", "h200"],
        ["quantize", name, "out", "--recipe", "demo"],
        ["pareto", name, "--recipe", "demo-fit"],
        ["verify", name, "demo"],
        ["verify", "demo", name],
        ["flips", name, "demo"],
        ["flips", "demo", name],
        ["export", name, "--format", "gptq", "-o", "out"],
        ["calibration", "show", name, "--recipe", "demo"],
        ["calibration", "coverage", name, "--recipe", "demo"],
        ["calibration", "synthesize", name, "out.jsonl", "--recipe", "demo"],
    ]


def test_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_mo"}))
    refused("has the unknown model type 'qwen3_mo'; onecard knows deepseek_v3, llama4,", *verbs(tmp_path))


def test_code_of_an_unknown_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    refused("wants remote code (auto_map: AutoConfig)", ["inspect", str(tmp_path)])


def test_a_missing_folder(tmp_path: Path) -> None:
    refused("is no folder and no hub id", *verbs(tmp_path / "none"))


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    refused("is a file: name the folder that holds it", *verbs(tmp_path / "model.gguf"))


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused("has no config.json", *verbs(tmp_path))


def test_a_recipe_a_card_and_a_format_that_do_not_exist(tmp_path: Path) -> None:
    refused(
        "there is no recipe 'demmo'",
        ["quantize", "demo", "out", "--recipe", "demmo"],
        ["plan", "demo", "--recipe", "demmo"],
        ["pareto", "demo", "--recipe", "demmo"],
        ["verify", "demo", "demo", "--recipe", "demmo"],
        ["calibration", "show", "--recipe", "demmo"],
        ["recipes", "demmo"],
    )
    refused("the card 'h1000' is none of", ["plan", "demo", "--gpu", "h1000"])
    refused("the format 'zip' is not known", ["export", "demo", "--format", "zip", "-o", "out"])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: wrong\ndescription: a key that is none\nbitts: 4\n")
    refused("bitts: unknown key", ["quantize", "demo", "out", "--recipe", str(wrong)])
