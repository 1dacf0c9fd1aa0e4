"""Sections on the weights: bytes on the card, widths, rows of every expert, and where the error comes from."""

import math
from dataclasses import dataclass
from itertools import cycle

from ..card import counted, size
from ..reading import ExpertError, Record
from . import figures
from .parts import KEPT, Figure, Section, count, percent, table


@dataclass(frozen=True)
class Card:
    """A card by the memory that its name promises, in decimal GB: what a driver shows is a little more, so that what is
    said to fit does fit."""

    gigabytes: int
    examples: str

    @property
    def bytes(self) -> int:
        return self.gigabytes * 10**9

    @property
    def size(self) -> str:
        return f"{self.gigabytes} GB"


CARDS = (
    Card(16, "RTX 5060 Ti, T4"),
    Card(24, "RTX 4090, L4"),
    Card(32, "RTX 5090"),
    Card(48, "L40S"),
    Card(80, "A100, H100"),
    Card(96, "RTX PRO 6000"),
    Card(141, "H200"),
    Card(192, "B200, MI300X"),
)
# A card is drawn beside the bars when the weights take at least this share of it.
WORTH_DRAWING = 0.1
PAINTS = ("accent", "violet", "teal", "orange")


def smallest_card(weight_bytes: int) -> Card | None:
    """The smallest card that holds the weights and has any room left."""
    return next((card for card in CARDS if card.bytes > weight_bytes), None)


def bytes_section(record: Record) -> list[Section]:
    plan = record.plan
    if plan is None:
        return []
    entries = [("original", [plan.source_bytes, 0], "muted")] if plan.source_bytes else []
    widths: dict[str, int] = {}
    for entry in plan.widths:
        widths[entry.width] = widths.get(entry.width, 0) + entry.bytes
    parts = sorted(widths.items(), key=lambda item: -item[1]) or [("quantized", plan.emitted_bytes)]
    entries += [(name, [0, nbytes], paint) for (name, nbytes), paint in zip(parts, cycle(PAINTS), strict=False)]
    unit, word = (1e9, "GB") if plan.emitted_bytes >= 1e8 else (1e6, "MB")
    most = max(plan.emitted_bytes, plan.source_bytes or 0)
    cards = [card for card in CARDS if WORTH_DRAWING * card.bytes < plan.emitted_bytes and card.bytes < 1.2 * most]
    spec = figures.bars(
        [(name, paint, [value / unit for value in values]) for name, values, paint in entries],
        ["original", "quantized"],
        f"{word} (decimal)",
        hover="%{x:.3f} " + word,
        lines=[(card.size, card.bytes / unit) for card in cards if card.gigabytes not in (16, 32, 96)],
    )
    rows = [("original", f"{plan.source_bytes:,}", size(plan.source_bytes))] if plan.source_bytes else []
    rows.append(("quantized, files with their headers", f"{plan.emitted_bytes:,}", size(plan.emitted_bytes)))
    rows += [(f"of it {name}", f"{nbytes:,}", size(nbytes)) for name, nbytes in parts if widths]
    fit = [
        (
            f"{card.size} ({card.examples})",
            "yes" if card.bytes > plan.emitted_bytes else "no",
            size(card.bytes - plan.emitted_bytes) if card.bytes > plan.emitted_bytes else None,
        )
        for card in CARDS
    ]
    lede = f"{size(plan.emitted_bytes)} of weights"
    if plan.source_bytes:
        lede += f", from {size(plan.source_bytes)}"
    if plan.quantized_share is not None and plan.quantized_bits_per_weight is not None:
        lede += (
            f"; {percent(plan.quantized_share, 1)} of the weights are quantized, to "
            f"{plan.quantized_bits_per_weight:.3f} bits each with their scales"
        )
    figure = Figure(
        "Bytes of the weights",
        spec,
        (
            table("Bytes of the weights", ("what", ">bytes", ">size"), rows),
            table(
                "Cards",
                ("card", "weights fit", ">left"),
                fit,
                "What is left holds the KV cache, activations and the engine itself.",
            ),
        ),
    )
    return [Section("bytes", "Bytes on the card", lede + ".", (figure,))]


def widths_section(record: Record) -> list[Section]:
    if record.plan is None or not record.plan.widths:
        return []
    entries = sorted(record.plan.widths, key=lambda entry: -entry.bytes)
    sums: dict[str, int] = {}
    for entry in entries:
        sums[entry.width] = sums.get(entry.width, 0) + entry.bytes
    paint = dict(zip(sorted(sums, key=lambda name: -sums[name]), cycle(PAINTS), strict=False))
    rows = [
        (e.role.replace("_", " "), e.width, f"{e.parameters:,}", f"{e.bytes:,}", f"{e.bytes * 8 / e.parameters:.3f}")
        for e in entries
    ]
    figure = Figure(
        "Bytes by role and width",
        figures.tree([(e.role.replace("_", " "), e.width, e.bytes, paint[e.width]) for e in entries], "all weights"),
        (table("Bytes by role and width", ("role", "width", ">weights", ">bytes", ">bits a weight"), rows),),
        "An area is as large as its bytes.",
    )
    total, weights = sum(e.bytes for e in entries), sum(e.parameters for e in entries)
    most = entries[0]
    lede = (
        f"{most.role.replace('_', ' ').capitalize()} weights at {most.width} take {most.bytes / total:.0%} of the "
        f"bytes and are {most.parameters / weights:.0%} of the weights."
    )
    return [Section("widths", "What was quantized to what width", lede, (figure,))]


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
    marks = [("no rows", "x-thin-open", none), (f"below {enough:,} rows", "circle-open", starved)]
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
        figures.heat(cells, said, [block.block for block in layers], "shares", bar, marks),
        (table("Calibration rows of every expert", ("block", *(f">{e}" for e in range(most))), rows),),
    )
    return [Section("coverage", "Coverage of the experts", lede, (figure,))]


def _said(expert: ExpertError) -> str:
    rows = "" if expert.calibration_rows is None else f", {expert.calibration_rows:,} calibration rows"
    return f"block {expert.block}, expert {expert.expert}: output error {percent(expert.output_error)}{rows}"


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
                "Error of each unit's output",
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
                "Relative to what the original's unit gives for the same tokens.",
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
            percent(e.weight_error),
            percent(e.output_error),
            None if e.score is None else f"{e.score:.4g}",
            count(e.rows),
            count(e.calibration_rows),
        )
        for e in worst
    ]
    columns = ("expert", ">weight error", ">output error", ">score", ">evaluation rows", ">calibration rows")
    tables = (table("The worst experts", columns, listed, "By score, worst first."),) if worst else ()
    lede = "Errors are relative to what the original expert gives for the tokens that it got."
    if worst:
        lede = f"The worst is expert {worst[0].expert} of block {worst[0].block}. {lede}"
    found = {(e.block, e.expert): e.output_error for e in errors.experts if e.output_error}
    if not found:
        return [Section("experts", "Error of the experts", lede, tables=tables)]
    said = {(e.block, e.expert): _said(e) for e in errors.experts}
    blocks = sorted({block for block, _ in said})
    width = 1 + max(expert for _, expert in said)
    grid = [[(block, expert) for expert in range(width)] for block in blocks]
    place = {block: row for row, block in enumerate(blocks)}
    figure = Figure(
        "Output error of every expert",
        figures.heat(
            [[math.log10(found[key]) if key in found else None for key in row] for row in grid],
            [[said.get(key, "") for key in row] for row in grid],
            blocks,
            "errors",
            figures.log_key(list(found.values()), "output error, relative (logarithmic)"),
            [
                (
                    f"the {len(worst)} worst",
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
    return [Section("experts", "Error of the experts", lede, (figure,), tables)]
