"""Charts of plain values, as plotly's JSON. plotly checks every property's name when a chart is made.

Colours are not decided here: `meta.paint` names one, and the page's script (page.js) puts in what that is in light,
dark or print. Texts of models and data go through `label`: plotly reads a few HTML tags in labels, and these stand as
text.
"""

import html
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from ..shown import readable
from .parts import nats

LONGEST_LABEL = 40


def label(text: str) -> str:
    """Text for plotly: no tag, no line break, not too long."""
    plain = " ".join(readable(text).split())
    cut = plain if len(plain) <= LONGEST_LABEL else plain[: LONGEST_LABEL - 1] + "…"
    # A dollar sign would be mathematics to plotly where MathJax is loaded; a percent sign before { a template.
    return html.escape(cut, quote=False).replace("%{", "%\u200b{")


def _spec(traces: Sequence[Any], height: int, **layout: Any) -> dict[str, Any]:
    figure = go.Figure(list(traces), {"height": height, **layout})
    figure.update_layout(template=None)
    return dict(json.loads(figure.to_json()))


def _decades(low: float, high: float) -> tuple[list[int], list[str]]:
    """Ticks of a logarithmic axis whose values are given as log10."""
    values = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    every = max(1, math.ceil(len(values) / 7))
    return values[::every], [f"{10.0**v:g}".replace("e-0", "e-") for v in values[::every]]


def histogram(edges: Sequence[float], counts: Sequence[int], marks: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Bars over a logarithmic axis. `edges` rise from 0; the first bin, which has no logarithm, is drawn one step wide.
    `marks`: (name, value) of upright lines."""
    logs = [math.log10(edge) for edge in edges[1:]]
    logs.insert(0, logs[0] - (logs[1] - logs[0]))
    total = max(1, sum(counts))
    bars = go.Bar(
        x=[(a + b) / 2 for a, b in pairwise(logs)],
        width=[(b - a) * 0.94 for a, b in pairwise(logs)],
        y=[n / total for n in counts],
        customdata=[[f"{a:.3g}", f"{b:.3g}", f"{n:,}"] for a, b, n in zip(edges, edges[1:], counts, strict=False)],
        hovertemplate="%{customdata[0]} to %{customdata[1]} nats<br>%{customdata[2]} tokens, %{y:.2%}<extra></extra>",
        meta={"paint": "accent"},
    )
    placed = [(name, min(max(math.log10(value), logs[0]), logs[-1])) for name, value in marks if value > 0]
    ticks, names = _decades(logs[0], logs[-1])
    return _spec(
        [bars],
        340,
        xaxis={"title": {"text": "KL of a token, nats (logarithmic)"}, "tickvals": ticks, "ticktext": names},
        yaxis={"title": {"text": "share of tokens"}, "tickformat": ".0%"},
        shapes=[
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1.5, "dash": "dot"}}
            for _, x in placed
        ],
        annotations=[
            {
                "x": x,
                "y": 1.01 + 0.075 * (i % 2),
                "yref": "paper",
                "text": name,
                "showarrow": False,
                "yanchor": "bottom",
            }
            for i, (name, x) in enumerate(placed)
        ],
        margin={"t": 58},
    )


Dot = tuple[str, float, float | None, float | None, str]


def dots(
    series: Sequence[tuple[str, str, Sequence[Dot]]],
    axis: str,
    upright: bool = False,
    line: float | None = None,
    tick: str = "",
    zero: bool = True,
) -> dict[str, Any]:
    """Values with their intervals. `series`: (name, paint, dots); a dot is (label, value, low, high, what is said of
    it). Labels stand below (`upright`) or on the left; `line` is drawn across, at the value of all together."""
    traces = []
    for name, paint, entries in series:
        labels, values = [label(entry[0]) for entry in entries], [entry[1] for entry in entries]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [0 if entry[3] is None else entry[3] - entry[1] for entry in entries],
            "arrayminus": [0 if entry[2] is None else entry[1] - entry[2] for entry in entries],
            "thickness": 1.5,
            "width": 5,
        }
        traces.append(
            go.Scatter(
                name=name,
                mode="lines+markers" if upright else "markers",
                orientation="v" if upright else "h",
                line={"width": 1},
                marker={"size": 9},
                x=labels if upright else values,
                y=values if upright else labels,
                error_y=bars if upright else None,
                error_x=None if upright else bars,
                customdata=[label(entry[4]) for entry in entries],
                meta={"paint": paint},
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    value: dict[str, Any] = {"title": {"text": axis}, "rangemode": "tozero", "tickformat": tick}
    if not zero:
        every = [end for _, _, entries in series for entry in entries for end in entry[1:4] if end is not None]
        room = 0.05 * (max(every) - min(every)) or 0.01
        value["range"] = [min(every) - room, max(every) + room]
    across = {"line": {"width": 1.5, "dash": "dot"}, "type": "line"}
    shapes = []
    if line is not None:
        ends = (
            {"x0": 0, "x1": 1, "xref": "paper", "y0": line, "y1": line}
            if upright
            else {"y0": 0, "y1": 1, "yref": "paper", "x0": line, "x1": line}
        )
        shapes = [across | ends]
    names = list(dict.fromkeys(label(entry[0]) for _, _, entries in series for entry in entries))
    kept = {"type": "category", "categoryorder": "array", "categoryarray": names}
    beside = {**kept, "autorange": "reversed", "automargin": True}
    several = len(series) > 1
    return _spec(
        traces,
        320 if upright else 110 + 34 * len(names),
        xaxis=kept if upright else value,
        yaxis=value if upright else beside,
        scattermode="group" if several else "overlay",
        scattergap=0.5,
        showlegend=several,
        shapes=shapes,
    )


def bars(
    series: Sequence[tuple[str, str, Sequence[float]]],
    labels: Sequence[str],
    axis: str,
    tick: str = "",
    hover: str = "%{y}: %{x}",
    lines: Sequence[tuple[str, float]] = (),
) -> dict[str, Any]:
    """Bars that lie, their parts end to end. `series`: (name, paint, a value for each label)."""
    traces = [
        go.Bar(
            name=label(name),
            orientation="h",
            y=[label(text) for text in labels],
            x=list(values),
            meta={"paint": paint},
            hovertemplate=f"{hover}<extra>%{{fullData.name}}</extra>",
        )
        for name, paint, values in series
    ]
    return _spec(
        traces,
        164 + 42 * len(labels),
        barmode="stack",
        bargap=0.45,
        showlegend=len(series) > 1,
        margin={"t": 78 if lines else 36},
        xaxis={"title": {"text": axis}, "tickformat": tick, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True},
        shapes=[
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1.5, "dash": "dot"}}
            for _, x in lines
        ],
        annotations=[
            {
                "x": x,
                "y": 1,
                "yshift": 14 * (i % 2),
                "yref": "paper",
                "text": name,
                "showarrow": False,
                "yanchor": "bottom",
            }
            for i, (name, x) in enumerate(lines)
        ],
    )


def over_blocks(
    blocks: Sequence[int],
    columns: Sequence[tuple[str, str, Sequence[float | None]]],
    lines: Sequence[tuple[str, str, Sequence[float | None]]],
    axis: str,
) -> dict[str, Any]:
    """What happens from block to block: `columns` side by side, `lines` over them; (name, paint, value a block)."""
    said = "block %{x}: %{y:.3%}<extra>%{fullData.name}</extra>"
    traces = [
        go.Bar(name=label(name), x=list(blocks), y=list(values), meta={"paint": paint}, hovertemplate=said)
        for name, paint, values in columns
    ]
    traces += [
        go.Scatter(
            name=label(name),
            x=list(blocks),
            y=list(values),
            mode="lines+markers",
            line={"width": 2},
            meta={"paint": paint},
            hovertemplate=said,
        )
        for name, paint, values in lines
    ]
    return _spec(
        traces,
        340,
        barmode="group",
        showlegend=True,
        xaxis={"title": {"text": "block"}, "dtick": max(1, math.ceil(len(blocks) / 16))},
        yaxis={"title": {"text": axis}, "tickformat": ".2~%", "rangemode": "tozero"},
    )


def heat(
    cells: Sequence[Sequence[float | None]],
    said: Sequence[Sequence[str]],
    blocks: Sequence[int],
    scale: str,
    bar: dict[str, Any],
    marks: Sequence[tuple[str, str, Sequence[tuple[int, int]]]],
) -> dict[str, Any]:
    """Blocks downwards, experts across. `cells` and `said` [blocks][experts]; `scale` names a range of colours,
    `bar` is its key beside the map; `marks`: (name, plotly's symbol, (row, expert) of each)."""
    experts = max(map(len, cells))
    names = [str(block) for block in blocks]
    traces: list[Any] = [
        go.Heatmap(
            z=[list(row) for row in cells],
            customdata=[list(row) for row in said],
            y=names,
            coloraxis="coloraxis",
            xgap=1 if experts <= 64 else 0,
            ygap=1 if len(blocks) <= 64 else 0,
            hovertemplate="%{customdata}<extra></extra>",
        )
    ]
    marked = [mark for mark in marks if mark[2]]
    for name, symbol, places in marked:
        # A wide stroke under a narrow one: seen on the lightest and on the darkest cell.
        for paint, width in (("halo", 5), ("mark", 2)):
            traces.append(
                go.Scatter(
                    name=name,
                    x=[expert for _, expert in places],
                    y=[names[row] for row, _ in places],
                    mode="markers",
                    marker={"symbol": symbol, "size": 10, "line": {"width": width}},
                    hoverinfo="skip",
                    cliponaxis=False,
                    meta={"paint": paint},
                    showlegend=paint == "mark",
                )
            )
    return _spec(
        traces,
        170 + min(760, max(12, min(30, 900 // len(blocks))) * len(blocks)),
        coloraxis={
            "colorbar": {
                **bar,
                "orientation": "h",
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "ypad": 6,
                "thickness": 12,
                "lenmode": "fraction",
                "len": 0.9,
            },
            "cmin": bar["tickvals"][0],
            "cmax": bar["tickvals"][-1],
        },
        xaxis={
            "title": {"text": "expert"},
            "dtick": max(1, math.ceil(experts / 16)),
            "range": [-0.5, experts - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "title": {"text": "block"},
            "type": "category",
            "range": [len(blocks) - 0.5, -0.5],
            "showgrid": False,
            "tick0": 0,
            "dtick": max(1, math.ceil(len(blocks) / 24)),
        },
        margin={"b": 104},
        meta={"scale": scale},
        showlegend=bool(marked),
    )


def cloud(series: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]], x: str, y: str) -> dict[str, Any]:
    """A point a thing, by kind; (across, up, what is said of it)."""
    traces = [
        go.Scatter(
            name=label(name),
            mode="markers",
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            customdata=[label(p[2]) for p in points],
            marker={"size": 8, "opacity": 0.75},
            hovertemplate="%{customdata}<extra></extra>",
            meta={"paint": paint},
        )
        for name, paint, points in series
    ]
    return _spec(
        traces,
        380,
        showlegend=True,
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}, "rangemode": "tozero"},
    )


def tree(entries: Sequence[tuple[str, str, int, str]], whole: str) -> dict[str, Any]:
    """Areas as large as bytes. `entries`: (role, width, bytes, paint); a role holds its widths."""
    roles = list(dict.fromkeys(entry[0] for entry in entries))
    total = [sum(entry[2] for entry in entries if entry[0] == role) for role in roles]
    return _spec(
        [
            go.Treemap(
                ids=[
                    "all",
                    *(f"role {label(r)}" for r in roles),
                    *(f"{label(r)}, {label(w)}" for r, w, _, _ in entries),
                ],
                labels=[label(whole), *map(label, roles), *(label(w) for _, w, _, _ in entries)],
                parents=["", *("all" for _ in roles), *(f"role {label(r)}" for r, *_ in entries)],
                values=[sum(total), *total, *(count for _, _, count, _ in entries)],
                branchvalues="total",
                texttemplate="%{label}<br>%{percentRoot:.1%}",
                hovertemplate="%{id}<br>%{value:,} bytes, %{percentRoot:.2%}<extra></extra>",
                tiling={"pad": 2},
                pathbar={"visible": False},
                meta={"paint": ["panel", *("panel" for _ in roles), *(paint for *_, paint in entries)]},
            )
        ],
        420,
        margin={"t": 8, "b": 8, "l": 0, "r": 0},
    )


def curves(
    series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], x: str, y: str, line: float, mark: float
) -> dict[str, Any]:
    """Lines over a plain axis. `series`: (name, paint, xs, ys); `line` is drawn across, `mark` upright."""
    traces = [
        go.Scatter(
            name=label(name),
            mode="lines",
            x=list(xs),
            y=list(ys),
            meta={"paint": paint},
            hovertemplate="%{x:,}: %{y:.2f}<extra>%{fullData.name}</extra>",
        )
        for name, paint, xs, ys in series
    ]
    dotted = {"type": "line", "line": {"width": 1.5, "dash": "dot"}}
    across = {"x0": 0, "x1": 1, "xref": "paper", "y0": line, "y1": line}
    shapes = [dotted | across, dotted | {"x0": mark, "x1": mark, "y0": 0, "y1": 1, "yref": "paper"}]
    axes = {"xaxis": {"title": {"text": x}, "rangemode": "tozero"}, "yaxis": {"title": {"text": y}}}
    return _spec(traces, 380, shapes=shapes, showlegend=True, **axes)


def log_key(values: Sequence[float], title: str) -> dict[str, Any]:
    """The key of a logarithmic range of colours (log10 of the values), from the least to the most."""
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 0.05:  # all alike: a range of some width, or the map would have one colour and no key
        low, high = low - 0.05, high + 0.05
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    return {"title": {"text": title, "side": "bottom"}, "tickvals": ticks, "ticktext": [f"{10**t:.2g}" for t in ticks]}


def nats_said(name: str, value: float, low: float | None, high: float | None) -> str:
    """What the mouse is told of a mean."""
    return f"{name}: {nats(value)}" + ("" if low is None or high is None else f" ({nats(low)} to {nats(high)})")


def tiles(
    series: Sequence[tuple[str, str, Sequence[tuple[int, int, str]]]], rows: Sequence[str], blocks: Sequence[int]
) -> dict[str, Any]:
    """Blocks across, `rows` down, a tile for each thing, painted by its kind. `series`: (name, paint, (row, block, what
    is said of it)). Bars on a base of their own, since they stretch with the page and have a legend."""
    traces = [
        go.Bar(
            name=label(name),
            x=[block for _, block, _ in entries],
            y=[0.84] * len(entries),
            base=[row - 0.42 for row, _, _ in entries],
            width=0.92,
            customdata=[label(said) for *_, said in entries],
            meta={"paint": paint},
            hovertemplate="%{customdata}<extra></extra>",
        )
        for name, paint, entries in series
    ]
    return _spec(
        traces,
        150 + 34 * len(rows),
        barmode="overlay",
        showlegend=True,
        xaxis={
            "title": {"text": "block"},
            "dtick": max(1, math.ceil((max(blocks) - min(blocks) + 1) / 8)),
            "range": [min(blocks) - 0.6, max(blocks) + 0.6],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": ["<br>".join(map(label, name.rsplit(".", 1))) for name in rows],
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    )


def rising(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]],
    rings: Sequence[tuple[float, float]],
    ringed: str,
    x: str,
    y: str,
) -> dict[str, Any]:
    """Points over a logarithmic axis upwards: (across, up, what is said of it) by kind; `rings` around some of them."""
    traces = [
        go.Scatter(
            name=label(name),
            mode="markers",
            x=[point[0] for point in points],
            y=[point[1] for point in points],
            customdata=[label(point[2]) for point in points],
            marker={"size": 5},
            meta={"paint": paint},
            hovertemplate="%{customdata}<extra></extra>",
        )
        for name, paint, points in series
    ]
    most = max(point[0] for _, _, points in series for point in points)
    if rings:
        traces.append(
            go.Scatter(
                name=ringed,
                mode="markers",
                x=[place[0] for place in rings],
                y=[place[1] for place in rings],
                marker={"symbol": "circle-open", "size": 10, "line": {"width": 1.2}},
                meta={"paint": "mark"},
                hoverinfo="skip",
            )
        )
    return _spec(
        traces,
        400,
        showlegend=True,
        xaxis={"title": {"text": x}, "zeroline": False, "dtick": max(1, math.ceil(most / 8))},
        yaxis={"title": {"text": y}, "type": "log", "dtick": 1, "exponentformat": "power"},
    )
