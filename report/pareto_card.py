"""The terminal card of `onecard pareto`, 80 columns wide: a curve of predicted KL against bytes, with named points."""

from collections.abc import Mapping
from math import log10
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.units import size

ROWS, COLUMNS = 14, 62
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The table lists about this many points of the curve: enough to choose a budget.
IN_TABLE = 6
# The KL axis ends at this share of the largest KL. Otherwise points that cost almost nothing take most of its height.
SHOWN_DOWN_TO = 1e-3
WIDEST = 80


def draw_pareto(facts: Mapping[str, Any], console: Console) -> None:
    """Print the card. `facts` comes from bits.pareto.Pareto.facts()."""
    named, curve = facts["named"], [point for point in facts["curve"] if point["predicted_kl_nats"] > 0]
    asked = facts["asked"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    table.add_column("widths", overflow="fold", max_width=34)
    for head in ("size", "bits", "KL, nats"):
        table.add_column(head, justify="right", no_wrap=True)

    def row(mark: str, name: str, point: Mapping[str, Any], style: str = "") -> None:
        kl = f"{point['predicted_kl_nats']:#.3g}"
        table.add_row(mark, name, size(point["bytes"]), f"{point['bits_per_weight']:.2f}", kl, style=style)

    for letter, point in zip(LETTERS, named, strict=False):
        row(letter, point["name"], point)
    step = max(1, len(curve) // IN_TABLE)
    for point in curve[::step]:
        row("•", "fit to this size", point)
    if asked is not None:
        row("★", "fit to the recipe's budget", asked, "bold")
    note = Text(
        f"predicted from {facts['price_rows']} rows, {facts['price_tokens']:,} tokens; the KL of a finished "
        "checkpoint is measured when it is made",
        style="dim",
    )
    parts: list[Any] = [_picture(curve, named, asked), table, note] if curve else [table, note]
    # A long path in the title must not widen the card.
    panel = Panel(Group(*parts), title=f"onecard pareto {facts['model']}", box=box.ROUNDED, expand=False)
    console.print(panel, width=min(WIDEST, console.width))


def _picture(curve: list[Any], named: list[Any], asked: Mapping[str, Any] | None) -> Text:
    """The plot. Its KL axis is logarithmic, since KL spans orders of magnitude."""
    floor = SHOWN_DOWN_TO * max(p["predicted_kl_nats"] for p in [*curve, *named])
    shown = [point for point in [*curve, *named] if point["predicted_kl_nats"] >= floor]
    left, right = min(p["bytes"] for p in shown), max(p["bytes"] for p in shown)
    heights = [log10(p["predicted_kl_nats"]) for p in shown]
    low, high = min(heights), max(heights)
    grid: list[list[str]] = [[" "] * COLUMNS for _ in range(ROWS)]

    def put(point: Mapping[str, Any], mark: str) -> None:
        x = round((point["bytes"] - left) / max(1, right - left) * (COLUMNS - 1))
        y = round((high - log10(point["predicted_kl_nats"])) / max(1e-9, high - low) * (ROWS - 1))
        grid[min(ROWS - 1, max(0, y))][min(COLUMNS - 1, max(0, x))] = mark

    marks = [*zip("•" * len(curve), curve, strict=True), *zip(LETTERS, named, strict=False)]
    for mark, point in [*marks, *([("★", asked)] if asked is not None else [])]:
        if floor <= point["predicted_kl_nats"]:
            put(point, mark)
    text = Text("KL, nats a token (log)\n", style="bold")
    for y, cells in enumerate(grid):
        tick = f"{10 ** (high - (high - low) * y / (ROWS - 1)):#.2g}" if y % 4 == 0 or y == ROWS - 1 else ""
        text.append(f"{tick:>8} {'┤' if tick else '│'}", style="dim")
        for cell in cells:
            text.append(cell, style="green" if cell == "•" else "bold yellow" if cell == "★" else "bold")
        text.append("\n")
    text.append(f"{'':9}└{'─' * COLUMNS}\n", style="dim")
    first, last = size(left), size(right)
    text.append(f"{'':10}{first}{'':{COLUMNS - len(first) - len(last)}}{last}", style="dim")
    return text
