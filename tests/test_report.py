"""The page of `onecard report`: what it says of a record, every figure has its table, and texts stay texts.

What a browser shows of it: test_report_browser.py."""

import base64
import hashlib
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.core.record.reading import check_record
from onecard.report import html
from onecard.report.page import chart, parts
from pages import HOSTILE, Elements, page_of, poisoned
from records import full_record

pytestmark = pytest.mark.usefixtures("small_plotly")


def test_a_full_record_gives_every_section_and_every_figure_has_its_table() -> None:
    made = html.sections(check_record(full_record(), "record"))
    assert {section.key for section in made} == {*html.SECTIONS, "provenance"}
    drawn = [figure for section in made for figure in section.figures]
    assert len(drawn) == 14
    for figure in drawn:
        assert figure.tables, figure.title
        assert all(table.rows for table in figure.tables), figure.title
        assert figure.spec["data"], figure.title
    page = page_of(full_record())
    assert len(page.charts) == len(drawn)
    assert page.tags.count(("figure", ())) == len(drawn)
    for figure in drawn:
        for table in figure.tables:
            for row in table.rows:
                assert all(cell in page.text for cell in row)


def test_the_verdict_comes_first() -> None:
    data = full_record()
    text = page_of(data).text
    kl = data["kl"]
    for said in (
        f"{kl['kl_mean_nats']:.5f}",
        f"{kl['kl_low_nats']:.5f}",
        f"{kl['kl_high_nats']:.5f}",
        "92.46%",
        "passed",
        "64.85 GB",
        "80 GB",
        "60 documents",
        "1,200",
    ):
        assert 0 <= text.index(said) < text.index("Bytes on the card"), said
    data["gate"] = {"passed": True, "checks": [{"name": "max_fallbacks", "passed": True}]}
    assert "1 check: max fallbacks" in page_of(data).text
    data["gate"] = {"passed": False, "checks": [{"name": "kl", "passed": False}, {"name": "p99", "passed": True}]}
    text = page_of(data).text
    assert text.index("1 of 2 checks failed") < text.index("Held against its limits, 1 of 2 checks failed.")


def test_what_does_not_fit_is_said_not_to_fit() -> None:
    data = full_record()
    data["plan"]["emitted_bytes"] = 200 * 10**9
    text = page_of(data).text
    assert "fit no single card that is listed" in text
    data["plan"]["emitted_bytes"] = 80 * 10**9  # not a byte would be left
    assert "fit a card of 96 GB" in page_of(data).text


def test_the_worst_expert_is_named() -> None:
    """Block and expert are in the text above the map, in the table's first row, and marked on the map."""
    data = full_record()
    worst = {
        "block": 2,
        "expert": 11,
        "weight_error": 0.1,
        "output_error": 0.31,
        "weight_gain": 1.1,
        "rows": 90,
        "calibration_rows": 812,
        "score": 44.0,
    }
    data["errors"]["worst_experts"] = [worst, *data["errors"]["worst_experts"][:9]]
    (section,) = [s for s in html.sections(check_record(data, "record")) if s.key == "experts"]
    assert "The worst is expert 11 of block 2, with a score of 44." in section.lede
    first = section.tables[0].rows[0]
    assert first[0].replace("\u00a0", " ") == "block 2, expert 11"
    assert first[1:] == ("44", "31.00%", "10.00%", "1.1000", "90", "812")
    mark = section.figures[0].spec["data"][-1]
    assert (mark["x"][0], mark["y"][0]) == (11, "2")


def test_a_chart_holds_the_records_figures() -> None:
    data = full_record()
    by_key = {s.key: s for s in html.sections(check_record(data, "record"))}
    kl = data["kl"]
    (bars,) = by_key["kl"].figures[0].spec["data"]
    assert sum(bars["y"]) == pytest.approx(1)
    assert len(bars["x"]) == len(kl["histogram"]["tokens"])
    assert all(a < b for a, b in zip(bars["x"], bars["x"][1:], strict=False))
    (kinds,) = by_key["kind"].figures[0].spec["data"]
    assert kinds["x"] == [b["kl_mean_nats"] for b in kl["by_kind"]]
    ends = [x + up for x, up in zip(kinds["x"], kinds["error_x"]["array"], strict=True)]
    assert ends == pytest.approx([b["kl_high_nats"] for b in kl["by_kind"]])
    coverage = by_key["coverage"].figures[0]
    z = coverage.spec["data"][0]["z"]
    rows = data["blocks"][4]["expert_rows"]
    assert z[4][0] == pytest.approx(math.log2(rows[0] * len(rows) / sum(rows)), abs=1e-6)
    marked = {trace["name"]: (trace["x"], trace["y"]) for trace in coverage.spec["data"][1:]}
    assert marked == {"no rows": ([15], ["7"]), "below 256 rows": ([3], ["4"])}
    tree = by_key["widths"].figures[0].spec["data"][0]
    assert tree["values"][0] == sum(width["bytes"] for width in data["plan"]["widths"])
    sides = dict(zip(tree["ids"], tree["values"], strict=True))
    assert sides["role expert"] == sides["expert, int4 group 128"] == data["plan"]["widths"][0]["bytes"]


def test_the_same_record_gives_the_same_bytes() -> None:
    assert html.render(check_record(full_record(), "a")) == html.render(check_record(full_record(), "b"))
    assert html.render(check_record(full_record(1), "a")) != html.render(check_record(full_record(), "b"))


# --- parts that a record lacks


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("gate", "a gate"),
        ("plan", "bytes"),
        ("kl", "KL"),
        ("errors", "errors of experts"),
        ("flips", "flips"),
        ("blocks", "calibration rows of experts"),
        ("kl.histogram", ""),
        ("kl.by_position", "KL by position"),
        ("kl.by_document", "documents"),
        ("kl.worst_tokens", "worst tokens"),
        ("plan.widths", "widths"),
        ("errors.experts", ""),
        ("errors.blocks", "errors of blocks"),
        ("recipe", ""),
        ("texts", ""),
        ("machine", ""),
        ("checkpoint", ""),
        ("kl.interval", ""),
        ("plan.source_bytes", ""),
    ],
)
def test_a_part_that_is_not_there_is_left_out_and_said_to_be(lost: str, said: str) -> None:
    data = full_record()
    part: Any = data
    *path, last = lost.split(".")
    for key in path:
        part = part[key]
    del part[last]
    text = page_of(data).text
    assert said in text.partition("This record holds nothing on:")[2]
    part[last] = None if path else {} if last not in ("blocks",) else []
    if not path:  # a record has {} for sections that were not requested
        assert page_of(data).text == text


def test_a_record_with_nothing_measured_is_a_page_too() -> None:
    bare = {"command": "quantize", "onecard": "0.1.0", "schema_version": 1, "model": {"name": "m"}}
    text = page_of(bare).text
    assert "neither KL nor flips" in text
    assert "No KL was measured" in text


def test_one_document_has_no_interval() -> None:
    data = full_record()
    data["kl"] |= {
        "documents": 1,
        "kl_low_nats": None,
        "kl_high_nats": None,
        "same_top1_low": None,
        "same_top1_high": None,
        "perplexity_ratio_low": None,
    }
    for buckets in ("by_kind", "by_position", "by_confidence"):
        data["kl"][buckets] = [b | {"kl_low_nats": None, "kl_high_nats": None} for b in data["kl"][buckets]]
    text = page_of(data).text
    assert "On 1 document that" in text
    assert "no interval" in text
    assert "None" not in text


# --- texts stay texts


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_of_models_and_data_are_escaped(hostile: str) -> None:
    """Elements, attributes and scripts are the same as without the text, and the text itself can be read."""
    plain, page = page_of(full_record()), page_of(poisoned(full_record(), hostile))
    assert page.tags == plain.tags
    code = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    assert code == [text for attrs, text in plain.scripts if attrs.get("type") != "application/json"]
    assert "".join(c if c.isprintable() else "\ufffd" for c in hostile.partition("\n")[0]) in page.text
    # plotly gets no tag and no template out of texts.
    for drawn in page.charts:
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(drawn)):
            assert not re.search(r"<(?!br>|extra>|/extra>)", text), text
            assert "%{x}" not in text or "hacked" not in text


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
def test_any_text_can_be_shown(text: str) -> None:
    data = full_record(blocks=2, experts=4, documents=2)
    plain = page_of(data).tags
    data["model"]["name"] = data["checkpoint"]["name"] = data["warnings"][0] = text
    data["kl"]["by_kind"][0]["label"] = data["kl"]["worst_tokens"][0]["token"] = text
    data["kl"]["worst_tokens"][0]["reference_top"][0][0] = data["flips"]["tasks"][0]["task"] = text
    assert page_of(data).tags == plain


def sha256_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_no_text_escapes_the_policy() -> None:
    """The policy allows, by digest, exactly the page's two scripts."""
    page = html.render(check_record(poisoned(full_record(), HOSTILE[0]), "record"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none';")
    scripts = [text for attrs, text in Elements(page).scripts if not attrs]
    assert re.findall(r"'sha256-([^']+)'", policy) == [sha256_of(text) for text in scripts]
    assert len(scripts) == 2


def test_labels_and_numbers() -> None:
    assert chart.label("<b>x</b> & %{y}") == "&lt;b&gt;x&lt;/b&gt; &amp; %\u200b{y}"
    assert len(chart.label("x" * 500)) == chart.LONGEST_LABEL
    assert [parts.nats(v) for v in (None, 0.0, 0.0000123, 0.01395, 3.0785)] == [
        "–",
        "0.00000",
        "1.23e-05",
        "0.01395",
        "3.079",
    ]
