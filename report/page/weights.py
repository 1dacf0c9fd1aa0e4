"""Sections on the weights: bytes on the card, and the width of each role."""

from dataclasses import dataclass
from itertools import cycle

from ...core.record.schema import Record
from ...core.units import percent, size
from . import figures, maps
from .parts import PAINTS, Figure, Section, table


@dataclass(frozen=True)
class CardClass:
    """Cards of one memory size, in decimal GB as their names promise. A driver shows a little more: what is said to fit
    does fit."""

    gigabytes: int
    examples: str

    @property
    def bytes(self) -> int:
        return self.gigabytes * 10**9

    @property
    def size(self) -> str:
        return f"{self.gigabytes} GB"


CARDS = (
    CardClass(16, "RTX 5060 Ti, T4"),
    CardClass(24, "RTX 4090, L4"),
    CardClass(32, "RTX 5090"),
    CardClass(48, "L40S"),
    CardClass(80, "A100, H100"),
    CardClass(96, "RTX PRO 6000"),
    CardClass(141, "H200"),
    CardClass(192, "B200, MI300X"),
)
# A card is drawn beside the bars when the weights take more than this share of it.
WORTH_DRAWING = 0.1


def smallest_card(weight_bytes: int) -> CardClass | None:
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
        maps.tree([(e.role.replace("_", " "), e.width, e.bytes, paint[e.width]) for e in entries], "all weights"),
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
