"""The section on a card's memory: the planned sum, memory against context, and the other cards.

Only pages of runs that were made for a card have it. The chart is the one that `onecard plan --plot` draws.
"""

from itertools import cycle

from ...core.record.schema import Record
from ...core.record.sizes import FitSummary
from ...core.units import ABSENT, counted
from ..fit_card import ENGINES
from . import scatter
from .parts import PAINTS, Figure, Section, Table, table

GIB = 2**30


def fit_section(record: Record) -> list[Section]:
    fit = record.fit
    if fit is None:
        return []
    card = next((row.name for row in fit.table if row.gpu == fit.gpu), fit.gpu)
    on = f"{fit.cards} x {card}" if fit.cards > 1 else card
    each = " on each" if fit.cards > 1 else ""
    answer = f"fits, {_gib(fit.left_bytes)} left" if fit.fits else f"does not fit: {_gib(-fit.left_bytes)} too much"
    engine = ENGINES.get(fit.engine, fit.engine)
    most = counted(fit.max_sequences, "sequence")
    lede = (
        f"Planned for {on}, {engine}, {fit.sequences:,} x {fit.context:,} tokens with a {fit.kv_dtype} KV cache: "
        f"{answer}{each}. At most {fit.max_context:,} tokens, or {most} of {fit.context:,}."
    )
    found = tuple(_figures(fit, on))
    return [Section("fit", "Memory of the card", lede, found, tables=(_sum(fit),), folded=(_cards(fit),))]


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"


def _figures(fit: FitSummary, on: str) -> list[Figure]:
    shown = [curve for curve in fit.curves if min(curve.bytes) < 1.25 * fit.usable_bytes]
    if not shown:
        return []
    spec = scatter.curves(
        [
            (curve.name, paint, curve.contexts, [count / GIB for count in curve.bytes])
            for curve, paint in zip(shown, cycle(PAINTS), strict=False)
        ],
        f"tokens of context, {fit.sequences:,} at once",
        "GiB",
        fit.usable_bytes / GIB,
        fit.context,
    )
    rows = [
        (
            row.name,
            _gib(row.weight_bytes),
            None if row.left_bytes is None else _gib(row.left_bytes),
            None if row.max_context is None else f"{row.max_context:,}",
            None if row.max_sequences is None else f"{row.max_sequences:,}",
        )
        for row in fit.candidates
    ]
    listing = table("Recipes on the card", ("recipe", ">weights", ">left", ">longest context", ">most sequences"), rows)
    note = f"Across: the usable memory of {on}. Upright: the context that was asked for."
    return [Figure("Memory against context", spec, (listing,), note)]


def _sum(fit: FitSummary) -> Table:
    rows = [
        ("usable", _gib(fit.usable_bytes), "of what a program sees, the engine's share"),
        ("weights", _gib(fit.weight_bytes), "exact"),
        ("KV cache", _gib(fit.kv_bytes), "exact"),
        ("workspace", _gib(fit.workspace_bytes), "an estimate"),
        ("left", _gib(fit.left_bytes), ABSENT),
    ]
    return table(
        "The sum", ("what", ">on a card", "how known"), rows, " ".join(f"{warning}." for warning in fit.fit_warnings)
    )


def _cards(fit: FitSummary) -> Table:
    rows = [
        (
            row.name,
            _gib(row.all_usable_bytes),
            row.candidate or (f"takes {row.cards_needed}" if row.cards_needed else "too small"),
            None if row.left_bytes is None else _gib(row.left_bytes),
            None if row.max_context is None else f"{row.max_context:,}",
            row.source,
        )
        for row in fit.table
    ]
    return table("Cards", ("card", ">usable", "with", ">left", ">longest context", "source"), rows)
