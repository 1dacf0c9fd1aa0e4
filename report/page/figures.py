"""Charts of one value for each label: histogram, dots with intervals, bars, columns over blocks."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from .chart import Spec, above, decades, dotted, label, spec_of
from .parts import nats

# (label, value, low, high, what the mouse is told)
Dot = tuple[str, float, float | None, float | None, str]


def histogram(edges: Sequence[float], counts: Sequence[int], marks: Sequence[tuple[str, float]]) -> Spec:
    """Bars over a logarithmic axis. `edges` rise from 0; the first bin has no logarithm and is drawn one step wide.
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
    ticks, names = decades(logs[0], logs[-1])
    return spec_of(
        [bars],
        340,
        xaxis={"title": {"text": "KL of a token, nats (logarithmic)"}, "tickvals": ticks, "ticktext": names},
        yaxis={"title": {"text": "share of tokens"}, "tickformat": ".0%"},
        shapes=[dotted(x, upright=True) for _, x in placed],
        annotations=[above(x, name, y=1.01 + 0.075 * (i % 2)) for i, (name, x) in enumerate(placed)],
        margin={"t": 58},
    )


def dots(
    series: Sequence[tuple[str, str, Sequence[Dot]]],
    axis: str,
    upright: bool = False,
    line: float | None = None,
    tick: str = "",
    zero: bool = True,
) -> Spec:
    """Values with their intervals. `series`: (name, paint, dots). Labels stand below if `upright`, else on the left.
    `line`: the value of all together, dotted. `zero`: the axis begins at 0."""
    traces = [_dot_trace(name, paint, entries, upright) for name, paint, entries in series]
    value: dict[str, Any] = {"title": {"text": axis}, "rangemode": "tozero", "tickformat": tick}
    if not zero:
        every = [end for _, _, entries in series for entry in entries for end in entry[1:4] if end is not None]
        room = 0.05 * (max(every) - min(every)) or 0.01
        value["range"] = [min(every) - room, max(every) + room]
    names = list(dict.fromkeys(label(entry[0]) for _, _, entries in series for entry in entries))
    kept = {"type": "category", "categoryorder": "array", "categoryarray": names}
    beside = {**kept, "autorange": "reversed", "automargin": True}
    several = len(series) > 1
    return spec_of(
        traces,
        320 if upright else 110 + 34 * len(names),
        xaxis=kept if upright else value,
        yaxis=value if upright else beside,
        scattermode="group" if several else "overlay",
        scattergap=0.5,
        showlegend=several,
        shapes=[] if line is None else [dotted(line, upright=not upright)],
    )


def _dot_trace(name: str, paint: str, entries: Sequence[Dot], upright: bool) -> go.Scatter:
    labels, values = [label(entry[0]) for entry in entries], [entry[1] for entry in entries]
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [0 if entry[3] is None else entry[3] - entry[1] for entry in entries],
        "arrayminus": [0 if entry[2] is None else entry[1] - entry[2] for entry in entries],
        "thickness": 1.5,
        "width": 5,
    }
    return go.Scatter(
        name=name,
        mode="lines+markers" if upright else "markers",
        orientation="v" if upright else "h",
        line={"width": 1},
        marker={"size": 9},
        x=labels if upright else values,
        y=values if upright else labels,
        error_y=whiskers if upright else None,
        error_x=None if upright else whiskers,
        customdata=[label(entry[4]) for entry in entries],
        meta={"paint": paint},
        hovertemplate="%{customdata}<extra></extra>",
    )


def bars(
    series: Sequence[tuple[str, str, Sequence[float]]],
    labels: Sequence[str],
    axis: str,
    tick: str = "",
    hover: str = "%{y}: %{x}",
    lines: Sequence[tuple[str, float]] = (),
) -> Spec:
    """Horizontal stacked bars. `series`: (name, paint, a value for each label); `lines`: (name, value), upright."""
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
    return spec_of(
        traces,
        164 + 42 * len(labels),
        barmode="stack",
        bargap=0.45,
        showlegend=len(series) > 1,
        margin={"t": 78 if lines else 36},
        xaxis={"title": {"text": axis}, "tickformat": tick, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True},
        shapes=[dotted(x, upright=True) for _, x in lines],
        annotations=[above(x, name, yshift=14 * (i % 2)) for i, (name, x) in enumerate(lines)],
    )


def over_blocks(
    blocks: Sequence[int],
    columns: Sequence[tuple[str, str, Sequence[float | None]]],
    lines: Sequence[tuple[str, str, Sequence[float | None]]],
    axis: str,
) -> Spec:
    """Values by block: `columns` side by side and `lines` over them, each (name, paint, a value for each block)."""
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
    return spec_of(
        traces,
        340,
        barmode="group",
        showlegend=True,
        xaxis={"title": {"text": "block"}, "dtick": max(1, math.ceil(len(blocks) / 16))},
        yaxis={"title": {"text": axis}, "tickformat": ".2~%", "rangemode": "tozero"},
    )


def nats_said(name: str, value: float, low: float | None, high: float | None) -> str:
    """What the mouse is told about a mean."""
    return f"{name}: {nats(value)}" + ("" if low is None or high is None else f" ({nats(low)} to {nats(high)})")
