"""The page's section on a card's memory is drawn from the same facts as the terminal's card."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hollow import SCOUT, published, write_hollow
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError
from onecard.core.record.reading import check_record
from onecard.planner.cards import GIB, find_card
from onecard.planner.fit import Request
from onecard.planner.sizing import size_up
from onecard.report import html
from onecard.report.page.parts import Section
from records import full_record


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_hollow(tmp_path_factory.mktemp("hollow") / "scout", published(SCOUT))
    sizing = size_up(open_model(str(folder)), Request(131_072), find_card("h100-80gb")[1])
    return dict(json.loads(json.dumps(sizing.facts())))


def section(fit: dict[str, Any]) -> Section | None:
    made = html.sections(check_record(full_record() | {"fit": fit}, "record"))
    return next((each for each in made if each.key == "fit"), None)


def test_the_section_says_what_the_plan_said(facts: dict[str, Any]) -> None:
    made = section(facts)
    assert made is not None
    assert f"fits, {facts['left_bytes'] / GIB:,.2f} GiB left" in made.lede
    assert f"At most {facts['max_context']:,} tokens" in made.lede
    (total,) = made.tables
    assert [row[1] for row in total.rows] == [
        f"{facts[f'{key}_bytes'] / GIB:,.2f} GiB" for key in ("usable", "weight", "kv", "workspace", "left")
    ]
    assert all(warning in total.note for warning in facts["fit_warnings"])
    (cards,) = made.folded
    assert [row[0] for row in cards.rows] == [row["name"] for row in facts["table"]]
    assert "takes 2" in [row[2] for row in cards.rows]


def test_the_picture_has_the_curves_that_come_near_the_card(facts: dict[str, Any]) -> None:
    made = section(facts)
    assert made is not None
    (figure,) = made.figures
    near = [c for c in facts["curves"] if min(c["bytes"]) < 1.25 * facts["usable_bytes"]]
    assert 0 < len(near) < len(facts["curves"]), "bf16 is far above"
    assert [trace["name"] for trace in figure.spec["data"]] == [curve["name"] for curve in near]
    for trace, curve in zip(figure.spec["data"], near, strict=True):
        assert trace["y"][-1] == pytest.approx(curve["bytes"][-1] / GIB)
    across, upright = figure.spec["layout"]["shapes"]
    assert across["y0"] == pytest.approx(facts["usable_bytes"] / GIB)
    assert upright["x0"] == 131_072
    assert [row[0] for row in figure.tables[0].rows] == [c["name"] for c in facts["candidates"]]


def test_what_does_not_fit_says_so_and_no_plan_has_no_section(facts: dict[str, Any]) -> None:
    missing = section(facts | {"fits": False, "left_bytes": -3 * GIB})
    assert missing is not None
    assert "does not fit: 3.00 GiB too much" in missing.lede
    assert section({}) is None
    page = html.render(check_record(full_record() | {"fit": facts}, "record"))
    assert "Memory of the card" in page
    assert "Memory of the card" not in html.render(check_record(full_record(), "record"))


def test_a_plan_that_is_none_is_refused(facts: dict[str, Any]) -> None:
    broken = copy.deepcopy(facts)
    broken["curves"][0]["bytes"].pop()
    broken["left_bytes"] = "much"
    with pytest.raises(InputError, match=r"fit\.left_bytes"):
        check_record(full_record() | {"fit": broken}, "record")
    del broken["left_bytes"]
    with pytest.raises(InputError, match="contexts and"):
        check_record(full_record() | {"fit": broken | {"left_bytes": 1}}, "record")


def test_a_hostile_name_is_text(facts: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>%{x}"
    poisoned = copy.deepcopy(facts)
    for entry in (*poisoned["curves"], *poisoned["candidates"]):
        entry["name"] = hostile
    page = html.render(check_record(full_record() | {"fit": poisoned | {"candidate": hostile}}, "record"))
    assert "<img src=x" not in page
