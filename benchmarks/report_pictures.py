"""Draw a record's report and take its pictures for docs/img/: on a screen, and on a phone.

    python benchmarks/report_pictures.py CHECKPOINT_OR_RECORD docs/img

Needs Chromium (`make chromium`) and the extra `dev`. The phone's page is long; it is cut into columns side by side.
"""

import io
import math
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from onecard.core.record.reading import read_record
from onecard.report.html import render

BINARIES = ("chromium", "chromium-browser", "google-chrome")
COLUMNS, GAP = 6, 16
# On a screen: the picture's name, its first element and its last.
SCREEN = (
    ("report-1280.png", "header", "#kl figure"),
    ("report-1280-experts.png", "#coverage", "#experts"),
)


def columns(page: Image.Image) -> Image.Image:
    """A long picture cut into columns of equal height."""
    height = math.ceil(page.height / COLUMNS)
    out = Image.new("RGB", ((page.width + GAP) * COLUMNS - GAP, height), "white")
    for number in range(COLUMNS):
        part = page.crop((0, height * number, page.width, min(height * (number + 1), page.height)))
        out.paste(part, ((page.width + GAP) * number, 0))
    return out


def save(picture: Image.Image, path: Path) -> None:
    """Save with a palette and without dithering, which would blur text."""
    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes")


def edge(page: Page, selector: str, side: str) -> int:
    return int(page.eval_on_selector(selector, f"e => e.getBoundingClientRect().{side} + scrollY"))


def main(run: Path, folder: Path) -> None:
    found = next(filter(None, map(shutil.which, BINARIES)), None)
    if found is None:
        sys.exit("no Chromium here: make chromium")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        file = Path(scratch) / "report.html"
        file.write_text(render(read_record(run)), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            page.goto(file.as_uri())
            page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            if width == 390:
                save(columns(picture), folder / "report-390.png")
            else:
                for name, first, last in SCREEN:
                    top, bottom = max(0, edge(page, first, "top") - GAP // 2), edge(page, last, "bottom") + GAP
                    save(picture.crop((0, top, width, bottom)), folder / name)
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
