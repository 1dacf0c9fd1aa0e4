"""Draws the cards of `onecard plan` and `onecard inspect` for people."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.units import clock, size
from .card import labelled


def draw_plan(result: Any, tensors: bool, console: Console) -> None:
    """Prints the plan. `result` is an inspection.PlanResult; `tensors` also lists every tensor."""
    plan, cost = result.plan, result.cost
    if tensors:
        rows = [("tensor", "dtype", "shape", "bytes", "file")] + [
            (tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), f"{tensor.nbytes:,}", shard.file)
            for shard, tensor in plan.tensors()
        ]
        name, dtype, shape, count, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        for row in rows:  # lines, because a table would cut long names
            console.print(
                f"{row[0]:{name}}  {row[1]:{dtype}}  {row[2]:{shape}}  {row[3]:>{count}}  {row[4]}", soft_wrap=True
            )
    grid = labelled()
    grid.add_row("model", f"{result.model.name} ({result.model.adapter.family}, {plan.parameters:,} parameters)")
    grid.add_row("recipe", result.recipe.name)
    if result.recipe.note:
        grid.add_row("note", Text(result.recipe.note, style="yellow"))
    files = sum(name.endswith((".safetensors", ".gguf")) for name, _ in result.planned)
    emitted = f"{result.emitted_bytes:,} bytes ({size(result.emitted_bytes)}) in {files} files"
    grid.add_row("emitted", f"{emitted}, {result.recipe.format}")
    grid.add_row("source", f"{plan.source_bytes:,} bytes ({size(plan.source_bytes)})")
    grid.add_row(
        "bits per weight",
        f"{plan.bits_per_weight:.3f} over all, {plan.quantized_bits_per_weight:.3f} where quantized "
        f"({plan.quantized_parameters / plan.parameters:.1%} of the weights)",
    )
    for role, count in plan.role_bytes.items():
        grid.add_row(f"  {role}", f"{count:,} bytes")
    grid.add_row("time", f"about {clock(cost.seconds)} ({_trust(cost)}; {result.rates_from})")
    parts = sorted(cost.seconds_by.items(), key=lambda part: -part[1])
    grid.add_row("", ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts if seconds >= 1))
    memory = f"about {size(cost.ram_bytes)} of RAM"
    if cost.device_bytes:
        memory += f", {size(cost.device_bytes)} of device memory"
    grid.add_row("memory", memory + " (an estimate)")
    grid.add_row("rows between blocks", _places(cost.rows))
    grid.add_row("disk", f"{size(cost.disk_bytes)} free are needed")
    if result.pricing is not None:
        grid.add_row(
            "pricing",
            f"{result.pricing.streams:,} streams of {result.pricing.tokens:,} tokens before that: about "
            f"{clock(result.pricing.seconds)}, {size(result.pricing.disk_bytes)} of disk. The sizes above are the "
            "least that can be chosen; the recipe spends what its budget has",
        )
    for warning in result.warnings:
        grid.add_row("warning", Text(warning, style="yellow"))
    console.print(Panel(grid, title="onecard plan", box=box.ROUNDED, expand=False))


def _trust(cost: Any) -> str:
    if cost.is_a_model:
        return "a model that no GPU has confirmed"
    return (
        "an estimate: 15 to 30 % short where it was tried with measured rates, long where texts hold less than the "
        "recipe wants"
    )


def _places(rows: Any) -> str:
    """Where they will lie, and how often a run commits."""
    places = [
        f"{size(nbytes)} {where}"
        for nbytes, where in (
            (rows.device_bytes, "on the card"),
            (rows.ram_bytes, "in RAM"),
            (rows.file_bytes, "in files"),
        )
        if nbytes
    ]
    often = "each block" if rows.blocks_per_commit == 1 else f"every {rows.blocks_per_commit} blocks"
    return f"at most {', '.join(places)}; committed after {often}, {size(rows.commit_bytes)} each time"


def draw_inspection(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the inspection. `facts` is the result of inspection.inspect."""
    grid = labelled()
    grid.add_row("model", Text(f"{facts['model']} ({facts['family']})"))
    grid.add_row(
        "blocks",
        f"{facts['blocks']}, {facts['moe_blocks']} with {facts['experts']} experts, "
        f"{facts['experts_per_token']} per token",
    )
    grid.add_row("sizes", f"hidden {facts['hidden_size']:,}, vocabulary {facts['vocab_size']:,}")
    if facts["format"] is not None:
        grid.add_row("format", Text(facts["format"]))
    grid.add_row("vision tower", "yes" if facts["vision"] else "no")
    grid.add_row("parameters", f"{facts['parameters']:,}")
    grid.add_row(
        "files",
        f"{facts['file_bytes']:,} bytes ({size(facts['file_bytes'])}) in {facts['shards']}, "
        f"{facts['bits_per_weight']:.3f} bits per weight",
    )
    for role, entry in sorted(facts["roles"].items(), key=lambda item: -item[1]["parameters"]):
        widths = ", ".join(f"{count:,} in {width}" for width, count in entry["widths"].items())
        grid.add_row(f"  {role}", widths)
    for warning in facts["warnings"]:
        grid.add_row("warning", Text(warning, style="yellow"))
    for fault in facts["config_faults"]:
        grid.add_row("config fault", Text(fault, style="yellow"))
    console.print(Panel(grid, title="onecard inspect", box=box.ROUNDED, expand=False))
