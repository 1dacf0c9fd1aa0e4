"""What a page is made of, as plain values: sections with tables, figures and passages; and how numbers are printed.

Every part carries text only. The template escapes it; nothing here is markup.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core import units
from ...core.units import ABSENT
from ..shown import readable

# Keeps the two ends of an interval on one line.
KEPT = "\u00a0"
# Names of colours (page.css), taken in turn by things that have no colour of their own.
PAINTS = ("accent", "violet", "teal", "orange")


@dataclass(frozen=True)
class Table:
    """`columns` that begin with `>` hold numbers and stand flush right. A row's `mark` is its class, or ''."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, bool]]:
        return [(name.removeprefix(">"), name.startswith(">")) for name in self.columns]


@dataclass(frozen=True)
class Figure:
    """A chart: `spec` is plotly's JSON with colours left to the page's script; `tables` say the same in figures."""

    title: str
    spec: dict[str, Any]
    tables: tuple[Table, ...]
    note: str = ""


@dataclass(frozen=True)
class Guess:
    """A token that a model expected, and whether it is the one in the text."""

    text: str
    probability: float
    true: bool


@dataclass(frozen=True)
class Passage:
    """A token in its context, and the tokens that each model expected there, the likeliest first."""

    heading: str
    facts: str
    before: str
    token: str
    after: str
    reference: tuple[Guess, ...]
    quantized: tuple[Guess, ...]


@dataclass(frozen=True)
class Section:
    """`lede` sums it up in a sentence or two. `tables` are shown open; `folded` ones and a figure's own are closed."""

    key: str
    title: str
    lede: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    passages: tuple[Passage, ...] = ()
    more_passages: tuple[Passage, ...] = ()
    folded: tuple[Table, ...] = field(default=())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> Table:
    """Cells become text; None becomes a dash."""
    spelled = tuple(tuple(ABSENT if cell is None else plain(str(cell)) for cell in row) for row in rows)
    assert all(len(row) == len(columns) for row in spelled), title
    return Table(title, tuple(columns), spelled, note)


def plain(text: str) -> str:
    """Text without control characters, which could steer a reader's screen."""
    return KEPT.join(map(readable, text.split(KEPT)))


def nats(value: float | None) -> str:
    """About four significant digits: 0.01395, 1.23e-04, 3.079."""
    if value is None:
        return ABSENT
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.5f}" if abs(value) >= 0.001 or not value else f"{value:.2e}"


def between(low: float | None, high: float | None, spell: Callable[[float], str]) -> str:
    """`0.0133 to 0.0146` on one line, or a dash where there is no interval."""
    return units.between(low, high, spell, space=KEPT)


def count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def short(digest: str | None) -> str:
    return ABSENT if digest is None else digest[:16]
