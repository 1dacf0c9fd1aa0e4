"""Sections on experts and on where error comes from: calibration rows, error by block and unit, the worst experts."""

import math
from itertools import cycle

from ...core.record.blocks import ErrorSummary, ExpertError
from ...core.record.schema import Record
from ...core.units import counted, percent
from . import figures, maps
from .parts import KEPT, PAINTS, Figure, Section, count, table


def coverage_section(record: Record) -> list[Section]:
    layers = [block for block in record.blocks if block.expert_rows]
    if not layers:
        return []
    enough = int(record.recipe.get("warn_below_expert_rows") or 0)
    cells, said, none, starved = [], [], [], []
    for row, block in enumerate(layers):
        even = sum(block.expert_rows) / len(block.expert_rows)
        cells.append([max(-4.0, min(4.0, math.log2(n / even))) if n and even else -4.0 for n in block.expert_rows])
        said.append(
            [
                f"block {block.block}, expert {e}: {n:,} rows, {n / even if even else 0:.2f} of an even share"
                for e, n in enumerate(block.expert_rows)
            ]
        )
        none += [(row, e) for e, n in enumerate(block.expert_rows) if not n]
        starved += [(row, e) for e, n in enumerate(block.expert_rows) if 0 < n < enough]
    ticks = [-4, -2, 0, 2, 4]
    bar = {
        "title": {"text": "rows against an even share of the block's", "side": "bottom"},
        "tickvals": ticks,
        "ticktext": ["1/16", "1/4", "even", "4 x", "16 x"],
    }
    marks = [
        maps.Marks("no rows", "x-thin-open", none),
        maps.Marks(f"below {enough:,} rows", "circle-open", starved),
    ]
    most = max(len(block.expert_rows) for block in layers)
    rows = [
        [str(block.block), *(f"{n:,}" for n in block.expert_rows), *([None] * (most - len(block.expert_rows)))]
        for block in layers
    ]
    every = [n for block in layers for n in block.expert_rows]
    lede = (
        f"Calibration rows of {counted(len(every), 'expert')} in {counted(len(layers), 'block')}: the least had "
        f"{min(every):,}, {len(none):,} had none"
        + (f", {len(none) + len(starved):,} fewer than {enough:,}." if enough else ".")
    )
    figure = Figure(
        "Calibration rows of every expert",
        maps.heat(cells, said, [block.block for block in layers], "shares", bar, marks),
        (table("Calibration rows of every expert", ("block", *(f">{e}" for e in range(most))), rows),),
    )
    return [Section("coverage", "Coverage of the experts", lede, (figure,))]


def _score(expert: ExpertError) -> str | None:
    return None if expert.score is None else f"{expert.score:.3g}"


def _said(expert: ExpertError) -> str:
    told = [f"output error {percent(expert.output_error)}"]
    told += [f"score {_score(expert)}"] if expert.score is not None else []
    told += [f"{expert.calibration_rows:,} calibration rows"] if expert.calibration_rows is not None else []
    return f"block {expert.block}, expert {expert.expert}: {', '.join(told)}"


def errors_sections(record: Record) -> list[Section]:
    if record.errors is None:
        return []
    return [*_origin(record), *_experts(record)]


def _origin(record: Record) -> list[Section]:
    blocks = record.errors.blocks if record.errors else ()
    if not blocks:
        return []
    numbers = [block.block for block in blocks]
    units = list(dict.fromkeys(unit for block in blocks for unit in block.units))
    halves = Figure(
        "Error that each block adds, and what has gathered",
        figures.over_blocks(
            numbers,
            [
                ("added by attention", "violet", [b.attention for b in blocks]),
                ("added by feed-forward", "accent", [b.feed_forward for b in blocks]),
            ],
            [("gathered in the hidden state", "orange", [b.hidden for b in blocks])],
            "relative error",
        ),
        (
            table(
                "Error by block",
                ("block", ">hidden state", ">attention adds", ">feed-forward adds"),
                [(b.block, percent(b.hidden, 3), percent(b.attention, 3), percent(b.feed_forward, 3)) for b in blocks],
            ),
        ),
    )
    drawn = [halves]
    if units:
        paints = dict(zip(units, cycle((*PAINTS, "muted", "bad")), strict=False))
        drawn.append(
            Figure(
                "Error that each unit adds",
                figures.over_blocks(
                    numbers, [], [(u, paints[u], [b.units.get(u) for b in blocks]) for u in units], "relative error"
                ),
                (
                    table(
                        "Error by block and unit",
                        ("block", *(f">{unit}" for unit in units)),
                        [(b.block, *(percent(b.units.get(unit), 3) for unit in units)) for b in blocks],
                    ),
                ),
                "How far the hidden state moves if this unit alone is quantized.",
            )
        )
    last = [b for b in blocks if b.hidden is not None]
    lede = f"After the last block the hidden state is off by {percent(last[-1].hidden)}." if last else "By block."
    return [Section("origin", "Where the error comes from", lede, tuple(drawn))]


def _experts(record: Record) -> list[Section]:
    errors = record.errors
    if errors is None or not (errors.experts or errors.worst_experts):
        return []
    worst = errors.worst_experts
    listed = [
        (
            f"block{KEPT}{e.block}, expert{KEPT}{e.expert}",
            _score(e),
            percent(e.output_error),
            percent(e.weight_error),
            None if e.weight_gain is None else f"{e.weight_gain:.4f}",
            count(e.rows),
            count(e.calibration_rows),
        )
        for e in worst
    ]
    columns = (
        "expert",
        ">score",
        ">output error",
        ">weight error",
        ">weight gain",
        ">evaluation rows",
        ">calibration rows",
    )
    how = (
        "Score: how far the expert's output error, or its weights' gain, stands out of its block, in robust standard "
        "deviations. Rounding leaves noise and a gain near one; a gain off one is the mark of a damaged scale."
    )
    tables = (table("The worst experts", columns, listed, how),) if worst else ()
    lede = "Errors are relative to the original expert's output on the same tokens."
    if worst:
        score = "" if worst[0].score is None else f", with a score of {_score(worst[0])}"
        lede = f"The worst is expert {worst[0].expert} of block {worst[0].block}{score}. {lede}"
    drawn = _error_map(errors)
    return [Section("experts", "Error of the experts", lede, () if drawn is None else (drawn,), tables)]


def _error_map(errors: ErrorSummary) -> Figure | None:
    """Output errors as a heat map, the worst experts marked; None where the record holds none."""
    worst = errors.worst_experts
    found = {(e.block, e.expert): e.output_error for e in errors.experts if e.output_error}
    if not found:
        return None
    said = {(e.block, e.expert): _said(e) for e in errors.experts}
    blocks = sorted({block for block, _ in said})
    width = 1 + max(expert for _, expert in said)
    grid = [[(block, expert) for expert in range(width)] for block in blocks]
    place = {block: row for row, block in enumerate(blocks)}
    return Figure(
        "Output error of every expert",
        maps.heat(
            [[math.log10(found[key]) if key in found else None for key in row] for row in grid],
            [[said.get(key, "") for key in row] for row in grid],
            blocks,
            "errors",
            maps.log_key(list(found.values()), "output error, relative (logarithmic)"),
            [
                maps.Marks(
                    f"the {len(worst)} that stand out most of their blocks",
                    "circle-open",
                    [(place[e.block], e.expert) for e in worst if e.block in place],
                )
            ],
        ),
        (
            table(
                "Output error of every expert",
                ("block", *(f">{e}" for e in range(width))),
                [[str(row[0][0]), *(percent(found.get(key)) for key in row)] for row in grid],
            ),
        ),
    )
