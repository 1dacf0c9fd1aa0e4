"""Documents say what is so: generated parts are current, links and named files exist, keys and figures agree."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import onecard
from onecard.bits.fitting import GAINS
from onecard.core.limits import Limits
from onecard.core.method import Method
from onecard.core.recipe_groups import FitKeys, Serving, TextKeys, Texts, Widths
from onecard.planner.work import VERIFICATION_SHARE
from onecard.recipe import RECIPE_KEYS, Recipe, load_recipe

ROOT = Path(onecard.__file__).parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *(p for folder in ("docs", "demo", "benchmarks") for p in (ROOT / folder).rglob("*.md")),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path of ours in words or code: at least one folder, or a file of the root, ending as our files do.
NAMED = re.compile(r"(?<![\w/.\-<>~$])((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|yml|svg|json|jsonl|md|css|sh|cpp))(?![\w/-])")
# A path that begins with one of these is ours.
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"out", "build"}
# Files of other projects that documents name without a folder of theirs.
FOREIGN = {"qlinear_cuda_old.py", "gptq_utils.py", "gptq_marlin.py", "qwen3moe.cpp", "ggml-quants.c", "llama4.py"}
# Sections of docs/recipes.md and the class whose keys they list.
SECTIONS: dict[str, type[BaseModel]] = {
    "Widths": Widths,
    "Fit": FitKeys,
    "Quantizer": Method,
    "Texts": TextKeys,
    "Card": Serving,
    "Limits": Limits,
    "A source of texts": Texts,
}


@cache
def generator() -> ModuleType:
    """benchmarks/update_docs.py, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "benchmarks" / "update_docs.py")
    assert spec is not None
    assert spec.loader is not None
    before = list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A document without its indented blocks (commands, transcripts) and without the sources of engines' rules."""
    text = re.sub(r"<!-- generated: rules of .*?<!-- end of generated -->", "", read(name), flags=re.DOTALL)
    return "\n".join(line for line in text.replace("\\_", "_").splitlines() if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, by GitHub's rule."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_parts_are_what_the_program_writes(name: str) -> None:
    """`python benchmarks/update_docs.py` mends it. Exact sizes are planned from hollow files of the true shapes."""
    assert read(name) == generator().rendered(read(name))


@pytest.mark.parametrize("name", ["docs/peers.svg", "docs/plan.svg"])
def test_pictures_are_what_the_program_draws(name: str) -> None:
    assert read(name) == generator().PICTURES[name]()


def test_every_generated_part_stands_somewhere() -> None:
    used = {name for document in DOCUMENTS for name in re.findall(r"<!-- generated: ([^>]+) -->", read(document))}
    assert used == set(generator().PARTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    dead = []
    for target in LINK.findall(prose(name)):
        place, _, anchor = target.partition("#")
        if "://" in place or place.startswith("mailto:"):
            continue
        path = (ROOT / name).parent / place if place else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name: str) -> None:
    """Every path of ours that a document names, from the root or from the document's own folder."""
    gone = []
    for path in NAMED.findall(prose(name)):
        first, *rest = path.split("/")
        ours = first in FOLDERS if rest else path.endswith(".py") and path not in FOREIGN
        ours = ours and "NAME" not in path  # stands for a name
        places = [ROOT, (ROOT / name).parent, ROOT / "tests", ROOT / "docs"]
        if ours and not any((place / path).exists() for place in places):
            gone.append(path)
    assert gone == []


def test_names_are_in_the_files_that_contributing_gives() -> None:
    """`NAME` of [file](file), and `NAME` in [file](file)."""
    text = " ".join(read("CONTRIBUTING.md").split())
    named = re.findall(r"`(\w+)` (?:of|in) \[[^\]]+\]\(([\w./-]+\.py)\)", text)
    assert len(named) > 5
    assert [pair for pair in named if not re.search(rf"\b{pair[0]}\b", read(pair[1]))] == []


def test_named_tests_exist() -> None:
    """`test_x.py::test_y...` names the beginning of a test's name."""
    gone = []
    for document in DOCUMENTS:
        file = ""
        for name, test in re.findall(r"`(?:tests/)?(test_\w+\.py)?::(test_\w+?)(?:\.\.\.)?`", read(document)):
            file = name or file
            if f"def {test}" not in (ROOT / "tests" / file).read_text(encoding="utf-8"):
                gone.append(f"{file}::{test}")
    assert gone == []


def test_the_readme_is_short_and_has_two_commands() -> None:
    text = read("README.md")
    assert len(text.encode()) <= 9216
    makes = re.findall(r"^    make (\w+)", text, re.MULTILINE)
    assert makes == ["demo", "test"]
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert set(makes) <= targets


def rows_of(name: str, section: str) -> list[list[str]]:
    """The body of a section's first table."""
    lines = read(name).split(f"\n### {section}\n", 1)[1].split("\n#", 1)[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def default_of(model: type[BaseModel], key: str) -> Any:
    return model.model_fields[key].get_default()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_group_is_documented_with_its_default(section: str) -> None:
    model = SECTIONS[section]
    rows = rows_of("docs/recipes.md", section)
    assert [row[0].strip("`") for row in rows] == list(model.model_fields)
    for key, said, *_ in ([cell.strip("`") for cell in row] for row in rows):
        default = default_of(model, key)
        if isinstance(default, Texts):
            split = "" if default.split == Texts().split else f"`, split `{default.split}"
            assert said == f"the source `{default.source}{split}", key
        else:
            assert yaml.safe_load(said) == (list(default) if isinstance(default, tuple) else default), key


def test_every_key_of_a_recipe_is_documented() -> None:
    sections = [section for section in SECTIONS if section != "A source of texts"]
    documented = [
        row[0].strip("`") for section in ("The recipe", *sections) for row in rows_of("docs/recipes.md", section)
    ]
    assert sorted(documented) == sorted(RECIPE_KEYS)
    for key, said, *_ in ([cell.strip("`") for cell in row] for row in rows_of("docs/recipes.md", "The recipe")):
        field = Recipe.model_fields[key]
        assert said == "required" if field.is_required() else yaml.safe_load(said) == field.get_default(), key


def test_the_gate_is_worth_what_its_table_says() -> None:
    """The two figures in words are the worst of the table's column for the default tolerance."""
    text = read("docs/ci/README.md")
    rows = [
        line.strip("|").split("|") for line in text.splitlines() if line.startswith(("| nothing ch", "| 10 % more"))
    ]
    shares = [(row[0].strip(), int(row[2]), float(row[4].split("±")[0])) for row in rows]
    alarms = max(share for what, trials, share in shares if what == "nothing changed" and trials >= 6000)
    detected = min(share for what, _, share in shares if what == "10 % more")
    said = re.search(r"false alarms \(the\s+worst: ([\d.]+) %\).*?\(the\s+worst: ([\d.]+) %\)", text, re.DOTALL)
    assert said is not None
    assert (float(said[1]), float(said[2])) == (alarms, detected)


def test_constants_are_the_figures_that_documents_quote() -> None:
    text = " ".join(read("docs/benchmarks.md").split())
    measured = re.search(r"takes \*\*([\d.]+) times\*\* as long as its two forward walks", text)
    assert measured is not None
    assert round(float(measured[1]), 1) == VERIFICATION_SHARE
    gains = re.search(r"`balanced`'s gain, ([\d.]+), .*? its gain \(([\d.]+)\)", text)
    assert gains is not None
    assert [float(gain) for gain in gains.groups()] == [GAINS["balanced"], GAINS["best"]]


@pytest.mark.parametrize("recipe", ["llama4-scout-h100", "llama4-scout-h100-int4-attention", "llama4-scout-h200"])
def test_recipes_describe_themselves_with_the_planned_size(recipe: str) -> None:
    module = generator()
    plan = module.planned(module.SCOUT, recipe, *(("--batch-tokens", "2048") if "h100" in recipe else ()))
    assert f"{plan['emitted_bytes'] / 1e9:.1f} GB" in load_recipe(recipe).description


def test_documents_name_no_machine() -> None:
    for name in DOCUMENTS:
        assert not re.search(
            r"\.\./shared|/work/|/root/|/home/|https?://(?:localhost|127\.|10\.|192\.168\.)", read(name)
        ), name
