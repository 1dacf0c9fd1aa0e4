"""`calibration_rows_per_input`: no more rows than the experts' statistics want, at the shapes of the model at hand."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.calibration.texts import calibration_rows, prepare_texts
from onecard.checkpoint.model import open_model
from onecard.core.method import PRESETS
from onecard.forecast import plan
from onecard.recipe import Recipe

# Inputs of the widest expert matrix x experts / experts a token. The 160 inputs of maverick's dense layer don't count.
INPUTS_OF_ALL = {"scout": 96 * 8, "maverick": 96 * 8, "qwen3": 64 * 8 // 2}


def recipe(**fields: object) -> Recipe:
    base = {"name": "enough", "description": "test", "method": "fast", "group_size": 32, "calibration_row_tokens": 16}
    return Recipe.model_validate(base | {"calibration_least_tokens": 0} | fields)


@pytest.mark.parametrize("family", INPUTS_OF_ALL)
def test_an_even_share_gives_each_expert_so_many_rows_an_input(baby: Callable[..., Path], family: str) -> None:
    adapter = open_model(str(baby(family))).adapter
    tokens = INPUTS_OF_ALL[family] * 0.5
    assert calibration_rows(recipe(calibration_rows_per_input=0.5), adapter) == tokens // 16
    assert (
        calibration_rows(recipe(calibration_rows_per_input=0.5, calibration_row_tokens=17), adapter) == tokens // 17 + 1
    )
    assert calibration_rows(recipe(calibration_rows_per_input=0.5, calibration_rows=5), adapter) == 5
    assert calibration_rows(recipe(calibration_rows_per_input=0), adapter) == 512
    assert calibration_rows(recipe(calibration_rows_per_input=0.5, calibration_least_tokens=tokens - 16), adapter) == (
        tokens // 16
    )
    assert calibration_rows(recipe(calibration_rows_per_input=0.5, calibration_least_tokens=1600), adapter) == 100
    assert calibration_rows(recipe(calibration_rows_per_input=0, calibration_least_tokens=1600), adapter) == 512


def test_few_tokens_are_not_enough_for_a_small_model() -> None:
    assert PRESETS["fast"]["calibration_least_tokens"] > 0
    given = {"name": "enough", "description": "test", "method": "fast"}
    assert Recipe.model_validate(given).texts.calibration_least_tokens == PRESETS["fast"]["calibration_least_tokens"]


def test_fast_alone_limits_its_rows() -> None:
    assert {name: "calibration_rows_per_input" in fields for name, fields in PRESETS.items()} == {
        "rtn": False,
        "fast": True,
        "balanced": False,
        "best": False,
        "bnb-nf4": False,
        "bnb-int8": False,
    }
    assert recipe().texts.calibration_rows_per_input > 0
    assert recipe(calibration_rows_per_input=0).texts.calibration_rows_per_input == 0, "a recipe's own word counts"


def test_the_run_reads_as_many_and_the_plan_counts_as_many(baby: Callable[..., Path], tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = {}
    for which, count in (("calibration", 400), ("evaluation", 3)):
        texts[which] = tmp_path / f"{which}.jsonl"
        lines = [json.dumps({"text": " ".join(rng.choices(["a", "bb", "ccc"], k=20))}) for _ in range(count)]
        texts[which].write_text("\n".join(lines))
    model = open_model(str(baby("scout")))
    for few, expected in ((recipe(calibration_rows_per_input=0.5), 24), (recipe(calibration_rows_per_input=0), 512)):
        rows = prepare_texts(model, few, texts["calibration"], texts["evaluation"], True).calibration
        assert len(rows) == expected
        assert {len(row.tokens) for row in rows} == {16}
    disk = [
        plan(str(baby("scout")), recipe(calibration_rows_per_input=share, evaluation_rows=1), "cpu").cost.disk_bytes
        for share in (0.5, 0)
    ]
    assert disk[0] < disk[1]
