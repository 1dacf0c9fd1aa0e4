"""The report in a real headless Chromium: it draws, logs nothing to the console, makes no request, and is as wide as
the screen.

Without Chromium (`make test` installs Debian's for root) these tests are skipped and say so.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from playwright.sync_api import Browser, Page, sync_playwright

from command_line import run_onecard
from pages import HOSTILE, poisoned
from records import full_record

CHARTS = 14
BINARIES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BINARIES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`, or `make chromium` as root")
    with sync_playwright() as playwright:
        # Without a sandbox: CI runs as root, where Chromium has none; the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@dataclass
class Seen:
    """An open page, its console messages and its requests."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failed: dict[str, str | None] = field(default_factory=dict)

    def colour(self, selector: str, which: str) -> str:
        return str(self.page.eval_on_selector(selector, f"e => getComputedStyle(e).{which}"))


@contextmanager
def opened(browser: Browser, file: Path, width: int = 1280, scheme: Any = "light") -> Iterator[Seen]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # a hang, not a slow machine
    page = context.new_page()
    seen = Seen(page)
    page.on("console", lambda message: seen.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.console.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    context.on("request", lambda request: seen.requests.append(request.url))
    context.on("requestfailed", lambda request: seen.failed.update({request.url: request.failure}))
    page.goto(file.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
    yield seen
    context.close()


def report_of(data: dict[str, Any], folder: Path, onecard: Callable[..., Result]) -> Path:
    (folder / "run.json").write_text(json.dumps(data))
    result = onecard("report", folder / "run.json", "-o", folder / "report.html")
    assert result.exit_code == 0, result.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_of(full_record(), tmp_path_factory.mktemp("report"), run_onecard)


def check_drawn(seen: Seen, charts: int) -> None:
    """Every chart has a drawing of nonzero size with marks in it."""
    drawn = seen.page.eval_on_selector_all(
        ".chart",
        """charts => charts.map(c => {
            const svg = c.querySelector("svg.main-svg"), box = svg?.getBoundingClientRect();
            return [c.id, box?.width ?? 0, box?.height ?? 0,
                    c.querySelectorAll(".point, .slice, .heatmaplayer image, .hm image, .scatterlayer path").length];
        })""",
    )
    assert len(drawn) == charts
    assert [chart for chart in drawn if min(chart[1:3]) < 100 or not chart[3]] == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_draws_in_silence_and_fits(chromium: Browser, full: Path, width: int, scheme: str) -> None:
    with opened(chromium, full, width, scheme) as seen:
        check_drawn(seen, CHARTS)
        assert seen.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") <= [width, width]
        for fold in seen.page.query_selector_all("summary"):
            fold.click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width, "nor with every table open"
        cut = seen.page.evaluate(
            "[...document.querySelectorAll('.chart')].filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.id)"
        )
        assert cut == []
        assert seen.console == []
        assert seen.requests == [full.as_uri()]


def test_charts_follow_a_change_from_light_to_dark(chromium: Browser, full: Path) -> None:
    def colours(seen: Seen) -> list[str]:
        return [
            seen.colour("html", "backgroundColor"),
            seen.colour("#kl-1 .point path", "fill"),
            seen.colour("#kl-1 .xtick text", "fill"),
            seen.colour("#widths-1 .slice path", "fill"),
        ]

    with opened(chromium, full) as seen:
        light = colours(seen)
        seen.page.emulate_media(color_scheme="dark")
        seen.page.wait_for_function(
            "was => getComputedStyle(document.querySelector('#widths-1 .slice path')).fill !== was", arg=light[3]
        )
        dark = colours(seen)
        assert all(a != b for a, b in zip(light, dark, strict=True))
        assert dark[1] == "rgb(110, 164, 247)", "the accent of page.css in the dark"
        seen.page.emulate_media(color_scheme="light")
        seen.page.wait_for_function(
            "was => getComputedStyle(document.querySelector('#widths-1 .slice path')).fill === was", arg=light[3]
        )
        assert colours(seen) == light
        assert seen.console == []


def test_print_is_light_and_as_wide_as_paper(chromium: Browser, full: Path, tmp_path: Path) -> None:
    """Printing switches to light colours and the paper's width, and restores the page afterwards."""
    with opened(chromium, full, scheme="dark") as seen:
        before = seen.colour("#kl-1 .point path", "fill")
        seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        seen.page.wait_for_function("document.querySelector('#kl-1 svg.main-svg').getAttribute('width') === '680'")
        printed = seen.colour("#kl-1 .point path", "fill")
        seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
        seen.page.wait_for_function("document.querySelector('#kl-1 svg.main-svg').getAttribute('width') !== '680'")
        assert seen.colour("#kl-1 .point path", "fill") == before != printed
        seen.page.pdf(path=tmp_path / "page.pdf", format="A4")
        assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
        assert seen.console == []


@pytest.mark.parametrize("hostile", [HOSTILE[0], "".join(reversed(HOSTILE))], ids=["script", "all"])
def test_hostile_texts_do_nothing(
    chromium: Browser, tmp_path: Path, onecard: Callable[..., Result], hostile: str
) -> None:
    """With it in every text of the record nothing runs, nothing is requested, and labels show it as text."""
    file = report_of(poisoned(full_record(), hostile), tmp_path, onecard)
    with opened(chromium, file) as seen:
        check_drawn(seen, CHARTS)
        for point in seen.page.query_selector_all("#kind-1 .point")[:2]:
            point.hover(force=True)  # the label by the mouse is drawn from data too
        found = seen.page.evaluate(
            """[typeof hacked, document.images.length, document.querySelectorAll("[onload], [onerror]").length,
                document.querySelectorAll(".chart a").length]"""
        )
        assert found == ["undefined", 0, 0, 0]
        assert seen.console == []
        assert seen.requests == [file.as_uri()]


def test_the_policy_stops_what_would_leave_the_page(chromium: Browser, full: Path) -> None:
    """Even if a foreign script or picture got into the page, the browser would not run or load it."""
    with opened(chromium, full) as seen:
        seen.page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.hacked = true";
                const picture = new Image();
                picture.src = "https://example.com/x.png";
                document.body.append(script, picture);
                document.body.insertAdjacentHTML("beforeend", "<p onclick='window.hacked = true' id='mine'>x</p>");
                document.getElementById("mine").click();
            }"""
        )
        seen.page.wait_for_timeout(200)
        assert seen.page.evaluate("window.hacked") is None
        assert all("Content Security Policy" in said for said in seen.console)
        assert len(seen.console) >= 2
        assert seen.failed == {"https://example.com/x.png": "csp"}


def test_a_record_of_little_draws_what_it_has(
    chromium: Browser, tmp_path: Path, onecard: Callable[..., Result]
) -> None:
    data = full_record()
    for key in ("errors", "flips", "gate", "blocks"):
        del data[key]
    data["kl"] = {key: data["kl"][key] for key in ("tokens", "documents", "kl_mean_nats", "histogram")}
    data["plan"]["widths"] = []
    file = report_of(data, tmp_path, onecard)
    with opened(chromium, file, 390) as seen:
        check_drawn(seen, 2)
        assert seen.console == []


def test_many_blocks_and_experts_fit_a_phone(chromium: Browser, tmp_path: Path, onecard: Callable[..., Result]) -> None:
    """Qwen3-30B-A3B's 48 blocks of 128 experts."""
    file = report_of(full_record(blocks=48, experts=128), tmp_path, onecard)
    assert file.stat().st_size < 10_000_000
    with opened(chromium, file, 390) as seen:
        check_drawn(seen, CHARTS)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert seen.console == []
