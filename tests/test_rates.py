"""A machine's rates: measured, kept as plain numbers, reused only for the same work, and turned into estimates."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import Result

from command_line import refused
from hollow import QWEN3, SCOUT, published, write_hollow
from onecard import forecast
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import open_headers
from onecard.core import rates as rates_module
from onecard.core.card_rates import H100_80GB, CardRates
from onecard.core.rates import Rates, keep_rates, kept_rates, rates_file, uniform
from onecard.eval import machine_rates
from onecard.forecast import cost_of, plan
from onecard.planner.cost import Machine
from onecard.planner.work import Tokens
from onecard.recipe import load_recipe

RATES = Rates(1e9, 2e9, 3e9, 4e9, 5e8, 6e8)
MACHINE = Machine(
    device=torch.device("cpu"),
    itemsize=4,
    batch_tokens=4096,
    site_budget_bytes=256_000_000,
    card_bytes=0,
    rows_ram_bytes=10**10,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_kept_rates_are_found_again_for_their_own_key(cache: Path) -> None:
    assert kept_rates("a", Rates) == (None, None)
    assert keep_rates("a", RATES) is None
    keep_rates("b", replace(RATES, head_flops=7.0))
    assert kept_rates("a", Rates) == (RATES, None)
    assert kept_rates("c", Rates) == (None, None)
    assert [path.name for path in (cache / "onecard").iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"schema": 2', '"schema": 1'),
        lambda text: text.replace("1000000000.0", '"__import__(1)"'),
        lambda text: text.replace("1000000000.0", "NaN"),
        lambda text: text.replace("1000000000.0", "-1.0"),
        lambda text: text.replace("1000000000.0", "true"),
        lambda text: text.replace("head_flops", "neck_flops"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_left_out_with_a_note(spoil: Callable[[str], str]) -> None:
    keep_rates("a", RATES)
    spoiled = spoil(rates_file().read_text())
    assert spoiled != rates_file().read_text()
    rates_file().write_text(spoiled)
    found, note = kept_rates("a", Rates)
    assert found is None
    assert note is not None
    assert "damaged" in note
    assert keep_rates("a", RATES) is None
    assert kept_rates("a", Rates) == (RATES, None), "--measure writes it anew"


def test_a_cards_rates_are_kept_beside_those_of_a_cpu() -> None:
    keep_rates("a", RATES)
    assert keep_rates("card", H100_80GB.rates) is None
    assert kept_rates("card", CardRates) == (H100_80GB.rates, None)
    assert kept_rates("a", Rates) == (RATES, None)
    found, note = kept_rates("a", CardRates)
    assert found is None
    assert "damaged" in str(note)


def test_a_cache_that_cannot_be_written_is_a_note(cache: Path) -> None:
    cache.write_text("a file")
    assert "could not be kept" in str(keep_rates("a", RATES))
    assert kept_rates("a", Rates) == (None, None)


def test_a_relative_cache_folder_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert rates_file().is_absolute()


def test_plan_measures_keeps_and_says_where_its_rates_come_from(
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(machine_rates, "SECONDS", 0.02)
    monkeypatch.setattr(machine_rates, "FILE_BYTES", 2**24)
    use = ("plan", baby("scout"), "--device", "cpu", "--recipe")

    def said(*arguments: object) -> dict[str, object]:
        result = onecard(*use, *arguments)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return dict(json.loads(result.stdout))

    balanced = recipe()
    assert "one matrix product" in str(said(balanced)["rates_from"])
    measured = said(balanced, "--measure")
    assert measured["rates_from"] == "measured here now"
    again = said(balanced)
    assert again["rates"] == measured["rates"]
    assert again["estimated_seconds"] == measured["estimated_seconds"]
    assert "kept" in str(again["rates_from"])
    assert "one matrix product" in str(said(recipe(method="fast"))["rates_from"]), "another method is other work"
    assert list(tmp_path.glob(".onecard*")) == [], "the file that was written to measure the disk is gone"
    rates_file().write_text("{")
    assert "damaged" in onecard(*use, balanced).stderr


def test_a_disk_that_cannot_be_measured_is_exit_code_4(
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> Rates:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forecast, "measure_rates", full)
    refused(onecard("plan", baby("scout"), "--recipe", recipe(), "--measure"), "No space left", "--measure", code=4)


@pytest.mark.parametrize(
    ("name", "method"), [*((SCOUT, method) for method in ("rtn", "fast", "balanced", "best")), (QWEN3, "balanced")]
)
def test_time_is_the_sum_of_the_stages_of_a_run(
    name: str, method: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = open_headers(str(write_hollow(tmp_path / "hollow", published(name))))
    wanted = load_recipe(str(recipe(method=method)))
    laid_out = plan_for(model, wanted)
    for rates in (RATES, Rates(1e13, 7e13, 3e12, 9e12, 3e9, 1e9)):
        cost = cost_of(model.adapter, laid_out, wanted, rates, MACHINE, Tokens(10**6, 10**5))
        assert sum(stage.weight for stage in cost.stages) == pytest.approx(cost.seconds, rel=1e-9)
    blocks = [stage.block for stage in cost.stages if stage.name.startswith("block ")]
    assert blocks == list(range(model.adapter.n_blocks))


@pytest.mark.parametrize("which", [field.name for field in fields(Rates)])
def test_a_faster_machine_takes_less_time_and_no_other_memory(which: str) -> None:
    planned = plan("demo", load_recipe("demo"), "cpu")
    model, recipe = planned.model, planned.recipe

    def cost(rates: Rates) -> tuple[float, int, int]:
        found = cost_of(model.adapter, planned.plan, recipe, rates, MACHINE, Tokens(10**5, 10**4))
        return found.seconds, found.ram_bytes, found.disk_bytes

    slow, fast = cost(RATES), cost(Rates(**{**asdict(RATES), which: 2 * asdict(RATES)[which]}))
    assert fast[0] < slow[0]
    assert fast[1:] == slow[1:]


def test_time_is_the_sum_of_its_parts_and_grows_with_tokens() -> None:
    planned = plan("demo", load_recipe("demo"), "cpu")

    def cost(calibration: int, evaluation: int) -> float:
        adapter, recipe = planned.model.adapter, planned.recipe
        found = cost_of(adapter, planned.plan, recipe, uniform(1e10), MACHINE, Tokens(calibration, evaluation))
        assert found.seconds == pytest.approx(sum(found.seconds_by.values()))
        return found.seconds

    base = cost(0, 0)
    assert cost(2000, 0) - base == pytest.approx(2 * (cost(1000, 0) - base))
    assert cost(0, 2000) - base == pytest.approx(2 * (cost(0, 1000) - base))


def test_a_run_does_not_look_at_kept_rates(
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def asked() -> Path:
        raise AssertionError("a run asked for rates, and its bytes could depend on them")

    monkeypatch.setattr(rates_module, "rates_file", asked)
    out = tmp_path / "out"
    assert onecard("quantize", baby("qwen3"), out, "--recipe", recipe(method="rtn"), *texts).exit_code == 0
    with pytest.raises(AssertionError, match="asked for rates"):
        plan("demo", load_recipe("rtn-int4"), "cpu")
