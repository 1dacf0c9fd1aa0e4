"""Coverage drawn: a table and a heat map for a terminal, one line for the card, and a standalone SVG.

A cell is one expert of one layer. Its shade is its rows over an even share (the layer's rows divided by its experts),
in powers of two, since routers differ by factors. An expert below `enough` rows is marked whatever its share.
"""

import math
from collections.abc import Sequence
from html import escape
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Bounds of the steps, in even shares, and what a terminal draws for each; the last step has no upper bound.
STEPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
BARS = "▁▂▃▄▅▆█"
NONE = "×"
COLOURS = ("#dbe9f6", "#bad6eb", "#89bedc", "#539ecd", "#2b7bba", "#0b559f", "#08306b")
STARVED, EMPTY = "#e8590c", "#c92a2a"

Counts = Sequence[Sequence[int]]


def step_of(count: int, layer: Sequence[int]) -> int:
    """The step that a count falls into."""
    even = sum(layer) / len(layer)
    return sum(count >= bound * even for bound in STEPS) if even else 0


def least_line(counts: Counts) -> str:
    """One character for each layer: its least expert against an even share."""
    return "".join(BARS[step_of(min(layer), layer)] if min(layer) else NONE for layer in counts)


def draw_coverage(title: str, blocks: Sequence[int], counts: Counts, enough: int, console: Console) -> None:
    """Print the heat map: one line for each layer, with the layer's figures beside it."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold", expand=False)
    for name in ("block", "experts", "min", "median", "max", "least share", "starved"):
        table.add_column(name, justify="left" if name in ("experts", "starved") else "right", no_wrap=name != "starved")
    for block, layer in zip(blocks, counts, strict=True):
        cells = Text()
        for count in layer:
            cell = BARS[step_of(count, layer)] if count else NONE
            cells.append(cell, EMPTY if not count else STARVED if count < enough else COLOURS[step_of(count, layer)])
        low = [f"{e} ({n:,})" for e, n in enumerate(layer) if n < enough]
        shown = ", ".join(low[:6]) + (f" and {len(low) - 6} more" if len(low) > 6 else "")
        share = min(layer) * len(layer) / max(1, sum(layer))
        table.add_row(
            str(block), cells, f"{min(layer):,}", f"{median(layer):,.0f}", f"{max(layer):,}", f"{share:.1%}", shown
        )
    console.print(table)
    bounds = "  ".join(f"{bar} {_step_name(i)}" for i, bar in enumerate(BARS))
    console.print(Text(f"rows against an even share: {bounds}  {NONE} none. Starved: below {enough:,} rows"))


def _fraction(share: float) -> str:
    return f"{share:g}" if share >= 1 else f"1/{1 / share:g}"


def _step_name(step: int) -> str:
    return f"< {_fraction(STEPS[step])}" if step < len(STEPS) else f">= {_fraction(STEPS[-1])}"


def svg(title: str, blocks: Sequence[int], counts: Counts, enough: int) -> str:
    """A standalone picture: a cell for each expert and layer with its count as a tooltip, and a legend."""
    experts = max(len(layer) for layer in counts)
    wide = min(34, max(9, 760 // experts))
    high = min(26, max(12, 620 // len(counts)))
    left, top = 64, 92
    right = left + wide * experts
    width, height = max(right + 96, 700), top + high * len(counts) + 96
    every = [count for layer in counts for count in layer]
    low = sum(count < enough for count in every)
    summary = (
        f"{len(every):,} experts, the least with {min(every):,} rows; {sum(c == 0 for c in every):,} without rows, "
        f"{low:,} below {enough:,}"
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#212529">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(24, 30, title, 'font-size="16" font-weight="600"'),
        _text(24, 52, summary, 'fill="#495057"'),
        _text(left + wide * experts / 2, top - 22, "expert", 'text-anchor="middle" fill="#495057"'),
        _text(right + 10, top - 6, "least", 'fill="#495057"'),
        _text(left - 10, top - 6, "block", 'text-anchor="end" fill="#495057"'),
    ]
    each = math.ceil(26 / wide)
    out += [
        _text(left + wide * (e + 0.5), top - 6, str(e), 'text-anchor="middle" font-size="10" fill="#495057"')
        for e in range(0, experts, each)
    ]
    for row, (block, layer) in enumerate(zip(blocks, counts, strict=True)):
        y = top + high * row
        out.append(_text(left - 10, y + high / 2 + 4, str(block), 'text-anchor="end" font-size="10" fill="#495057"'))
        for expert, count in enumerate(layer):
            share = count * len(layer) / max(1, sum(layer))
            told = f"block {block}, expert {expert}: {count:,} rows, {share:.2f} of an even share"
            out.append(_cell(left + wide * expert, y, wide, high, count, layer, enough, told))
        least = min(layer)
        colour = EMPTY if least == 0 else STARVED if least < enough else "#495057"
        out.append(_text(right + 10, y + high / 2 + 4, f"{least:,}", f'font-size="10" fill="{colour}"'))
    out += _legend(left, top + high * len(counts) + 34, enough)
    return "\n".join([*out, "</svg>", ""])


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def _cell(x: float, y: float, wide: int, high: int, count: int, layer: Sequence[int], enough: int, told: str) -> str:
    """One expert: its shade, a frame if it is starved, a cross if it got nothing."""
    inner = f'x="{x + 0.75:g}" y="{y + 0.75:g}" width="{wide - 1.5:g}" height="{high - 1.5:g}" rx="1.5"'
    cross = ""
    if count == 0:
        inner += f' fill="#ffe3e3" stroke="{EMPTY}"'
        a, b, c, d = x + wide / 2 - 3, y + high / 2 - 3, x + wide / 2 + 3, y + high / 2 + 3
        cross = f'<path d="M{a:g} {b:g}L{c:g} {d:g}M{a:g} {d:g}L{c:g} {b:g}" stroke="{EMPTY}" stroke-width="1.5"/>'
    elif count < enough:
        inner += f' fill="{COLOURS[step_of(count, layer)]}" stroke="{STARVED}" stroke-width="1.75"'
    else:
        inner += f' fill="{COLOURS[step_of(count, layer)]}"'
    return f"<g><title>{escape(told)}</title><rect {inner}/>{cross}</g>"


def _legend(x: float, y: float, enough: int) -> list[str]:
    out = [_text(x, y - 8, "rows of an expert against an even share of its layer's", 'fill="#495057"')]
    for step, colour in enumerate(COLOURS):
        out.append(f'<rect x="{x + 58 * step:g}" y="{y:g}" width="56" height="12" rx="1.5" fill="{colour}"/>')
        out.append(_text(x + 58 * step, y + 26, _step_name(step), 'font-size="10" fill="#495057"'))
    after = x + 58 * len(COLOURS) + 16
    # A made-up layer, in which the sample cells get their shades.
    layer = [10_000, 1]
    out.append(_cell(after, y - 1, 18, 14, 1, layer, 2, f"below {enough:,} rows"))
    out.append(_text(after + 24, y + 10, f"below {enough:,} rows", 'font-size="10"'))
    out.append(_cell(after, y + 18, 18, 14, 0, layer, 2, "no rows"))
    out.append(_text(after + 24, y + 29, "no rows", 'font-size="10"'))
    return out
