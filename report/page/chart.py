"""What every chart shares: plotly's JSON, labels, logarithmic ticks and dotted lines.

plotly checks each property's name when a chart is made. A chart decides no colours: `meta.paint` names one, and the
page's script (page.js) puts in what that name means in light, dark or print. Texts of models and data go through
`label`, since plotly reads a few HTML tags in labels.
"""

import html
import json
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from ..shown import readable

LONGEST_LABEL = 40
# plotly's JSON of one chart.
Spec = dict[str, Any]


def label(text: str) -> str:
    """Text for plotly: no tag, no line break, not too long."""
    plain = " ".join(readable(text).split())
    cut = plain if len(plain) <= LONGEST_LABEL else plain[: LONGEST_LABEL - 1] + "…"
    # A dollar sign would be mathematics to plotly where MathJax is loaded; a percent sign before { a template.
    return html.escape(cut, quote=False).replace("%{", "%\u200b{")


def spec_of(traces: Sequence[Any], height: int, **layout: Any) -> Spec:
    """The JSON of a figure of `height` pixels."""
    figure = go.Figure(list(traces), {"height": height, **layout})
    figure.update_layout(template=None)
    return dict(json.loads(figure.to_json()))


def decades(low: float, high: float) -> tuple[list[int], list[str]]:
    """(places, names) of the ticks of a logarithmic axis whose values are given as log10."""
    values = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    every = max(1, math.ceil(len(values) / 7))
    return values[::every], [f"{10.0**v:g}".replace("e-0", "e-") for v in values[::every]]


def dotted(value: float, upright: bool) -> dict[str, Any]:
    """A dotted line through the whole chart at `value` of one axis: of the x axis if it is upright."""
    line = {"type": "line", "line": {"width": 1.5, "dash": "dot"}}
    if upright:
        return line | {"x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper"}
    return line | {"x0": 0, "x1": 1, "xref": "paper", "y0": value, "y1": value}


def above(x: float, text: str, **place: float) -> dict[str, Any]:
    """A name above the chart, for an upright line."""
    return {"x": x, "y": 1, "yref": "paper", "text": text, "showarrow": False, "yanchor": "bottom", **place}
