"""`bits: fit` and `onecard pareto` from the command line: within the budget, checked, resumed, refused early."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from command_line import run_onecard
from inputs import write_recipe
from onecard.bits.fitting import bytes_of_units, fit_to, menu_of, priced_units
from onecard.bits.pricing import Prices
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import open_model, open_source
from onecard.checkpoint.stored_widths import stored_weights
from onecard.core.errors import InputError
from onecard.core.scheme import Scheme
from onecard.recipe import Recipe, load_recipe, recorded_recipe
from onecard.report.pareto_card import draw_pareto
from runs import Stopped, contents, differences

FIT: dict[str, Any] = {
    "bits": "fit",
    "fit_schemes": ["int4 group 32", "int4 group 16", "int8 group 32", "keep"],
    "quantize_roles": ["expert", "attention"],
    "method": "fast",
    "price_rows": 3,
    "price_row_tokens": 20,
    "gpu": None,
}
FAMILY = "mixtral"


@pytest.fixture(scope="module")
def limits(baby: Callable[..., Path]) -> tuple[int, int]:
    """The fewest and the most bytes that the recipe can give the baby."""
    model = open_source(str(baby(FAMILY)))
    fields = {k: v for k, v in FIT.items() if k != "bits"}
    fields |= {"name": "x", "description": "x", "max_shard_bytes": 200_000}
    units = priced_units(model.adapter, Recipe.model_validate(fields))
    least = plan_for(model, Recipe.model_validate(fields | {"group_size": 32})).emitted_bytes
    sizes = bytes_of_units(model, units, [Scheme(4, 32)])
    return least, least + sum(sizes[u, None] - sizes[u, Scheme(4, 32)] for u in units)


@pytest.fixture(scope="module")
def use(tmp_path_factory: pytest.TempPathFactory, limits: tuple[int, int]) -> Path:
    least, most = limits
    budget = (least + (most - least) // 4) / 1e9
    return write_recipe(tmp_path_factory.mktemp("recipe") / "fit.yaml", **FIT, budget_gb=budget)


@pytest.fixture(scope="module")
def priced(baby: Callable[..., Path], texts: list[str], use: Path, tmp_path_factory: Any) -> tuple[Path, Result]:
    """A file of prices, and the run of pareto that measured them."""
    file = tmp_path_factory.mktemp("prices") / "prices.json"
    result = run_onecard("pareto", baby(FAMILY), "--recipe", use, "--prices", file, *texts[:2])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return file, result


@pytest.fixture(scope="module")
def whole(baby: Callable[..., Path], texts: list[str], use: Path, tmp_path_factory: Any) -> Path:
    """The checkpoint of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run_onecard("quantize", baby(FAMILY), out, "--recipe", use, *texts)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(out)


def test_the_run_is_what_was_chosen(whole: Path, baby: Callable[..., Path], use: Path) -> None:
    record = json.loads((whole / "onecard.json").read_text())
    emitted = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    budget = round(load_recipe(str(use)).fit.budget_gb * 1e9)  # type: ignore[operator]
    allocation = record["allocation"]
    assert allocation["budget_bytes"] == budget
    assert emitted == record["plan"]["emitted_bytes"] <= budget
    assert emitted > 0.9 * budget, "the budget is used"
    made = recorded_recipe(record["recipe"])
    assert made.widths.bits == 4
    model = open_source(str(baby(FAMILY)))
    assert plan_for(model, made).emitted_bytes == emitted
    assert allocation["predicted_kl_nats"] > 0
    assert record["kl"]["kl_mean_nats"] > 0
    # The stored widths are those of the allocation, unit by unit, and allowed by the recipe.
    stored = {name: width.width for name, width in stored_weights(open_model(str(whole))).items()}
    units = priced_units(model.adapter, load_recipe(str(use)))
    assert [unit["unit"] for unit in allocation["units"]] == list(units)
    widths = set()
    for unit in allocation["units"]:
        for module in units[unit["unit"]]:
            assert stored[f"{module}.weight"] == {"keep": "BF16"}.get(unit["width"], unit["width"])
            scheme, _ = made.scheme_of(unit["role"], module)
            assert str(scheme or "keep") == unit["width"]
        widths.add(unit["width"])
    assert len(widths) > 1, "not every unit has the same width"
    assert run_onecard("check", whole).exit_code == 0


def test_prices_of_pareto_serve_quantize(
    whole: Path,
    priced: tuple[Path, Result],
    baby: Callable[..., Path],
    texts: list[str],
    use: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No second pricing pass runs, and the bytes are those of a run that measured its own prices."""
    monkeypatch.setattr("onecard.pipeline.price_model", None)
    out = tmp_path / "out"
    result = run_onecard("quantize", baby(FAMILY), out, "--recipe", use, *texts, "--prices", priced[0])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert differences(contents(out), contents(whole)) == []


@pytest.mark.parametrize("where", ["onecard.models.walk.Walk.head", "onecard.pipeline.fit_to", "onecard.stages.begin"])
def test_stopped_between_pricing_and_quantizing(
    whole: Path, baby: Callable[..., Path], texts: list[str], use: Path, tmp_path: Path, where: str
) -> None:
    """The run stops before prices are known, before they are used, and before its first step is done."""
    out = tmp_path / "out"
    command = ["quantize", baby(FAMILY), out, "--recipe", use, *texts]

    def stopped(*args: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, stopped)
        with pytest.raises(Stopped):
            run_onecard(*command)
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        # What was committed is not measured again.
        patch.setattr("onecard.bits.pricing.quantize_batch", None)
        if where != "onecard.models.walk.Walk.head":
            patch.setattr("onecard.pipeline.price_model", None)
        result = run_onecard(*command, "--resume")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert differences(contents(out), contents(whole)) == []


def test_a_budget_below_the_least_is_refused(
    baby: Callable[..., Path],
    refuse: Callable[..., str],
    refused: Callable[..., str],
    texts: list[str],
    use: Path,
    limits: tuple[int, int],
    tmp_path: Path,
) -> None:
    least, _ = limits
    small = ["--budget-gb", f"{(least - 1) / 1e9:.9f}"]
    refuse(baby(FAMILY), f"{least:,} bytes", "four bits", use=use, code=3, arguments=small)
    prices = tmp_path / "prices.json"
    result = run_onecard("pareto", baby(FAMILY), "--recipe", use, "--prices", prices, *texts[:2], *small)
    refused(result, f"{least:,} bytes", code=3)
    assert not prices.exists()


def test_the_least_itself_is_met(
    baby: Callable[..., Path], texts: list[str], use: Path, priced: tuple[Path, Result], limits: tuple[int, int]
) -> None:
    least, most = limits
    model, recipe = open_source(str(baby(FAMILY))), load_recipe(str(use))
    prices = Prices.from_facts(json.loads(priced[0].read_text())["prices"])
    for budget in (least, least + 1, least + 40, (least + most) // 2, most - 1):
        found = fit_to(model, recipe, prices, budget)
        assert plan_for(model, found.recipe).emitted_bytes <= budget
    for budget in (most, most + 10_000):
        with pytest.raises(InputError, match="nothing needs to be quantized"):
            fit_to(model, recipe, prices, budget)
    assert fit_to(model, recipe, prices, least).choice.bytes == sum(
        min(w.bytes for w in u.widths) for u in fit_to(model, recipe, prices, least).units
    )


CHANGED = {
    "recipe": ({"damping": 0.02}, "method was"),
    "widths": ({"fit_schemes": ["int4 group 32", "keep"]}, "widths was"),
    "rows": ({"calibration_rows": 7}, "calibration texts was"),
}


@pytest.mark.parametrize("kind", [*CHANGED, "model", "no prices", "a price of NaN", "not fitted", "gone"])
def test_prices_of_something_else_are_refused(
    baby: Callable[..., Path],
    refuse: Callable[..., str],
    priced: tuple[Path, Result],
    use: Path,
    tmp_path: Path,
    recipe: Callable[..., Path],
    kind: str,
) -> None:
    fields = {**FIT, "budget_gb": 0.0006} | (CHANGED[kind][0] if kind in CHANGED else {})
    file, model, needles = priced[0], baby(FAMILY), [CHANGED[kind][1]] if kind in CHANGED else []
    if kind == "model":
        model, needles = baby(FAMILY, 3), ["source was"]
    elif kind == "a price of NaN":
        file, needles = tmp_path / "x.json", ["holds no prices"]
        file.write_text(re.sub(r'"kl_nats": [^,}\s]+', '"kl_nats": NaN', priced[0].read_text(), count=1))
    elif kind == "no prices":
        file, needles = tmp_path / "x.json", ["holds no prices"]
        file.write_text('{"identity": {}, "prices": {"units": 3}}')
    elif kind == "gone":
        file, needles = tmp_path / "x.json", ["cannot be read"]
    elif kind == "not fitted":
        fields, needles = {}, ["bits: 4"]
    refuse(model, *needles, use=recipe(**fields), arguments=["--prices", file])


def test_too_few_rows_are_refused(
    baby: Callable[..., Path], refuse: Callable[..., str], recipe: Callable[..., Path]
) -> None:
    refuse(baby(FAMILY), "1 rows", use=recipe(**FIT, budget_gb=0.0006, calibration_rows=1))


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"budget_gb": 1.0, "gpu": "h100-80gb"}, "needs one budget"),
        ({}, "needs one budget"),
        ({"budget_gb": 1.0, "engine": "transformers"}, "engine is transformers"),
        ({"budget_gb": 1.0, "format": "gptq"}, "format is gptq"),
        ({"budget_gb": 1.0, "fit_schemes": ["keep"]}, "names no width"),
        ({"budget_gb": 1.0, "fit_schemes": ["int3 group 32"]}, "no width"),
        ({"budget_gb": 1.0, "fit_schemes": ["int4 group 128"]}, "does not divide"),
        ({"gpu": "h1000"}, "h1000"),
    ],
)
def test_recipes_that_cannot_be_fitted(
    baby: Callable[..., Path], refuse: Callable[..., str], recipe: Callable[..., Path], fields: Any, needle: str
) -> None:
    refuse(baby(FAMILY), needle, use=recipe(**FIT | {"fit_schemes": ["int4 group 32"]} | fields))


# --- pareto


def test_the_curve(priced: tuple[Path, Result], limits: tuple[int, int], use: Path) -> None:
    least, most = limits
    facts = json.loads(priced[1].stdout)
    curve = facts["curve"]
    sizes, kls = [p["bytes"] for p in curve], [p["predicted_kl_nats"] for p in curve]
    assert sizes == sorted(set(sizes))
    assert kls == sorted(set(kls), reverse=True)
    assert sizes[0] == least
    assert sizes[-1] == pytest.approx(most, abs=2000)  # headers
    assert kls[-1] == 0
    menu = menu_of(load_recipe(str(use)))
    rules = [f"attention, shared int8 group 32; rest {s}" for s in menu if s.bits == 4]
    assert [p["name"] for p in facts["named"]] == [*(f"all {s}" for s in menu), *rules]
    # No choice without prices beats the curve: some step of it has that size or less, and no more KL.
    for point in [*facts["named"], facts["asked"]]:
        below = [kl for size, kl in zip(sizes, kls, strict=True) if size >= point["bytes"]]
        assert not below or point["predicted_kl_nats"] >= 0.999 * below[0], point
    assert facts["asked"]["bytes"] <= round(load_recipe(str(use)).fit.budget_gb * 1e9)  # type: ignore[operator]


def test_the_curve_is_dense_where_it_is_steep(priced: tuple[Path, Result], limits: tuple[int, int]) -> None:
    least, most = limits
    sizes = [p["bytes"] for p in json.loads(priced[1].stdout)["curve"]]
    assert sum(size - least < (most - least) / 4 for size in sizes) >= len(sizes) / 3


def test_a_second_run_walks_nothing_and_speaks_one_line(
    priced: tuple[Path, Result], baby: Callable[..., Path], texts: list[str], use: Path
) -> None:
    """It runs in a process of its own, so that a library's print to C's stdout would be seen."""
    script = "import onecard.bits.pareto\nonecard.bits.pareto.price_model = None\nfrom onecard.cli import main\nmain()"
    command = ["pareto", baby(FAMILY), "--recipe", use, "--prices", priced[0], *texts[:2]]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == priced[1].stdout
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["curve"]


def drawn(facts: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), markup=False)  # noqa: SIM115
    draw_pareto(facts, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 110])
def test_the_card_at_80_columns(priced: tuple[Path, Result], width: int) -> None:
    facts = json.loads(priced[1].stdout)
    for name in (facts["model"], "a-very-long-name-of-a-model/" * 5):
        lines = drawn(facts | {"model": name}, width)
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        assert "★" in text
        assert "•" in text
        assert "MB" in text
        for point in (*facts["named"], facts["asked"]):
            assert f"{point['predicted_kl_nats']:#.3g}" in text


def test_what_costs_next_to_nothing_does_not_stretch_the_axis(priced: tuple[Path, Result]) -> None:
    facts = json.loads(priced[1].stdout)
    facts["curve"][-1]["predicted_kl_nats"] = 1e-13
    facts["named"][0]["predicted_kl_nats"] = 0.0
    before, after = drawn(json.loads(priced[1].stdout), 80), drawn(facts, 80)
    ticks = [[float(line.split("┤")[0].strip("│ ")) for line in lines if "┤" in line] for lines in (before, after)]
    for found in ticks:
        assert found[0] >= found[-1] >= 0.99e-3 * found[0]


# --- a card


def test_without_keep_nothing_is_kept(
    baby: Callable[..., Path], priced: tuple[Path, Result], use: Path, limits: tuple[int, int]
) -> None:
    """A menu without `keep` keeps nothing, though prices include keeping and there is room."""
    model, recipe = open_source(str(baby(FAMILY))), load_recipe(str(use))
    prices = Prices.from_facts(json.loads(priced[0].read_text())["prices"])
    narrow = recipe.changed(fit_schemes=("int4 group 32", "int4 group 16", "int8 group 32"))
    widths = fit_to(model, narrow, prices, limits[1] + 10_000).choice.widths
    assert {width.scheme for width in widths} == {Scheme(8, 32)}
