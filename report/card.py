"""The card that ends a run, for people: drawn from the record alone."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.units import clock, counted, gigabytes, size
from .heatmap import BARS, least_line
from .record import RunRecord

# Robust standard deviations by which an expert must stand out of its block to be named: sound ones were up to 10 out,
# one with a scale changed by a tenth 20.
STANDS_OUT = 12


def labelled() -> Table:
    """Rows of a label and what is said of it, folded where it is too wide."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def texts(facts: dict[str, Any]) -> str:
    """What of the texts was used."""
    kept, given = facts["tokens"], facts["tokens_given"]
    of = f" of {given:,}" if kept < given else ""
    return f"{facts['source']}: {counted(facts['rows'], 'row')}, {kept:,}{of} tokens"


def interval(kl: dict[str, Any]) -> str:
    if kl["kl_low_nats"] is None:
        return "no interval"
    return f"95 %: {kl['kl_low_nats']:.5f} to {kl['kl_high_nats']:.5f}"


def few_bits(plan: dict[str, Any]) -> list[str]:
    """The widths that matrices were quantized to, the most bytes first."""
    found: dict[str, int] = {}
    for entry in plan["widths"]:
        if entry["width"].startswith(("int", "nf")):
            found[entry["width"]] = found.get(entry["width"], 0) + entry["bytes"]
    return sorted(found, key=lambda width: -found[width])


def side(record: RunRecord) -> str:
    """What the quantized side is called: by its bits, or as mixed where bits were fitted to a budget."""
    return "mixed" if record.allocation else f"int{record.recipe['bits']}"


def _add_widths(grid: Table, allocation: dict[str, Any]) -> None:
    """How many units got which width, and their bytes, the most bytes first."""
    found: dict[str, list[int]] = {}
    for unit in allocation["units"]:
        found.setdefault(unit["width"], []).append(unit["bytes"])
    said = [
        f"{counted(len(each), 'unit')} {width} ({size(sum(each))})"
        for width, each in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    grid.add_row("widths", ", ".join(said))


def _add_predicted(grid: Table, predicted: float, kl: dict[str, Any]) -> None:
    """Beside the verified KL, which stands above it."""
    ratio = f": verified is {kl['kl_mean_nats'] / predicted:.2f} times that" if kl and predicted else ""
    grid.add_row("predicted KL", f"{predicted:.5f} nats a token{ratio}")


def _add_kl(grid: Table, kl: dict[str, Any], reference: str, other: str) -> None:
    drawn = f"{counted(kl['documents'], 'document')}, {counted(kl['tokens'], 'token')}"
    grid.add_row(f"KL({reference} || {other})", f"{kl['kl_mean_nats']:.5f} nats a token ({interval(kl)}, {drawn})")
    grid.add_row(
        "",
        f"median {kl['kl_median_nats']:.5f}, p90 {kl['kl_p90_nats']:.5f}, p99 {kl['kl_p99_nats']:.4f}, "
        f"max {kl['kl_max_nats']:.3f}",
    )
    grid.add_row("same top-1", f"{kl['same_top1']:.2%}")
    if kl["changed_routes"] is not None:
        block, worst = max(kl["changed_routes_by_block"].items(), key=lambda item: item[1])
        grid.add_row(
            "changed routes", f"{kl['changed_routes']:.2%} of tokens a layer, most in block {block}: {worst:.2%}"
        )
    grid.add_row(
        "perplexity", f"{kl['perplexity_reference']:.3f} {reference}, {kl['perplexity_quantized']:.3f} {other}"
    )


def _add_worst_expert(grid: Table, errors: dict[str, Any]) -> None:
    """Only where one stands out: there is always a worst one."""
    worst = next(iter(errors["worst_experts"]), None)
    if worst is not None and worst["score"] >= STANDS_OUT:
        error = "no tokens" if worst["output_error"] is None else f"output error {worst['output_error']:.3f}"
        said = (
            f"block {worst['block']}, expert {worst['expert']}: {error}, weights x {worst['weight_gain']:.3f}; stands "
            f"{worst['score']:.0f} deviations out of its block"
        )
        grid.add_row("worst expert", Text(said, style="yellow"))


def _add_flips(grid: Table, flips: dict[str, Any], reference: str, other: str) -> None:
    changed = flips["changed"]
    grid.add_row(
        "answers",
        f"{changed['share']:.2%} of {counted(flips['items'], 'item')} change (95 %: {changed['low']:.2%} to "
        f"{changed['high']:.2%}): {flips['right_to_wrong']['count']} from right to wrong, "
        f"{flips['wrong_to_right']['count']} from wrong to right",
    )
    grid.add_row(
        "accuracy",
        f"{flips['accuracy_reference']['share']:.2%} {reference}, {flips['accuracy_quantized']['share']:.2%} {other} "
        f"(McNemar's exact p {flips['mcnemar_p']:.2f})",
    )


def draw_card(record: RunRecord, out: str, console: Console) -> None:
    """Print the card on `console` (stderr)."""
    grid = labelled()
    plan, kl, machine = record.plan, record.kl, record.machine
    name = record.model["name"]
    grid.add_row(
        "model",
        f"{name} ({record.model['family']}, {record.model['blocks']} blocks, {record.model['experts']} experts)",
    )
    if record.recipe:
        recipe = record.recipe
        grid.add_row("recipe", f"{recipe['name']}: {recipe['method']}, {', '.join(few_bits(plan))}")
    ratio = plan["source_bytes"] / plan["emitted_bytes"]
    grid.add_row(
        "size", f"{size(plan['emitted_bytes'])}, from {size(plan['source_bytes'])} ({ratio:.2f} times smaller)"
    )
    grid.add_row(
        "bits per weight",
        f"{plan['bits_per_weight']:.3f} over all, {plan['quantized_bits_per_weight']:.3f} where quantized "
        f"({plan['quantized_share']:.1%} of the weights)",
    )
    if record.allocation:
        _add_widths(grid, record.allocation)
    for which in ("calibration", "evaluation"):
        if which in record.texts:
            grid.add_row(which, texts(record.texts[which]))
    reference, other = ("bf16", side(record)) if record.recipe else ("source", "checkpoint")
    if kl:
        _add_kl(grid, kl, reference, other)
    if record.allocation:
        _add_predicted(grid, record.allocation["predicted_kl_nats"], kl)
    if record.errors:
        _add_worst_expert(grid, record.errors)
    if record.flips:
        _add_flips(grid, record.flips["all"], reference, other)
    if record.fallbacks:
        counts = record.fallbacks
        grid.add_row(
            "coverage",
            f"{counts['experts_in_all']} experts, the least with {counts['least_rows_of_an_expert']:,} rows; "
            f"{counts['experts_without_rows']} without rows, {counts['experts_starved']} below "
            f"{record.recipe['warn_below_expert_rows']}",
        )
        layers = [block["expert_rows"] for block in record.blocks if block.get("expert_rows")]
        if layers:
            grid.add_row(
                "", Text(f"{least_line(layers)} least expert of each block, {BARS[4]}: half of an even share or more")
            )
        grid.add_row(
            "fallbacks",
            f"{counts['damping_raised']} matrices with more damping, {counts['diagonal_fallbacks']} by their diagonal",
        )
    stages = sorted(machine["stage_seconds"].items(), key=lambda item: -item[1])
    if stages:
        stage, seconds = stages[0]
        grid.add_row("time", f"{clock(machine['seconds'])}; slowest stage: {stage} ({seconds:.1f} s)")
    memory = f"RAM peak {gigabytes(machine['peak_rss_bytes'])}"
    if machine.get("peak_device_bytes"):
        memory += f", device peak {gigabytes(machine['peak_device_bytes'])}"
    grid.add_row("memory", memory)
    grid.add_row("where", Text(out, overflow="fold"))
    if record.recipe.get("note"):
        grid.add_row("note", Text(record.recipe["note"], style="yellow"))
    for warning in record.warnings:
        grid.add_row("warning", Text(warning, style="yellow"))
    console.print(Panel(grid, title=f"onecard {record.command}", box=box.ROUNDED, expand=False))
