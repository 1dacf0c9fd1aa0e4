"""Mean KL against stored bytes as an SVG, one panel for each model, written without a plotting library.

The lower left is better. KL has a logarithmic scale and its 95 % interval. Names stand in a column at the right, in the
order of their points, with a thin line to each.
"""

import math
from xml.sax.saxutils import escape

from rows import PeerRow

LEFT, TOP, WIDTH, HEIGHT, NAMES, GAP = 70, 40, 480, 400, 300, 60
LINE = 12  # between two names
COLOURS = {"own": "#c0392b", "calibrated": "#2c5f8a", "plain": "#7f8c8d"}


def _kind(row: PeerRow) -> str:
    if row.ours:
        return "own"
    return "calibrated" if row.calibrated else "plain"


def _ticks(low: float, high: float) -> list[float]:
    """Round multiples of powers of ten within the range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10.0**p <= high]


def _spread(wanted: list[float], low: float, high: float) -> list[float]:
    """Heights near the wanted ones, in the same order, at least LINE apart."""
    out: list[float] = []
    for y in wanted:
        out.append(max(y, out[-1] + LINE) if out else max(y, low))
    over = max(0.0, out[-1] - high) if out else 0.0
    for k in range(len(out) - 1, -1, -1):
        out[k] = min(out[k], high if k == len(out) - 1 else out[k + 1] - LINE) if over else out[k]
    return out


def _panel(rows: list[PeerRow], model: str, top: float) -> list[str]:
    sizes = [row.stored_bytes / 1e6 for row in rows]
    lows = [max(row.kl_low_nats, row.kl / 3) for row in rows]
    x_low, x_high = min(sizes) * 0.99, max(sizes) * 1.01
    y_low, y_high = min(lows) * 0.9, max(row.kl_high_nats for row in rows) * 1.1

    def x_of(size: float) -> float:
        return LEFT + (size - x_low) / (x_high - x_low) * WIDTH

    def y_of(kl: float) -> float:
        return top + HEIGHT * (1 - math.log(kl / y_low) / math.log(y_high / y_low))

    out = [
        f'<text x="{LEFT}" y="{top - 12}" class="title">{escape(model)}: mean KL (nats) against stored MB, '
        f"{escape(rows[0].set)} set</text>",
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    for tick in _ticks(y_low, y_high):
        y = y_of(tick)
        out.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    step = (x_high - x_low) / 5
    for k in range(6):
        size = x_low + k * step
        out.append(f'<text x="{x_of(size):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{size:.2f}</text>')
    ordered = sorted(rows, key=lambda row: -row.kl)
    heights = _spread([y_of(row.kl) for row in ordered], top + 6, top + HEIGHT)
    for row, height in zip(ordered, heights, strict=True):
        colour = COLOURS[_kind(row)]
        x, y = x_of(row.stored_bytes / 1e6), y_of(row.kl)
        ends = y_of(max(row.kl_low_nats, y_low)), y_of(row.kl_high_nats)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}" opacity="0.5"/>'
        )
        out.append(
            f'<polyline points="{x:.1f},{y:.1f} {LEFT + WIDTH:.1f},{height:.1f} {LEFT + WIDTH + 12:.1f},{height:.1f}" '
            f'fill="none" stroke="{colour}" opacity="0.25"/>'
        )
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        name = f"{row.peer} g{row.group}  {row.kl:.5f}"
        out.append(f'<text x="{LEFT + WIDTH + 15}" y="{height + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return out


def svg(rows: list[PeerRow]) -> str:
    drawn = [row for row in rows if row.status == "ok" and row.kl > 1e-6]
    models = list(dict.fromkeys(row.model for row in drawn))
    body = []
    for number, model in enumerate(models):
        body += _panel([row for row in drawn if row.model == model], model, TOP + number * (HEIGHT + GAP))
    width, height = LEFT + WIDTH + NAMES, TOP + max(1, len(models)) * (HEIGHT + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        "<style>text{font:11px sans-serif;fill:#333}.title{font-size:14px;font-weight:bold}</style>"
        f'<rect width="{width}" height="{height}" fill="white"/>' + "\n".join(body) + "</svg>\n"
    )
