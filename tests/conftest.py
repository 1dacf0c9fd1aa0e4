"""Shared fixtures: babies with a tokenizer (made once, read-only), small texts and recipes, and the command line.

`baby(family)` gives a folder that every test may read and none may change; `copied(family)` gives one to spoil.
"""

import json
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: tests share a small machine, and a forked child must not meet a thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from babies import PATCH, VOCAB, make_baby
from onecard.checkpoint.model import Model
from onecard.cli import main
from onecard.core.device import Compute
from onecard.models.walk import Walk

# The same examples in every run, none kept on disk, and no clock in a test.
settings.register_profile("onecard", max_examples=50, derandomize=True, database=None, deadline=None)
settings.load_profile("onecard")

SPECIAL = {
    "<s>": 0,
    "</s>": 1,
    "<pad>": 2,
    "<unk>": 3,
    "<|patch|>": PATCH,
    "<|image|>": 251,
    "<|image_start|>": 252,
    "<|image_end|>": 253,
    "<|user|>": 254,
    "<|assistant|>": 255,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant may speak') }}{% endif %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECIPE: dict[str, Any] = {
    "name": "test",
    "description": "For babies.",
    "method": "balanced",
    "group_size": 32,
    "quantize_roles": ["expert", "shared_expert", "mlp"],
    "warn_below_expert_rows": 0,
    "calibration_rows": 8,
    "calibration_row_tokens": 24,
    "evaluation_rows": 6,
    "evaluation_row_tokens": 24,
    "batch_tokens": 96,
    "max_shard_bytes": 200_000,
}


def write_tokenizer(folder: Path) -> None:
    """One token a character of ASCII, the special tokens of a baby Llama 4, and a chat template."""
    vocab = SPECIAL | {chr(c): 4 + i for i, c in enumerate([10, *range(32, 127)])}
    assert max(vocab.values()) < VOCAB
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    raw.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line; a string is written as it stands."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False), encoding="utf-8")
    return path


def cpu_walk(model: Model, batch_tokens: int = 1000, dtype: torch.dtype = torch.float32) -> Walk:
    """A walk over the model that nobody watches."""
    compute = Compute(device=torch.device("cpu"), dtype=dtype, batch_tokens=batch_tokens)
    return Walk.over(model.adapter, model.source, compute)


def run_onecard(*args: object) -> Result:
    """The real command line, in this process: exit code, stdout and stderr as a shell would see them."""
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result: Result, *needles: object, code: int = 2) -> str:
    """Asserts one clean message that holds every needle, and the exit code; gives what stderr said."""
    shown = "".join(traceback.format_exception(result.exception)) if result.exception else result.output
    assert isinstance(result.exception, SystemExit), shown
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert [line[:7] for line in result.stderr.splitlines()].count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    missing = [str(n) for n in needles if str(n) not in result.stderr]
    assert not missing, (missing, result.stderr)
    return result.stderr


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every path under a folder with its size and time: what 'nothing was written' is held against."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns) for path, s in stats.items()}


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
    """(family) -> the folder that `quantize` made of that baby with RECIPE, and what the command said."""
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
