"""Memory against context for each recipe, drawn in a terminal of 80 columns with braille dots.

plotext would draw it too; it is another package to install for sixty lines, and it colours what a log cannot show. Each
curve has its own mark where it ends and in the legend; the card's usable memory is a line of dashes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from .fit_card import GIB, on_cards, short

COLOURS = ("blue", "magenta", "cyan", "green", "yellow", "red")
ROWS = 16
# Of a braille character's eight dots, by row and column (Unicode 28xx).
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
# Left of the picture: '1,234 ┤'. What is much above the card is not drawn.
MARGIN = 8
HEADROOM = 1.25


def draw_plot(facts: Mapping[str, Any], console: Console) -> None:
    """`facts`: of sizing.Sizing.facts(), with curves."""
    curves = facts.get("curves")  # a plan without a card has none
    if not curves:
        return
    columns = min(console.width, 80) - MARGIN - 2
    end = curves[0]["contexts"][-1]
    usable = facts["usable_bytes"]
    ends = [min(curve["bytes"]) for curve in curves] + [usable]
    top = min(max(max(curve["bytes"]) for curve in curves), HEADROOM * usable)
    top = max(top, 1.05 * usable)
    # Weights are most of it: the axis begins a little below the least of them.
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
    console.print(
        Text(f"GiB against tokens of context ({facts['sequences']} at once), the legend from the top", style="bold")
    )
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
        name = f"{curve['name']}{' (above)' if gone else ''}"
        if len(legend.plain.rpartition("\n")[2]) + len(name) + 5 > MARGIN + columns:
            legend.append("\n" + " " * MARGIN)
        legend.append("━━ ", style=COLOURS[number % len(COLOURS)])
        legend.append(name + "  ")
    legend.append("\n" + " " * MARGIN)
    legend.append("╌╌ ", style="red")
    legend.append(f"usable on {on_cards(facts)}  ")
    legend.append(f"┊ {facts['context']:,} asked", style="dim")
    console.print(legend)


def at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Between two points of a curve, straight; outside, its end."""
    for left, right, low, high in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= right:
            return low + (high - low) * max(0.0, x - left) / (right - left)
    return ys[-1]
