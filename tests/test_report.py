"""`onecard report`: what the page says of a record, what it refuses, that every figure has its table, and that texts of
models and data stay texts. What a browser makes of it: test_report_browser.py."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from onecard.core.errors import InputError
from onecard.core.record.reading import check_record, read_record
from onecard.report import html
from onecard.report.page import chart, parts
from records import full_record

Check = Callable[..., str]
# What nobody may run: as an element, as an attribute, as the end of a script or of a JSON block, as plotly's HTML.
HOSTILE = (
    "</script><img src=x onerror=hacked()>",
    "'\"><svg/onload=hacked()>",
    "]]><!--<script>hacked()</script>",
    "<a href='https://example.com/'>b</a><b>%{x}</b>{{7*7}}",
    "\u202eevil\u0000\u2028\x1b[31m\ud800",
)


class Elements(HTMLParser):
    """Counts elements, keeps scripts and all text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.shown: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "style" not in self.inside:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return "".join(self.shown)

    @property
    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(text) for attrs, text in self.scripts if attrs.get("type") == "application/json"]


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five megabytes of script a page are not what is tested here."""
    monkeypatch.setattr(html, "get_plotlyjs", lambda: "var Plotly = {};")


def page_of(data: dict[str, Any]) -> Elements:
    return Elements(html.render(check_record(data, "record")))


def poisoned(value: Any, hostile: str, path: tuple[str, ...] = ()) -> Any:
    """Every text of a record with something hostile at its end, but what the reader itself holds to be a number."""
    if isinstance(value, dict):
        return {
            key + (hostile if path[-1:] == ("units",) else ""): poisoned(v, hostile, (*path, key))
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [poisoned(entry, hostile, path) for entry in value]
    return value + hostile if isinstance(value, str) else value


def test_a_full_record_gives_every_section_and_every_figure_has_its_table() -> None:
    made = html.sections(check_record(full_record(), "record"))
    assert {section.key for section in made} == {*html.SECTIONS, "provenance"}
    drawn = [figure for section in made for figure in section.figures]
    assert len(drawn) == 13
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
    """Block and expert, in the words above the map, in the table's first row, and marked on the map."""
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
    if not path:  # sections are {} in a record where they were not asked for
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
    """The same elements with the same attributes as without; scripts as they were; the text itself is there to read."""
    plain, page = page_of(full_record()), page_of(poisoned(full_record(), hostile))
    assert page.tags == plain.tags
    code = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    assert code == [text for attrs, text in plain.scripts if attrs.get("type") != "application/json"]
    assert "".join(c if c.isprintable() else "\ufffd" for c in hostile.partition("\n")[0]) in page.text
    # Of texts, plotly gets no tag and no template.
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


def test_no_text_escapes_the_policy() -> None:
    """The scripts that the policy allows by digest are the two of the page, and no others."""
    page = html.render(check_record(poisoned(full_record(), HOSTILE[0]), "record"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none';")
    scripts = [text for attrs, text in Elements(page).scripts if not attrs]
    assert re.findall(r"'sha256-([^']+)'", policy) == [html._digest(text) for text in scripts]
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


# --- the command


def test_the_command_writes_a_page_and_one_line(onecard: Callable[..., Result], tmp_path: Path) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(json.dumps(full_record()))
    result = onecard("report", run, "-o", out)
    line = json.loads(result.stdout)
    assert line["bytes"] == out.stat().st_size
    assert line["figures"] == 13
    assert line["report"] == str(out)
    assert "13 charts" in result.stderr
    first = out.read_bytes()
    assert onecard("report", run, "-o", out).exit_code == 0, "a report is replaced by a report"
    assert out.read_bytes() == first


def test_a_finished_checkpoint_has_a_report(
    emitted: Callable[..., tuple[Path, Result]], onecard: Callable[..., Result], tmp_path: Path
) -> None:
    """The record that `quantize` really writes has all sections but those that it was not asked for."""
    folder, _ = emitted("scout")
    result = onecard("report", folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert {*html.SECTIONS, "provenance"} - set(line["sections"]) == {"flips"}
    text = Elements((tmp_path / "page.html").read_text()).text
    record = json.loads((folder / "onecard.json").read_text())
    assert f"{record['kl']['kl_mean_nats']:.5f}" in text
    assert f"{record['plan']['emitted_bytes']:,}" in text


def test_a_changed_scale_of_one_expert_is_named_as_the_worst(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """All the way: a tenth more in one scale tensor of the files, `verify`, and what the page says."""
    spoilt = Path(shutil.copytree(emitted("scout")[0], tmp_path / "spoilt"))
    name = "language_model.model.layers.1.feed_forward.experts.5.down_proj.weight_scale"
    (path,) = [path for path in spoilt.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] * 1.1}, path, metadata={"format": "pt"})
    record = tmp_path / "verify.json"
    assert onecard("verify", baby("scout"), spoilt, *texts[2:], "--record", record).exit_code == 0
    assert onecard("report", record, "-o", tmp_path / "page.html").exit_code == 0
    text = Elements((tmp_path / "page.html").read_text()).text
    assert "The worst is expert 5 of block 1," in text
    assert "block\u00a01, expert\u00a05" in text.partition("The worst experts")[2][:400]


def _changed(**changes: Any) -> str:
    return json.dumps(full_record() | changes)


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        ("{", ["JSON"]),
        ('{"schema_version": 2, "x": NaN}', ["NaN"]),
        ("[" * 100_000, ["JSON"]),
        ("[]", ["schema_version"]),
        ('{"model_type": "llama4"}', ["no record of onecard"]),
        (_changed(schema_version=99), ["99", "1 and 2"]),
        (_changed(model={}, plan={"emitted_bytes": "many"}), ["model.name", "plan.emitted_bytes"]),
        (_changed(kl={"tokens": 1}), ["kl.documents", "kl.kl_mean_nats"]),
        (_changed(kl=full_record()["kl"] | {"histogram": {"edges_nats": [0, 1], "tokens": [1, 2]}}), ["kl.histogram"]),
        (_changed(blocks=[{"block": 0, "expert_rows": ["a"]}] * 40), ["blocks.0.expert_rows", "and 28 more"]),
    ],
)
def test_what_is_no_record_is_refused(
    onecard: Callable[..., Result], refused: Check, tmp_path: Path, content: str, needles: list[str]
) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(content)
    refused(onecard("report", run, "-o", out), "run.json", *needles)
    assert not out.exists()


def test_what_is_not_there_is_refused(onecard: Callable[..., Result], refused: Check, tmp_path: Path) -> None:
    refused(onecard("report", tmp_path / "nothing", "-o", tmp_path / "p.html"), "nothing", "verify --record")
    refused(onecard("report", tmp_path, "-o", tmp_path / "p.html"), "onecard.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="JSON"):
        read_record(tmp_path / "binary")


def test_somebody_elses_file_is_not_replaced(onecard: Callable[..., Result], refused: Check, tmp_path: Path) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(json.dumps(full_record()))
    out.write_text("<p>mine</p>")
    refused(onecard("report", run, "-o", out), "page.html", "--overwrite")
    assert out.read_text() == "<p>mine</p>"
    refused(onecard("report", run, "-o", tmp_path), "folder")
    refused(onecard("report", run, "-o", tmp_path / "none" / "page.html"), "folder")
    assert onecard("report", run, "-o", out, "--overwrite").exit_code == 0
    assert html.is_report(out.read_bytes()[:4096])


def test_the_records_of_tests_hang_together() -> None:
    data = full_record(3)
    assert copy.deepcopy(data) == full_record(3)
    kl = data["kl"]
    assert sum(kl["histogram"]["tokens"]) == kl["tokens"] == sum(d["tokens"] for d in kl["by_document"])
    assert full_record(3, shift=1.1)["kl"]["kl_mean_nats"] == pytest.approx(1.1 * kl["kl_mean_nats"])
