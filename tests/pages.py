"""A report's page as a parser sees it, and records with hostile texts."""

import json
from html.parser import HTMLParser
from typing import Any

from onecard.core.record.reading import check_record
from onecard.report import html

# Texts that must never run: as an element, an attribute, the end of a script or of a JSON block, or plotly's HTML.
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


def page_of(data: dict[str, Any]) -> Elements:
    return Elements(html.render(check_record(data, "record")))


def poisoned(value: Any, hostile: str, path: tuple[str, ...] = ()) -> Any:
    """The record with `hostile` appended to every text, and to names of units, which are keys."""
    if isinstance(value, dict):
        return {
            key + (hostile if path[-1:] == ("units",) else ""): poisoned(v, hostile, (*path, key))
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [poisoned(entry, hostile, path) for entry in value]
    return value + hostile if isinstance(value, str) else value
