"""Plots memory against context for each recipe in a terminal of 80 columns, with braille dots.

Each curve's end and its entry in the legend show the letter of its recipe. A dashed line marks the card's usable
memory. plotext could draw this too, but it would be another package to install in place of sixty lines, and it tells
curves apart by colours that a log cannot show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from .fit_card import GIB, letter, on_cards, short

COLOURS = ("blue", "magenta", "cyan", "green", "yellow", "red")
ROWS = 16
# The bits of a braille character's eight dots, by row and column (Unicode 28xx).
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
# Columns left of the picture: '1,234 ┤'.
MARGIN = 8
# The picture ends at this multiple of the card's usable memory.
HEADROOM = 1.25


def draw_plot(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the plot. `facts` is the result of sizing.Sizing.facts(); nothing is printed if it holds no curves."""
    curves = facts.get("curves")  # a plan without a card has none
    if not curves:
        return
    columns = min(console.width, 80) - MARGIN - 2
    end = curves[0]["contexts"][-1]
    usable = facts["usable_bytes"]
    ends = [min(curve["bytes"]) for curve in curves] + [usable]
    top = min(max(max(curve["bytes"]) for curve in curves), HEADROOM * usable)
    # If every recipe is far above the card, the smallest is still drawn, to show how far above it is.
    top = max(top, 1.05 * usable, 1.05 * min(max(curve["bytes"]) for curve in curves))
    # Weights take most of the memory, so the axis begins a little below the smallest recipe's curve, not at zero.
    low = max(0.0, min(ends) - 0.1 * (top - min(ends)))
    grid = [[0] * columns for _ in range(ROWS)]
    paint = [[-1] * columns for _ in range(ROWS)]
    for number, curve in enumerate(curves):
        for x in range(2 * columns):
            value = at(curve["contexts"], curve["bytes"], end * x / (2 * columns - 1))
            if value > top:
                continue
            y = min(4 * ROWS - 1, int((top - value) / (top - low) * 4 * ROWS))
            grid[y // 4][x // 2] |= DOTS[y % 4][x % 2]
            paint[y // 4][x // 2] = number
    line = min(ROWS - 1, int((top - usable) / (top - low) * ROWS))
    wanted = min(columns - 1, round(facts["context"] / end * (columns - 1)))
    ends_at = _letters(facts, curves, top, low)
    console.print(Text(f"GiB against tokens of context ({facts['sequences']} at once)", style="bold"))
    for y in range(ROWS):
        tick = f"{(top - (top - low) * y / ROWS) / GIB:,.0f}" if y % 4 == 0 and abs(y - line) > 1 else ""
        tick = f"{usable / GIB:,.1f}" if y == line else tick
        text = Text(f"{tick:>{MARGIN - 2}} {'┤' if tick else '│'}")
        for x in range(columns):
            if grid[y][x]:
                text.append(chr(0x2800 + grid[y][x]), style=COLOURS[paint[y][x] % len(COLOURS)])
            elif y == line:
                text.append("╌", style="red")
            else:
                text.append("┊" if x == wanted else " ", style="dim")
        text.append(ends_at.get(y, ""), style="bold")
        console.print(text)
    axis = "".join("┴" if x in (0, columns // 2, columns - 1) else "─" for x in range(columns))
    console.print(f"{'':{MARGIN - 1}}└{axis}")
    middle, last = short(end // 2), short(end)
    gap = columns // 2 - 1 - len(middle) // 2
    labels = f"{'':{MARGIN}}0{'':{gap}}{middle}"
    console.print(f"{labels}{'':{MARGIN + columns - len(labels) - len(last)}}{last}")
    legend = Text(" " * MARGIN)
    for number, curve in enumerate(curves):
        gone = min(curve["bytes"]) > top
        name = f"{letter(facts, curve['name'])} {curve['name']}{' (above)' if gone else ''}"
        if len(legend.plain.rpartition("\n")[2]) + len(name) + 5 > MARGIN + columns:
            legend.append("\n" + " " * MARGIN)
        legend.append("━━ ", style=COLOURS[number % len(COLOURS)])
        legend.append(name + "  ")
    legend.append("\n" + " " * MARGIN)
    legend.append("╌╌ ", style="red")
    legend.append(f"usable on {on_cards(facts)}  ")
    legend.append(f"┊ {facts['context']:,} asked", style="dim")
    console.print(legend)


def _letters(facts: Mapping[str, Any], curves: Sequence[Any], top: float, low: float) -> dict[int, str]:
    """Maps a row to the letter, as in the table of recipes, of the curve that ends there.

    If two curves end in one row, the lower curve's letter moves down to the next free row. A curve that leaves the
    picture at the top has no letter.
    """
    found: dict[int, str] = {}
    for curve in sorted(curves, key=lambda curve: -curve["bytes"][-1]):
        if curve["bytes"][-1] > top:
            continue
        row = min(ROWS - 1, int((top - curve["bytes"][-1]) / (top - low) * ROWS))
        row = next((y for y in range(row, ROWS) if y not in found), row)
        found[row] = letter(facts, curve["name"])
    return found


def at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The curve's value at `x`: linear between two points, and the value of the nearest end outside them."""
    for left, right, low, high in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= right:
            return low + (high - low) * max(0.0, x - left) / (right - left)
    return ys[-1]
