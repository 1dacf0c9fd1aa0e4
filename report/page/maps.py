"""Charts of cells and areas: heat maps of experts, tiles of units, a tree of bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from .chart import Spec, label, spec_of


@dataclass(frozen=True)
class Marks:
    """Cells of a heat map that get a symbol of plotly's. `places`: (row, expert)."""

    name: str
    symbol: str
    places: Sequence[tuple[int, int]]


def heat(
    cells: Sequence[Sequence[float | None]],
    said: Sequence[Sequence[str]],
    blocks: Sequence[int],
    scale: str,
    key: dict[str, Any],
    marks: Sequence[Marks],
) -> Spec:
    """Blocks downwards, experts across. `cells` and `said` [blocks][experts]: the value, and what the mouse is told;
    `scale` names a range of colours, `key` is its colour bar."""
    experts = max(map(len, cells))
    names = [str(block) for block in blocks]
    marked = [mark for mark in marks if mark.places]
    cell_map = go.Heatmap(
        z=[list(row) for row in cells],
        customdata=[list(row) for row in said],
        y=names,
        coloraxis="coloraxis",
        xgap=1 if experts <= 64 else 0,
        ygap=1 if len(blocks) <= 64 else 0,
        hovertemplate="%{customdata}<extra></extra>",
    )
    return spec_of(
        [cell_map, *(trace for mark in marked for trace in _mark_traces(mark, names))],
        170 + min(760, max(12, min(30, 900 // len(blocks))) * len(blocks)),
        coloraxis={
            "colorbar": {**key, **_KEY_PLACE},
            "cmin": key["tickvals"][0],
            "cmax": key["tickvals"][-1],
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


# The colour bar lies below the map.
_KEY_PLACE = {
    "orientation": "h",
    "yref": "container",
    "y": 0,
    "yanchor": "bottom",
    "ypad": 6,
    "thickness": 12,
    "lenmode": "fraction",
    "len": 0.9,
}


def _mark_traces(mark: Marks, names: Sequence[str]) -> list[go.Scatter]:
    """A wide stroke under a narrow one: seen on the lightest and on the darkest cell."""
    return [
        go.Scatter(
            name=mark.name,
            x=[expert for _, expert in mark.places],
            y=[names[row] for row, _ in mark.places],
            mode="markers",
            marker={"symbol": mark.symbol, "size": 10, "line": {"width": width}},
            hoverinfo="skip",
            cliponaxis=False,
            meta={"paint": paint},
            showlegend=paint == "mark",
        )
        for paint, width in (("halo", 5), ("mark", 2))
    ]


def log_key(values: Sequence[float], title: str) -> dict[str, Any]:
    """The colour bar of cells that hold log10 of `values`, from the least to the most."""
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 0.05:  # all alike: a range of some width, or the map would have one colour and no key
        low, high = low - 0.05, high + 0.05
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    return {"title": {"text": title, "side": "bottom"}, "tickvals": ticks, "ticktext": [f"{10**t:.2g}" for t in ticks]}


def tiles(
    series: Sequence[tuple[str, str, Sequence[tuple[int, int, str]]]], rows: Sequence[str], blocks: Sequence[int]
) -> Spec:
    """Blocks across, `rows` down, a tile painted by its kind. `series`: (name, paint, tiles); a tile is (row, block,
    what the mouse is told). They are bars on a base of their own: these stretch with the page and have a legend."""
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
    return spec_of(
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


def tree(entries: Sequence[tuple[str, str, int, str]], whole: str) -> Spec:
    """Areas in proportion to bytes. `entries`: (role, width, bytes, paint); a role holds its widths."""
    roles = list(dict.fromkeys(entry[0] for entry in entries))
    total = [sum(entry[2] for entry in entries if entry[0] == role) for role in roles]
    return spec_of(
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
