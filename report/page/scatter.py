"""Charts over two axes of numbers: points by kind, points over a logarithmic axis, and curves."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from .chart import Spec, dotted, label, spec_of


def cloud(series: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]], x: str, y: str) -> Spec:
    """Points over two plain axes. `series`: (name, paint, points); a point is (x, y, what the mouse is told)."""
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
    return spec_of(
        traces,
        380,
        showlegend=True,
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}, "rangemode": "tozero"},
    )


def rising(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]],
    rings: Sequence[tuple[float, float]],
    ringed: str,
    x: str,
    y: str,
) -> Spec:
    """Points over a logarithmic y axis. `series` as those of `cloud`; `rings`: (x, y) of the points that get a ring;
    `ringed`: its name."""
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
    return spec_of(
        traces,
        400,
        showlegend=True,
        xaxis={"title": {"text": x}, "zeroline": False, "dtick": max(1, math.ceil(most / 8))},
        yaxis={"title": {"text": y}, "type": "log", "dtick": 1, "exponentformat": "power"},
    )


def curves(
    series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], x: str, y: str, line: float, mark: float
) -> Spec:
    """Lines over two plain axes. `series`: (name, paint, xs, ys). Dotted: `line` across at y, `mark` upright at x."""
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
    shapes = [dotted(line, upright=False), dotted(mark, upright=True)]
    axes = {"xaxis": {"title": {"text": x}, "rangemode": "tozero"}, "yaxis": {"title": {"text": y}}}
    return spec_of(traces, 380, shapes=shapes, showlegend=True, **axes)
