"""The section on `bits: fit`: predicted against verified KL, the width of each unit, and the prices behind the choice.

Only pages of runs whose bits were fitted have it. Units without a block (in records that other tools made) are in the
tables and not in the charts.
"""

from ...core.record.schema import Record
from ...core.record.sizes import Allocation, ChosenUnit, PriceList
from ...core.units import ABSENT, counted, percent, size
from . import figures, maps, scatter
from .parts import PAINTS, Figure, Section, Table, between, nats, table

KEEP = "keep"
# The colour of what stays as it was; other widths are coloured from the coarsest to the finest.
KEPT_PAINT = "muted"


def allocation_section(record: Record) -> list[Section]:
    allocation = record.allocation
    if allocation is None:
        return []
    paints = _paints(allocation)
    found = [_against(allocation, record), _got(allocation, paints)]
    if allocation.prices is not None:
        found += [_prices(allocation, allocation.prices, paints), _together(allocation.prices)]
    drawn = tuple(figure for figure in found if figure is not None)
    open_tables = (_by_kind(allocation),) if allocation.units else ()
    return [Section("allocation", "Bits where they buy the most", _lede(allocation, record), drawn, open_tables)]


def said(width: str) -> str:
    return "as it was" if width == KEEP else width


def _paints(allocation: Allocation) -> dict[str, str]:
    """Width -> colour, the same in all charts: from the coarsest to the finest, by the errors among the prices."""
    order: dict[str, float] = {}
    for unit in allocation.prices.units if allocation.prices else ():
        for each in unit.widths:
            order[each.width] = max(order.get(each.width, 0.0), each.error or 0.0)
    for chosen in allocation.units:
        order.setdefault(chosen.width, 0.0)
    rounded = sorted((width for width in order if width != KEEP), key=lambda width: -order[width])
    found = {width: PAINTS[i % len(PAINTS)] for i, width in enumerate(rounded)}
    return found | ({KEEP: KEPT_PAINT} if KEEP in order else {})


def _lede(allocation: Allocation, record: Record) -> str:
    words = []
    if allocation.units:
        total = sum(unit.bytes for unit in allocation.units)
        widths = len({unit.width for unit in allocation.units})
        budget = "" if allocation.budget_bytes is None else f", within a budget of {size(allocation.budget_bytes)}"
        words.append(
            f"{counted(len(allocation.units), 'unit')} got {counted(widths, 'width')} in {size(total)}{budget}."
        )
    words.append(f"Predicted: {nats(allocation.predicted_kl_nats)} nats a token.")
    if record.kl is not None:
        at = between(record.kl.kl_low_nats, record.kl.kl_high_nats, nats)
        words.append(f"Verified: {nats(record.kl.kl_mean_nats)} ({at})" + _ratio(allocation, record.kl.kl_mean_nats))
    if allocation.prices is not None and allocation.prices.tokens is not None:
        words.append(
            f"Prices were measured on {counted(allocation.prices.tokens, 'token')} of calibration rows"
            + ("." if allocation.prices.scale is None else f", and scaled by {allocation.prices.scale:.2f}.")
        )
    return " ".join(words)


def _ratio(allocation: Allocation, verified: float) -> str:
    if not allocation.predicted_kl_nats:
        return "."
    return f", {verified / allocation.predicted_kl_nats:.2f} times what was predicted."


def _against(allocation: Allocation, record: Record) -> Figure | None:
    if record.kl is None:
        return None
    kl, predicted = record.kl, allocation.predicted_kl_nats
    entries = [
        ("predicted", predicted, None, None, f"predicted: {nats(predicted)}"),
        (
            "verified",
            kl.kl_mean_nats,
            kl.kl_low_nats,
            kl.kl_high_nats,
            figures.nats_said("verified", kl.kl_mean_nats, kl.kl_low_nats, kl.kl_high_nats),
        ),
    ]
    rows = [(name, nats(value), between(low, high, nats)) for name, value, low, high, _ in entries]
    listing = table("Predicted and verified KL", ("what", ">KL, nats", ">95 % interval"), rows)
    note = "Predicted before the checkpoint was made; verified on the files as they are read back, on other texts."
    spec = figures.dots([("KL", "accent", entries)], "mean KL, nats a token")
    return Figure("Predicted against verified KL", spec, (listing,), note)


def _placed(units: tuple[ChosenUnit, ...]) -> list[tuple[str, int, ChosenUnit]]:
    return [(u.kind, u.block, u) for u in units if u.kind is not None and u.block is not None]


def _got(allocation: Allocation, paints: dict[str, str]) -> Figure | None:
    placed = _placed(allocation.units)
    if not placed:
        return None
    kinds = list(dict.fromkeys(kind for kind, _, _ in placed))  # in the order of the model
    series = [
        (
            said(width),
            paint,
            [
                (kinds.index(kind), block, f"block {block}, {kind}: {said(width)}, {size(unit.bytes)}")
                for kind, block, unit in placed
                if unit.width == width
            ],
        )
        for width, paint in paints.items()
    ]
    rows = [(block, kind, said(unit.width), f"{unit.bytes:,}") for kind, block, unit in placed]
    return Figure(
        "What each unit got",
        maps.tiles([entry for entry in series if entry[2]], kinds, [block for _, block, _ in placed]),
        (table("What each unit got", ("block", "unit", "width", ">bytes"), rows),),
    )


def _by_kind(allocation: Allocation) -> Table:
    """The sums by role and width, which stay short however many blocks there are."""
    found: dict[tuple[str, str], list[int]] = {}
    for unit in allocation.units:
        found.setdefault((unit.role or ABSENT, unit.width), []).append(unit.bytes)
    total = sum(unit.bytes for unit in allocation.units)
    rows = [
        (role.replace("_", " "), said(width), f"{len(each):,}", size(sum(each)), percent(sum(each) / max(1, total), 1))
        for (role, width), each in sorted(found.items(), key=lambda item: (item[0][0], -sum(item[1])))
    ]
    return table("Units and bytes by role and width", ("role", "width", ">units", ">size", ">of the bytes"), rows)


def _prices(allocation: Allocation, prices: PriceList, paints: dict[str, str]) -> Figure | None:
    """A unit's points stand over its block, side by side in the order of the block's units."""
    where = {unit.unit: (block, kind, unit.width) for kind, block, unit in _placed(allocation.units)}
    kinds = list(dict.fromkeys(kind for _, kind, _ in where.values()))
    points: dict[str, list[tuple[float, float, str]]] = {}
    rings: list[tuple[float, float]] = []
    for unit in prices.units:
        if unit.unit not in where:
            continue
        block, kind, got = where[unit.unit]
        x = block + 0.8 * ((kinds.index(kind) + 0.5) / len(kinds) - 0.5)
        for each in unit.widths:
            if each.kl_nats <= 0:  # what stays as it was costs nothing, and has no logarithm
                continue
            words = f"block {block}, {kind}: {nats(each.kl_nats)} at {each.width}"
            points.setdefault(each.width, []).append((x, each.kl_nats, words))
            rings += [(x, each.kl_nats)] if each.width == got else []
    if not points:
        return None
    widths = [width for width in paints if width in points]
    series = [(said(width), paints[width], points[width]) for width in widths]
    by_width = [{each.width: each.kl_nats for each in unit.widths} for unit in prices.units]
    rows = [
        (unit.unit, *(nats(costs[width]) if width in costs else None for width in widths))
        for unit, costs in zip(prices.units, by_width, strict=True)
    ]
    listing = table("KL of each unit rounded alone, nats", ("unit", *(f">{width}" for width in widths)), rows)
    note = "KL at the head with this unit alone rounded. A ring marks the width it got; without one it stays as it was."
    spec = scatter.rising(series, rings, "what it got", "block", "KL alone, nats (logarithmic)")
    return Figure("Prices: what each unit costs by itself", spec, (listing,), note)


def _together(prices: PriceList) -> Figure | None:
    if not prices.together:
        return None
    entries = {
        name: [(width, value, None, None, f"{width}, {name}: {nats(value)}") for width, value in values]
        for name, values in (
            ("measured", [(width, both.measured_nats) for width, both in prices.together.items()]),
            ("predicted from the prices", [(width, both.predicted_nats) for width, both in prices.together.items()]),
        )
    }
    rows = [
        (
            width,
            nats(both.measured_nats),
            nats(both.predicted_nats),
            f"{both.measured_nats / both.predicted_nats:.2f}" if both.predicted_nats else None,
        )
        for width, both in prices.together.items()
    ]
    listing = table("All units at one width", ("width", ">measured, nats", ">predicted, nats", ">ratio"), rows)
    paints = ("accent", "orange")
    spec = figures.dots(
        [(name, paint, dots) for (name, dots), paint in zip(entries.items(), paints, strict=True)],
        "mean KL, nats a token",
    )
    scaled = "" if prices.scale is None else f" Predictions are scaled by the mean ratio, {prices.scale:.2f}."
    note = f"All units at once, in the pass that priced them: do the prices add up?{scaled}"
    return Figure("All units together: measured against predicted", spec, (listing,), note)
