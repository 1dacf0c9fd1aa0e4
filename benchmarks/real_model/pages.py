"""The words of an HTML page: paragraphs, headings, listings and formulas, without what surrounds them."""

import re
from html.parser import HTMLParser

SKIPPED = frozenset(("script", "style", "head", "nav", "footer"))
BLOCKS = frozenset(("p", "div", "section", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "tr", "pre", "table"))
VOID = frozenset(("img", "br", "hr", "meta", "link", "input", "col"))
# Classes of elements that hold links to other pages, or marks beside a text.
SKIPPED_CLASSES = frozenset(("toc", "docnav", "banner", "sphinxsidebar", "headerlink", "related", "viewcode-link"))


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.out: list[str] = []
        # The open element whose contents are left out, and how many of its name are open in it.
        self.skipped, self.depth, self.listing = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if self.skipped:
            self.depth += tag == self.skipped
            return
        marks = {*given.get("class", "").split(), given.get("id", ""), given.get("role", "")}
        if tag not in VOID and (tag in SKIPPED or marks & SKIPPED_CLASSES):
            self.skipped, self.depth = tag, 1
        elif tag == "img" and "math" in marks:
            self.out.append(f"${given.get('alt', '')}$")
        elif tag in BLOCKS:
            self.out.append("\n\n")
            self.listing += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth:
                self.skipped = ""
        elif tag in BLOCKS:
            self.out.append("\n\n")
            self.listing -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.out.append(data if self.listing else re.sub(r"\s+", " ", data))


def paragraphs(html: str) -> list[str]:
    """What a reader sees, in order."""
    words = _Words()
    words.feed(html)
    parts = (part.strip("\n").rstrip() for part in re.split(r"\n\s*\n", "".join(words.out)))
    return [part for part in parts if part.strip()]
