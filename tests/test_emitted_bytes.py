"""Predicted bytes equal emitted bytes (invariant 3), for every shipped recipe and every family that it applies to.

Sizes depend on neither the method nor the texts, so each recipe runs as round-to-nearest, in groups that divide a
baby's matrices. Recipes that quantize the same modules of a family share one run.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import open_headers
from onecard.checkpoint.plan import Plan
from onecard.core.scheme import GRIDS
from onecard.core.shipped_recipes import recipe_names
from onecard.pipeline import Options, quantize
from onecard.recipe import Limits, Recipe, load_recipe

FAMILIES = {"scout": "llama4", "maverick": "llama4", "llama4-text": "llama4", "qwen3": "qwen3_moe"}
# Many shards, with attention and experts of one block in several.
FOR_BABIES = {
    "method": "rtn",
    "group_size": 32,
    "max_shard_bytes": 30_000,
    "tasks": [],
    "evaluation_rows": 1,
    "evaluation_row_tokens": 8,
    "gpu": None,
}
Emitted = Callable[[str, Recipe], Path]


# Not a shipped recipe: several widths in one checkpoint, among them scales by row, and a zero point.
MIXED = "mixed"
SEVERAL = {"attention": "int8 by row", "shared_expert": "int4 group 32 asymmetric", "mlp": "int8 group 32"}
# tests/test_fit_run.py covers widths chosen by prices, tests/test_bitsandbytes.py other codes.
ELSEWHERE = {
    name
    for name in recipe_names()
    if load_recipe(name).widths.bits == "fit" or load_recipe(name).quantizer.method in GRIDS
}
SHIPPED = [name for name in recipe_names() if name not in ELSEWHERE]
CASES = [(MIXED, family) for family in FAMILIES] + [
    (name, family) for name in SHIPPED for family, kind in FAMILIES.items() if load_recipe(name).family in (None, kind)
]


def for_babies(name: str) -> Recipe:
    if name == MIXED:
        return Recipe.model_validate({"name": MIXED, "description": "", "schemes": SEVERAL} | FOR_BABIES)
    limits = dict.fromkeys(Limits.model_fields, None) | {"fail_below_expert_rows": 0, "max_fallbacks": 0}
    said = load_recipe(name).model_dump()
    narrow = {key: re.sub(r"group \d+", "group 32", words) for key, words in said["schemes"].items()}
    return Recipe.model_validate(said | FOR_BABIES | limits | {"schemes": narrow})


def planned(folder: Path, recipe: Recipe) -> Plan:
    return plan_for(open_headers(str(folder)), recipe)


@pytest.fixture(scope="module")
def quantized(baby: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    """(family, recipe) -> the folder of the run."""
    made: dict[Any, Path] = {}
    at = tmp_path_factory.mktemp("runs")
    texts = at / "texts.jsonl"
    texts.write_text('{"text": "abc def"}\n')

    def get(family: str, recipe: Recipe) -> Path:
        key = (family, tuple(planned(baby(family), recipe).schemes.items()))
        if key not in made:
            made[key] = at / str(len(made))
            quantize(str(baby(family)), made[key], recipe, Options("cpu", evaluation=texts), quiet=True)
        return made[key]

    return get


@pytest.mark.parametrize(("name", "family"), CASES)
def test_predicted_bytes_are_those_of_the_files(
    name: str, family: str, baby: Callable[..., Path], quantized: Emitted
) -> None:
    recipe = for_babies(name)
    plan = planned(baby(family), recipe)
    out = quantized(family, recipe)
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert len(sizes) > 4
    assert sizes == {shard.file: shard.file_bytes for shard in plan.shards}
    assert sum(sizes.values()) == plan.emitted_bytes
    index = out / "model.safetensors.index.json"
    assert index.stat().st_size == plan.index_bytes
    assert json.loads(index.read_text())["metadata"]["total_size"] == plan.weight_bytes
    stored = 0
    for path in out.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert stored == plan.weight_bytes == sum(plan.role_bytes.values())


def test_every_recipe_and_every_family_are_among_the_cases() -> None:
    assert {name for name, _ in CASES} == {MIXED, *SHIPPED}
    assert {family for _, family in CASES} == set(FAMILIES)
