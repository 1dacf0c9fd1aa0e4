"""Shell completion: verbs, options and values, without torch; one round trip through a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import onecard
from onecard.cli import main
from onecard.conversion.export import FORMATS
from onecard.conversion.names import FORMAT_NAMES
from onecard.core.shipped_recipes import recipe_names
from onecard.planner.cards import CARDS

PACKAGE = Path(onecard.__file__).parent


def completed(*words: str) -> list[str]:
    """What Tab gives for the last of the words."""
    *before, incomplete = words
    found = ShellComplete(main, {}, "onecard", "_ONECARD_COMPLETE").get_completions(before, incomplete)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


def test_verbs_and_options() -> None:
    assert "quantize" in completed("q")
    assert "--recipe" in completed("quantize", "demo", "out", "--re")
    assert completed("calibration", "sh") == ["show"]


@pytest.mark.parametrize("verb", ["quantize", "plan", "pareto", "verify", "calibration show", "calibration coverage"])
def test_shipped_recipes(verb: str) -> None:
    assert completed(*verb.split(), "--recipe", "llama4-scout-h1") == [
        "llama4-scout-h100",
        "llama4-scout-h100-fit",
        "llama4-scout-h100-int4-attention",
    ]


def test_recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("mine.yaml", "mine.txt", "other.yml", "sub/deep.yaml"):
        (tmp_path / name).touch()
    assert completed("quantize", "--recipe", "") == [*recipe_names(), "mine.yaml", "other.yml"]
    assert completed("quantize", "--recipe", "mi") == ["mine.yaml"]
    assert completed("quantize", "--recipe", "sub/") == ["sub/deep.yaml"]
    assert completed("quantize", "--recipe", f"{tmp_path}/sub/d") == [f"{tmp_path}/sub/deep.yaml"]
    assert completed("quantize", "--recipe", "su") == ["<file>"]
    assert completed("quantize", "--recipe", "none/x") == ["<file>"]


def test_cards() -> None:
    assert completed("plan", "demo", "--gpu", "") == [card.key for card in CARDS]
    assert completed("plan", "demo", "--gpu", "h100") == ["h100-80gb", "h100-nvl"]
    assert completed("plan", "demo", "--gpu", "2xl") == ["2xl40s"]


def test_formats_engines_and_devices() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES
    assert completed("export", "x", "--format", "gptq") == ["gptq", "gptq-v2"]
    assert completed("plan", "demo", "--engine", "") == ["vllm", "transformers", "llama.cpp"]
    assert completed("check", "x", "--engine", "g") == ["gptqmodel"]
    assert completed("plan", "demo", "--kv-dtype", "f") == ["fp8"]
    assert completed("quantize", "--device", "c") == ["cpu", "cuda"]


def test_models_are_folders_or_the_demo() -> None:
    assert completed("inspect", "de") == ["<dir>", "demo"]
    assert completed("inspect", "./") == ["<dir>"]
    assert completed("completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_ONECARD_COMPLETE={shell}_complete" in result.stdout


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom click.shell_completion import ShellComplete\nfrom onecard.cli import main\n"
        "complete = ShellComplete(main, {}, 'onecard', '_ONECARD_COMPLETE').get_completions\n"
        "options = ['quantize', '--recipe'], ['plan', '--gpu'], ['export', '--format'], ['plan', '--engine'], []\n"
        "for words in options:\n"
        "    assert complete(words, ''), words\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_card(tmp_path: Path) -> None:
    command = tmp_path / "onecard"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from onecard.cli import main; main(prog_name=\'onecard\')" "$@"\n'
    )
    command.chmod(0o755)
    script = """
source <(onecard completion bash)
COMP_WORDS=(onecard plan demo --gpu h100) COMP_CWORD=4
complete -p onecard | grep -q _onecard_completion
_onecard_completion onecard h100 --gpu
printf '%s\\n' "${COMPREPLY[@]}"
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["h100-80gb", "h100-nvl"]
