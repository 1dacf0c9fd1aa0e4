"""The card that ends a run, for people: drawn from the record alone."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.record.blocks import ErrorSummary
from ..core.record.flips import TaskFlips
from ..core.record.kl import Floor, KlSummary
from ..core.record.schema import PlanSummary, Record, TextFacts
from ..core.record.sizes import Allocation
from ..core.units import clock, counted, gigabytes, size
from .heatmap import BARS, least_line

# An expert is named when it stands out of its block by this many robust standard deviations. Sound experts stood out by
# up to 10, one with a scale changed by a tenth stood out by 20.
STANDS_OUT = 12


def labelled() -> Table:
    """Rows of a label and its text, which is folded where it is too wide."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _texts(facts: TextFacts) -> str:
    kept, given = facts.tokens or 0, facts.tokens_given or 0
    of = f" of {given:,}" if kept < given else ""
    return f"{facts.source}: {counted(facts.rows or 0, 'row')}, {kept:,}{of} tokens"


def _interval(kl: KlSummary) -> str:
    if kl.kl_low_nats is None or kl.kl_high_nats is None:
        return "no interval"
    return f"95 %: {kl.kl_low_nats:.5f} to {kl.kl_high_nats:.5f}"


def few_bits(plan: PlanSummary) -> list[str]:
    """The widths that matrices were quantized to, the most bytes first."""
    found: dict[str, int] = {}
    for entry in plan.widths:
        if entry.width.startswith(("int", "nf")):
            found[entry.width] = found.get(entry.width, 0) + entry.bytes
    return sorted(found, key=lambda width: -found[width])


def _sides(record: Record) -> tuple[str, str]:
    """The names of the two models: the quantized one's is its bits, or `mixed` where bits were fitted to a budget."""
    if not record.recipe:
        return "source", "checkpoint"
    return "bf16", "mixed" if record.allocation else f"int{record.recipe['bits']}"


def _add_widths(grid: Table, allocation: Allocation) -> None:
    """How many units got which width, and their bytes, the most bytes first."""
    found: dict[str, list[int]] = {}
    for unit in allocation.units:
        found.setdefault(unit.width, []).append(unit.bytes)
    said = [
        f"{counted(len(each), 'unit')} {width} ({size(sum(each))})"
        for width, each in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    grid.add_row("widths", ", ".join(said))


def _add_predicted(grid: Table, predicted: float, kl: KlSummary | None) -> None:
    """Next to the verified KL, which is the row above."""
    ratio = f": verified is {kl.kl_mean_nats / predicted:.2f} times that" if kl and predicted else ""
    grid.add_row("predicted KL", f"{predicted:.5f} nats a token{ratio}")


def _add_kl(grid: Table, kl: KlSummary, reference: str, other: str) -> None:
    drawn = f"{counted(kl.documents, 'document')}, {counted(kl.tokens, 'token')}"
    grid.add_row(f"KL({reference} || {other})", f"{kl.kl_mean_nats:.5f} nats a token ({_interval(kl)}, {drawn})")
    grid.add_row(
        "",
        f"median {kl.kl_median_nats:.5f}, p90 {kl.kl_p90_nats:.5f}, p99 {kl.kl_p99_nats:.4f}, max {kl.kl_max_nats:.3f}",
    )
    if kl.floor:
        grid.add_row("floor", _floor(kl.floor, kl.kl_mean_nats))
    grid.add_row("same top-1", f"{kl.same_top1:.2%}")
    if kl.changed_routes is not None:
        block, worst = max(kl.changed_routes_by_block.items(), key=lambda item: item[1])
        grid.add_row("changed routes", f"{kl.changed_routes:.2%} of tokens a layer, most in block {block}: {worst:.2%}")
    before, after = _perplexity(kl.perplexity_reference), _perplexity(kl.perplexity_quantized)
    grid.add_row("perplexity", f"{before} {reference}, {after} {other}")


def _floor(floor: Floor, mean: float) -> str:
    share = f", {floor.kl_mean_nats / mean:.0%} of that" if mean else ""
    said = f"the original in {floor.compute_dtype} against itself in float32"
    return f"{floor.kl_mean_nats:.5f} nats a token{share}: {said}"


def _perplexity(value: float | None) -> str:
    """A record of our own has none only where e^nats is beyond every number."""
    return "too large a number" if value is None else f"{value:.3f}"


def _add_worst_expert(grid: Table, errors: ErrorSummary) -> None:
    """Only where one stands out: there is always a worst one."""
    worst = next(iter(errors.worst_experts), None)
    if worst is not None and worst.score is not None and worst.score >= STANDS_OUT:
        error = "no tokens" if worst.output_error is None else f"output error {worst.output_error:.3f}"
        said = (
            f"block {worst.block}, expert {worst.expert}: {error}, weights x {worst.weight_gain:.3f}; stands "
            f"{worst.score:.0f} deviations out of its block"
        )
        grid.add_row("worst expert", Text(said, style="yellow"))


def _add_flips(grid: Table, flips: TaskFlips, reference: str, other: str) -> None:
    changed, lost, won = flips.changed, flips.right_to_wrong, flips.wrong_to_right
    before, after = flips.accuracy_reference, flips.accuracy_quantized
    grid.add_row(
        "answers",
        f"{changed.share:.2%} of {counted(flips.items, 'item')} change (95 %: {changed.low:.2%} to "
        f"{changed.high:.2%}): {lost.count} from right to wrong, {won.count} from wrong to right",
    )
    grid.add_row(
        "accuracy",
        f"{before.share:.2%} {reference}, {after.share:.2%} {other} (McNemar's exact p {flips.mcnemar_p:.2f})",
    )


def _add_coverage(grid: Table, record: Record) -> None:
    counts = record.fallbacks
    grid.add_row(
        "coverage",
        f"{counts['experts_in_all']} experts, the least with {counts['least_rows_of_an_expert']:,} rows; "
        f"{counts['experts_without_rows']} without rows, {counts['experts_starved']} below "
        f"{record.recipe['warn_below_expert_rows']}",
    )
    layers = [block.expert_rows for block in record.blocks if block.expert_rows]
    if layers:
        line = f"{least_line(layers)} least expert of each block, {BARS[4]}: half of an even share or more"
        grid.add_row("", Text(line))
    grid.add_row(
        "fallbacks",
        f"{counts['damping_raised']} matrices with more damping, {counts['diagonal_fallbacks']} by their diagonal",
    )


def _add_machine(grid: Table, record: Record) -> None:
    machine = record.machine
    stages = sorted(machine.stage_seconds.items(), key=lambda item: -item[1])
    if stages:
        stage, seconds = stages[0]
        grid.add_row("time", f"{clock(machine.seconds or 0)}; slowest stage: {stage} ({seconds:.1f} s)")
    memory = f"RAM peak {gigabytes(machine.peak_rss_bytes or 0)}"
    if machine.peak_device_bytes:
        memory += f", device peak {gigabytes(machine.peak_device_bytes)}"
    grid.add_row("memory", memory)


def _add_sizes(grid: Table, record: Record) -> None:
    plan, model = record.plan, record.model
    assert plan is not None
    assert plan.source_bytes is not None
    grid.add_row("model", f"{model.name} ({model.family}, {model.blocks} blocks, {model.experts} experts)")
    if record.recipe:
        grid.add_row("recipe", f"{record.recipe['name']}: {record.recipe['method']}, {', '.join(few_bits(plan))}")
    ratio = plan.source_bytes / plan.emitted_bytes
    grid.add_row("size", f"{size(plan.emitted_bytes)}, from {size(plan.source_bytes)} ({ratio:.2f} times smaller)")
    grid.add_row(
        "bits per weight",
        f"{plan.bits_per_weight:.3f} over all, {plan.quantized_bits_per_weight:.3f} where quantized "
        f"({plan.quantized_share:.1%} of the weights)",
    )
    if record.allocation:
        _add_widths(grid, record.allocation)
    for which in ("calibration", "evaluation"):
        if which in record.texts:
            grid.add_row(which, _texts(record.texts[which]))


def draw_card(record: Record, out: str, console: Console) -> None:
    """Print the card of a run of `quantize`, `verify` or `flips` on `console` (stderr)."""
    grid = labelled()
    reference, other = _sides(record)
    _add_sizes(grid, record)
    if record.kl:
        _add_kl(grid, record.kl, reference, other)
    if record.allocation:
        _add_predicted(grid, record.allocation.predicted_kl_nats, record.kl)
    if record.errors:
        _add_worst_expert(grid, record.errors)
    if record.measured_dtype not in (None, "float32"):
        unknown = "" if record.kl is None or record.kl.floor else "; what that costs by itself tells `verify --floor`"
        grid.add_row("computed in", f"{record.measured_dtype}{unknown}")
    if record.flips:
        _add_flips(grid, record.flips.all, reference, other)
    if record.fallbacks:
        _add_coverage(grid, record)
    _add_machine(grid, record)
    grid.add_row("where", Text(out, overflow="fold"))
    if record.recipe.get("note"):
        grid.add_row("note", Text(record.recipe["note"], style="yellow"))
    for warning in record.warnings:
        grid.add_row("warning", Text(warning, style="yellow"))
    console.print(Panel(grid, title=f"onecard {record.command}", box=box.ROUNDED, expand=False))
