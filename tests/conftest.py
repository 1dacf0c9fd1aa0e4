"""Shared fixtures: babies with a tokenizer (made once, read-only), small texts and recipes, and the command line.

`baby(family)` gives a folder that every test may read and none may change; `copied(family)` gives one to change.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: tests share a small machine, and a forked child must not meet a thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before triton is imported: kernels are interpreted (test_kernels.py).
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from click.testing import Result
from hypothesis import settings

from babies import make_baby
from command_line import listing, refused, run_onecard
from hub_standin import Hub, serve, take_place
from inputs import write_jsonl, write_recipe, write_tokenizer
from onecard.report import html
from runs import FAMILY, Contents, Run, contents

# Every run tries the same examples, keeps none on disk, and sets no deadline.
settings.register_profile("onecard", max_examples=50, derandomize=True, database=None, deadline=None)
settings.load_profile("onecard")


# The files that take longest. Two workers share the files in the order of collection: a long one must not come last.
LONGEST = ("test_end_to_end", "test_overwrite", "test_killed", "test_transformers_reads", "test_resume", "test_workdir")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def onecard() -> Callable[..., Result]:
    return run_onecard


@pytest.fixture(scope="session")
def baby(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, layers, shards) -> the folder of a baby of two blocks, with a tokenizer. Do not write into it."""
    made: dict[tuple[str, int, int], Path] = {}

    def get(family: str, layers: int = 2, shards: int = 1) -> Path:
        key = (family, layers, shards)
        if key not in made:
            made[key] = make_baby(tmp_path_factory.mktemp("babies") / family, family, layers, shards=shards)
            write_tokenizer(made[key])
            (made[key] / "LICENSE").write_text("Free for babies.\n")
        return made[key]

    return get


@pytest.fixture
def copied(baby: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """(family, layers, shards) -> a baby's folder under tmp_path, to be changed at will."""

    def get(family: str = "llama4-text", layers: int = 2, shards: int = 1) -> Path:
        return Path(shutil.copytree(baby(family, layers, shards), tmp_path / "model"))

    return get


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Keyword arguments change or add keys of RECIPE; gives the path of the YAML file."""
    return lambda **changes: write_recipe(tmp_path / f"recipe-{len(list(tmp_path.glob('recipe-*')))}.yaml", **changes)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name small calibration and evaluation texts, plain and in conversations."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")

    def document(number: int) -> dict[str, Any]:
        words = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(9))
        return {"text": words} if number % 3 else {"messages": [{"role": "user", "content": words}]}

    calibration = write_jsonl(folder / "calibration.jsonl", [document(n) for n in range(12)])
    evaluation = write_jsonl(folder / "evaluation.jsonl", [document(n) for n in range(6)])
    return ["--calibration", str(calibration), "--evaluation", str(evaluation)]


@pytest.fixture(scope="session")
def emitted(
    baby: Callable[..., Path], texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Result]]:
    """(family) -> the checkpoint that `quantize` made from that baby with RECIPE, and the command's result."""
    made: dict[str, tuple[Path, Result]] = {}

    def get(family: str) -> tuple[Path, Result]:
        if family not in made:
            folder = tmp_path_factory.mktemp("emitted")
            recipe = write_recipe(folder / "recipe.yaml")
            result = run_onecard("quantize", baby(family), folder / family, "--recipe", recipe, *texts)
            assert result.exit_code == 0, result.stderr
            made[family] = (folder / family, result)
        return made[family]

    return get


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """(name, rows) -> a JSONL file under tmp_path."""
    return lambda name, rows: write_jsonl(tmp_path / name, rows)


@pytest.fixture(name="refused")
def refused_fixture() -> Callable[..., str]:
    return refused


@pytest.fixture
def refuse(
    onecard: Callable[..., Result], tmp_path: Path, recipe: Callable[..., Path], texts: list[str]
) -> Callable[..., str]:
    """`quantize MODEL` with OUT beside it ends in one message with the needles, and nothing was written."""

    def check(
        model: object, *needles: object, use: object = None, code: int = 2, arguments: Any = (), out: object = None
    ) -> str:
        use = use or recipe()
        before = listing(tmp_path)
        result = run_onecard("quantize", model, out or tmp_path / "out", "--recipe", use, *texts, *arguments)
        said = refused(result, *needles, code=code)
        assert listing(tmp_path) == before
        return said

    return check


@pytest.fixture
def refuse_model(
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    refuse: Callable[..., str],
    texts: list[str],
) -> Callable[..., str]:
    """Every verb that opens MODEL refuses it with the same needles."""

    def check(model: Path, *needles: object) -> None:
        refuse(model, *needles)
        refused(onecard("inspect", model), *needles)
        refused(onecard("plan", model, "--recipe", recipe()), *needles)
        refused(onecard("verify", model, baby("llama4-text"), *texts[2:]), *needles)
        refused(onecard("verify", baby("llama4-text"), model, *texts[2:]), *needles)
        refused(onecard("generate", model, "hello"), *needles)

    return check


@pytest.fixture
def run(
    baby: Callable[..., Path],
    tmp_path: Path,
    recipe: Callable[..., Path],
    texts: list[str],
) -> Run:
    return Run(baby(FAMILY), tmp_path / "out", recipe(), texts)


@pytest.fixture(scope="session")
def whole(emitted: Callable[..., tuple[Path, Result]]) -> Contents:
    """What an undisturbed run of the same recipe emits."""
    return contents(emitted(FAMILY)[0])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def put(name: str, value: Any) -> Path:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / name

    return put


@pytest.fixture
def folder(emitted: Callable[..., tuple[Path, Result]], tmp_path: Path) -> Path:
    """An emitted Scout baby to be changed."""
    return Path(shutil.copytree(emitted("scout")[0], tmp_path / "checkpoint"))


@pytest.fixture
def small_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces plotly's five megabytes of script by one line."""
    monkeypatch.setattr(html, "get_plotlyjs", lambda: "var Plotly = {};")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in that takes the hub's place."""
    with serve() as hub:
        take_place(hub, monkeypatch, tmp_path)
        yield hub
