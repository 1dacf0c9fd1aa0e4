"""The page's section and the card's lines on `bits: fit`, drawn from the record's `allocation`."""

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from onecard.core.errors import InputError
from onecard.core.record.reading import check_record
from onecard.report import html
from onecard.report.card import draw_card
from onecard.report.page.parts import Section, nats
from records import KINDS_OF_UNIT, allocation_facts, full_record


def section(allocation: dict[str, Any], **more: Any) -> Section | None:
    made = html.sections(check_record(full_record() | {"allocation": allocation} | more, "record"))
    return next((each for each in made if each.key == "allocation"), None)


def figure(made: Section | None, title: str) -> Any:
    assert made is not None
    return next(each for each in made.figures if each.title.startswith(title))


def test_predicted_stands_against_verified() -> None:
    facts, kl = allocation_facts(), full_record()["kl"]
    made = section(facts)
    assert made is not None
    predicted, verified = facts["predicted_kl_nats"], kl["kl_mean_nats"]
    assert f"{verified / predicted:.2f} times what was predicted" in made.lede
    (dots,) = figure(made, "Predicted against").spec["data"]
    assert dots["x"] == [predicted, verified]
    assert dots["error_x"]["array"][0] == dots["error_x"]["arrayminus"][0] == 0
    assert verified + dots["error_x"]["array"][1] == pytest.approx(kl["kl_high_nats"])
    assert verified - dots["error_x"]["arrayminus"][1] == pytest.approx(kl["kl_low_nats"])


@pytest.mark.parametrize("blocks", [4, 48])
def test_every_unit_is_a_tile_of_its_width(blocks: int) -> None:
    facts = allocation_facts(blocks)
    got = figure(section(facts), "What each unit got")
    ticks = [tick.replace("<br>", ".") for tick in got.spec["layout"]["yaxis"]["ticktext"]]
    assert tuple(ticks) == KINDS_OF_UNIT
    drawn = {
        (int(x), ticks[round(base + y / 2)]): trace["name"]
        for trace in got.spec["data"]
        for x, y, base in zip(trace["x"], trace["y"], trace["base"], strict=True)
    }
    assert drawn == {
        (u["block"], u["kind"]): "as it was" if u["width"] == "keep" else u["width"] for u in facts["units"]
    }
    assert len({trace["meta"]["paint"] for trace in got.spec["data"]}) == len(got.spec["data"])


def test_bytes_by_role_and_width_add_up() -> None:
    facts = allocation_facts()
    made = section(facts)
    assert made is not None
    (by_role,) = made.tables
    assert sum(int(row[2]) for row in by_role.rows) == len(facts["units"])
    assert sum(float(row[4].removesuffix("%")) for row in by_role.rows) == pytest.approx(100, abs=1)


def test_prices_are_drawn_but_for_what_costs_nothing() -> None:
    facts = allocation_facts()
    prices = figure(section(facts), "Prices")
    assert prices.spec["layout"]["yaxis"]["type"] == "log"
    drawn = sorted(y for trace in prices.spec["data"] if trace["meta"]["paint"] != "mark" for y in trace["y"])
    every = [w["kl_nats"] for unit in facts["prices"]["units"] for w in unit["widths"]]
    assert drawn == sorted(kl for kl in every if kl > 0)
    assert len(drawn) < len(every)
    (rings,) = (trace for trace in prices.spec["data"] if trace["meta"]["paint"] == "mark")
    costs = {unit["unit"]: {w["width"]: w["kl_nats"] for w in unit["widths"]} for unit in facts["prices"]["units"]}
    assert sorted(rings["y"]) == sorted(costs[u["unit"]][u["width"]] for u in facts["units"] if u["width"] != "keep")


def test_all_units_together_have_both_figures() -> None:
    facts = allocation_facts()
    together = figure(section(facts), "All units together")
    assert [trace["x"] for trace in together.spec["data"]] == [
        [each[key] for each in facts["prices"]["together"].values()] for key in ("measured_nats", "predicted_nats")
    ]
    assert [row[1] for row in together.tables[0].rows] == [
        nats(each["measured_nats"]) for each in facts["prices"]["together"].values()
    ]


def test_what_is_missing_is_left_out() -> None:
    facts = allocation_facts()
    assert section({}) is None
    bare = section({"predicted_kl_nats": 0.0, "units": []}, kl={})
    assert bare is not None
    assert bare.figures == bare.tables == ()
    unplaced = [{k: v for k, v in unit.items() if k not in ("block", "kind")} for unit in facts["units"]]
    made = section(facts | {"units": unplaced})
    assert made is not None
    assert [f.title.partition(" ")[0] for f in made.figures] == ["Predicted", "All"]
    assert made.tables


def test_an_allocation_that_is_none_is_refused() -> None:
    facts = allocation_facts()
    broken = copy.deepcopy(facts)
    broken["prices"]["units"][0]["widths"][0]["kl_nats"] = "dear"
    broken["units"][0]["bytes"] = None
    with pytest.raises(InputError, match=r"allocation\.units\.0\.bytes(.|\n)*allocation\.prices\.units\.0"):
        check_record(full_record() | {"allocation": broken}, "record")


def test_hostile_names_are_text() -> None:
    hostile = "<img src=x onerror=alert(1)>%{x}"
    facts = allocation_facts()
    for unit in facts["units"]:
        unit["kind"] = unit["role"] = unit["width"] = hostile
    assert "<img src=x" not in html.render(check_record(full_record() | {"allocation": facts}, "record"))


def test_no_single_width_is_claimed() -> None:
    page = html.render(check_record(full_record() | {"allocation": allocation_facts()}, "record"))
    assert "the checkpoint of mixed widths differs from the original" in page
    assert "int4 differs from the original" in html.render(check_record(full_record(), "record"))


def test_the_card_tells_widths_and_prediction_at_80_columns() -> None:
    data, facts = full_record(), allocation_facts()
    for texts in data["texts"].values():
        texts["tokens_given"] = texts["tokens"]
    out = io.StringIO()
    draw_card(check_record(data | {"allocation": facts, "errors": {}}, "record"), "out", Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.replace("│", " ").split())
    for width in {unit["width"] for unit in facts["units"]}:
        count = sum(unit["width"] == width for unit in facts["units"])
        assert f"{count} unit{'' if count == 1 else 's'} {width}" in said
    ratio = data["kl"]["kl_mean_nats"] / facts["predicted_kl_nats"]
    assert f"{facts['predicted_kl_nats']:.5f} nats a token: verified is {ratio:.2f} times that" in said
    assert "KL(bf16 || mixed)" in said
