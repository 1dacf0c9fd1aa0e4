"""The command line as a stranger meets it: help, exit codes, shipped recipes, and a process of its own."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from babies import make_baby
from command_line import PROMISED, one_line, strict
from onecard import cli
from onecard.checkpoint import inspect
from onecard.checkpoint.source import open_folder
from onecard.core import errors
from onecard.core.shipped_recipes import recipe_names
from onecard.recipe import load_recipe

VERBS = [
    "quantize",
    "verify",
    "flips",
    "gate",
    "baseline",
    "report",
    "check",
    "card",
    "publish",
    "plan",
    "inspect",
    "generate",
    "recipes",
    "calibration",
    "export",
    "pareto",
    "completion",
]
RECIPES = [
    "demo",
    "demo-fit",
    "llama4-scout-2x48gb",
    "llama4-scout-h100",
    "llama4-scout-h100-fit",
    "llama4-scout-h100-int4-attention",
    "llama4-scout-h200",
    "nf4",
    "qwen3-30b-a3b-24gb",
    "rtn-int4",
]


# --- help and exit codes


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_worked_example(onecard: Callable[..., Result], verb: str) -> None:
    """The command line accepts the example."""
    shown = onecard(verb, "--help").stdout
    assert onecard(verb, "-h").stdout == shown
    lines = shown.partition("Example")[2].replace("\\\n", " ").splitlines()
    example = next(line for line in lines if line.strip().startswith("onecard "))
    words = shlex.split(example.partition(">")[0])
    assert words[:2] == ["onecard", verb]
    context = cli.main.commands[verb].make_context(verb, words[2:])
    assert context.params


def test_main_help(onecard: Callable[..., Result]) -> None:
    shown = onecard("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {verb} " in shown.stdout for verb in VERBS)
    assert set(cli.main.commands) == set(VERBS)
    assert "onecard quantize demo" in shown.stdout
    assert onecard("--version").stdout.startswith("onecard, version ")


def test_exit_codes_are_documented() -> None:
    documented = (cli.__doc__ or "").partition("Exit codes:")[2]
    for error, word in ((errors.LimitError, "limit"), (errors.InputError, "input"), (errors.ResourceError, "disk")):
        (part,) = [part for part in documented.split(";") if part.split()[0] == str(error.exit_code)]
        assert word in part
    assert "130 " in documented
    assert [e.exit_code for e in (errors.LimitError, errors.InputError, errors.ResourceError)] == [1, 2, 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["quantize"],
        ["quantize", "a", "b"],
        ["plan", "a", "--wat"],
        ["generate", "a", "b", "--max-new-tokens", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(onecard: Callable[..., Result], arguments: list[str]) -> None:
    result = onecard(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


def test_a_bug_of_ours_keeps_its_traceback(onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(inspect, "inspect", broken)
    assert isinstance(onecard("inspect", "demo").exception, ZeroDivisionError)


def test_help_is_quick() -> None:
    """torch takes seconds to import, so only verbs that compute may import it."""
    code = "import sys, onecard.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- recipes


def test_recipes_lists_all_that_ship(onecard: Callable[..., Result]) -> None:
    shown = onecard("recipes").stdout
    assert recipe_names() == RECIPES
    for name in RECIPES:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert name in shown.splitlines()
        assert recipe.description in shown


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_prints_one_that_loads_again(onecard: Callable[..., Result], tmp_path: Path, name: str) -> None:
    result = onecard("recipes", name)
    assert result.exit_code == 0
    (tmp_path / "mine.yaml").write_text(result.stdout)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)


def test_what_the_shipped_recipes_promise() -> None:
    recipes = {name: load_recipe(name) for name in RECIPES}
    said = {name: (r.widths.bits, r.widths.group_size, r.widths.symmetric) for name, r in recipes.items()}
    others = {"demo-fit": "fit", "llama4-scout-h100-fit": "fit", "llama4-scout-h200": 8}
    assert said.pop("nf4") == (4, 64, True)
    assert said == {name: (others.get(name, 4), 128, True) for name in said}
    for name, recipe in recipes.items():
        assert (recipe.card.gpu is not None) == name.startswith("llama4-scout"), name
        assert recipe.card.context == (131_072 if recipe.card.gpu else 32_768), name
    assert set(recipes["llama4-scout-h100"].widths.quantize_roles) == {"expert", "shared_expert"}
    assert set(recipes["llama4-scout-h100-int4-attention"].widths.quantize_roles) == {
        "expert",
        "shared_expert",
        "attention",
    }
    assert set(recipes["qwen3-30b-a3b-24gb"].widths.quantize_roles) == {"expert", "mlp", "attention"}
    # q and k need a vLLM that permutes their scales: facts.md.
    assert "35033" in (recipes["llama4-scout-h100-int4-attention"].note or "")
    assert recipes["rtn-int4"].family is None
    assert (recipes["rtn-int4"].quantizer.method, recipes["llama4-scout-h100"].quantizer.method) == ("rtn", "best")


# --- quantize and verify


def test_names_that_look_like_markup(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """A folder's name may look like rich's markup, which draws the card, or be longer than a line."""
    model = Path(shutil.copytree(baby("qwen3"), tmp_path / "we[" / "ird]" / ("long" * 30) / "model[bold]"))
    use, out = recipe(method="rtn", name="[/mine]"), tmp_path / "out[" / "]"
    for arguments in (
        ["inspect", model],
        ["plan", model, "--recipe", use, "--tensors"],
        ["quantize", model, out, "--recipe", use, *texts],
        ["verify", model, out, *texts[2:]],
    ):
        result = onecard(*arguments)
        one_line(result)
        # A card folds long paths, between its borders.
        assert "model[bold]" in "".join(result.stderr.replace("│", "").split())


# --- generate, and the whole in a process of its own


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_generate(
    onecard: Callable[..., Result], emitted: Callable[..., tuple[Path, Result]], baby: Callable[..., Path], family: str
) -> None:
    """transformers loads the checkpoint and answers with at most the allowed tokens."""
    for checkpoint in (emitted(family)[0], baby(family)):
        result = onecard("generate", checkpoint, "who are you?", "--max-new-tokens", "5")
        assert result.exit_code == 0, result.output + repr(result.exception)
        assert result.stdout.endswith("\n")
        assert len(result.stdout) <= 6


def test_quantize_in_a_process_of_its_own(
    tmp_path: Path, baby: Callable[..., Path], recipe: Callable[..., Path], texts: list[str]
) -> None:
    """`python -m onecard` prints one line on stdout, and on stderr nothing from other libraries."""
    command = [
        sys.executable,
        "-m",
        "onecard",
        "quantize",
        str(baby("scout")),
        str(tmp_path / "out"),
        "--recipe",
        str(recipe(method="rtn")),
        *texts,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert strict(done.stdout).keys() >= PROMISED
    ours = [line for line in done.stderr.splitlines() if line.startswith(("onecard quantize", "│", "╭", "╰"))]
    assert done.stderr.split() == "\n".join(ours).split()


def test_a_baby_of_other_seed_is_another_source(tmp_path: Path, baby: Callable[..., Path]) -> None:
    """The digest samples the weights: other weights or another size make another source, the same seed the same one."""
    same = make_baby(tmp_path / "same", "qwen3", 2)
    other = make_baby(tmp_path / "other", "qwen3", 2, seed=5)
    longer = make_baby(tmp_path / "longer", "qwen3", 3)
    digests = [open_folder(folder).digest for folder in (baby("qwen3"), same, other, longer)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
