"""The head of the page: how good the checkpoint is in a few sentences, its main figures, and what to beware of."""

from dataclasses import dataclass

from ...core.record.schema import Record
from ...core.units import ABSENT, counted, percent, size
from .parts import between, count, nats
from .weights import smallest_card


@dataclass(frozen=True)
class Tile:
    """One main figure. `tone` colours it: good, bad or empty."""

    name: str
    value: str
    below: str
    tone: str = ""


@dataclass(frozen=True)
class Headline:
    title: str
    command: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]
    cautions: tuple[str, ...]


def width(record: Record) -> str:
    """The name of the quantized side: the width that most of its quantized weights have; for bits that were fitted to a
    budget, a name without a width."""
    if record.allocation is not None:
        return "the checkpoint of mixed widths"
    if record.plan is not None and record.plan.widths:
        low = [entry for entry in record.plan.widths if entry.width.startswith(("int", "nf", "fp", "F8"))]
        if low:
            return max(low, key=lambda entry: entry.parameters).width.partition(" ")[0]
    return "the checkpoint"


def headline(record: Record) -> Headline:
    """Drawn from the record alone; what it does not hold is left out."""
    name = (record.checkpoint and record.checkpoint.name) or record.model.name
    return Headline(name, record.command, tuple(_sentences(record)), tuple(_tiles(record)), tuple(_cautions(record)))


def _sentences(record: Record) -> list[str]:
    out = []
    kl, flips, plan = record.kl, record.flips, record.plan
    other = width(record)
    if kl is not None:
        at = between(kl.kl_low_nats, kl.kl_high_nats, nats)
        sure = "" if at == ABSENT else f" (95 % interval: {at})"
        out.append(
            f"On {counted(kl.documents, 'document')} that calibration never saw, {other} differs from the original "
            f"{record.model.name} by {nats(kl.kl_mean_nats)} nats a token{sure}"
            + (
                f" and makes the same first choice for {percent(kl.same_top1)} of tokens."
                if kl.same_top1 is not None
                else "."
            )
        )
    if flips is not None:
        every = flips.all
        out.append(
            f"Of {counted(every.items, 'multiple-choice item')} it answers {count(every.changed.count)} differently: "
            f"{count(every.right_to_wrong.count)} from right to wrong, "
            f"{count(every.wrong_to_right.count)} from wrong to right."
        )
    if plan is not None:
        fits = smallest_card(plan.emitted_bytes)
        room = (
            f"; its weights fit a card of {fits.size} ({fits.examples})"
            if fits
            else "; its weights fit no single card that is listed here"
        )
        of = (
            f", {plan.source_bytes / plan.emitted_bytes:.2f} times smaller than the original"
            if plan.source_bytes
            else ""
        )
        out.append(f"It takes {size(plan.emitted_bytes)}{of}{room}.")
    return out or ["This record holds no measurement: neither KL nor flips."]


def _tiles(record: Record) -> list[Tile]:
    tiles = []
    kl, flips, plan, gate = record.kl, record.flips, record.plan, record.gate
    if gate is not None:
        wrong = sum(not check.passed for check in gate.checks)
        told = f"{wrong:,} of {len(gate.checks):,} checks failed" if wrong else counted(len(gate.checks), "check")
        if not wrong and len(gate.checks) == 1:  # a pass is worth what was asked
            told += f": {gate.checks[0].name.replace('_', ' ')}"
        tiles.append(Tile("Gate", "passed" if gate.passed else "failed", told, "good" if gate.passed else "bad"))
    if kl is not None:
        at = between(kl.kl_low_nats, kl.kl_high_nats, nats)
        tiles.append(
            Tile("Mean KL, nats a token", nats(kl.kl_mean_nats), f"95 %: {at}" if at != ABSENT else "no interval")
        )
        if kl.kl_p99_nats is not None:
            tiles.append(Tile("KL, 99th percentile", nats(kl.kl_p99_nats), f"median {nats(kl.kl_median_nats)}"))
        if kl.same_top1 is not None:
            at = between(kl.same_top1_low, kl.same_top1_high, percent)
            tiles.append(
                Tile(
                    "Same top-1",
                    percent(kl.same_top1),
                    f"95 %: {at}" if at != ABSENT else f"of {count(kl.tokens)} tokens",
                )
            )
        if kl.perplexity_reference is not None and kl.perplexity_quantized is not None:
            ratio = kl.perplexity_quantized / kl.perplexity_reference
            told = f"{kl.perplexity_reference:.3f} to {kl.perplexity_quantized:.3f}"
            tiles.append(Tile("Perplexity", f"{ratio - 1:+.2%}", told))
    if flips is not None:
        changed = flips.all.changed
        at = between(changed.low, changed.high, percent)
        told = f"{count(changed.count)} of {count(flips.all.items)}" + (f"; 95 %: {at}" if at != ABSENT else "")
        tiles.append(Tile("Answers changed", percent(changed.share), told))
    if plan is not None:
        told = f"{plan.bits_per_weight:.2f} bits a weight" if plan.bits_per_weight is not None else ""
        tiles.append(Tile("Size", size(plan.emitted_bytes), told))
        fits = smallest_card(plan.emitted_bytes)
        if fits:
            left = fits.bytes - plan.emitted_bytes
            tiles.append(Tile("Fits a card of", fits.size, f"{size(left)} left for context and work", "good"))
        else:
            tiles.append(Tile("Fits a card of", "none", "larger than every card listed", "bad"))
    return tiles


def _cautions(record: Record) -> list[str]:
    out = []
    if record.kl is None:
        out.append("No KL was measured in this run.")
    if record.export is not None and record.export.made_from is not None:
        out.append(
            f"These figures were measured on the files that were exported as {record.export.format}, not on the "
            "exported ones: `onecard verify` measures those."
        )
    if record.gate is None:
        out.append("No gate has judged this run: the record holds no limits and no baseline.")
    if record.recipe.get("note"):
        out.append(str(record.recipe["note"]))
    return [*out, *record.warnings]
