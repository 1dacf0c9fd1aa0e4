"""The card of `onecard check --engine`: each engine's verdict and warnings. Broken rules are in the error message."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.units import counted
from .card import labelled


def draw_engines(line: dict[str, Any], console: Console) -> None:
    """Print the card on `console` (stderr); `line` is the verb's JSON line."""
    grid = labelled()
    grid.add_row("checkpoint", Text(line["checkpoint"], overflow="fold"))
    if line["tensor_parallel"] > 1:
        grid.add_row("cards", f"{line['tensor_parallel']}, tensor parallel")
    for engine, held in line["engines"].items():
        broken = [breach for breach in held["breaches"] if breach["severity"] == "error"]
        verdict = "loads" if held["loads"] else f"{counted(len(broken), 'rule')} broken"
        grid.add_row(engine, Text(f"{verdict} ({held['rules']} rules held)", style="green" if held["loads"] else "red"))
        for breach in held["breaches"]:
            if breach["severity"] == "warning":
                first, more = breach["offenders"][0], len(breach["offenders"]) - 1
                told = f"{breach['rule']}: {first}" + (f" and {more} more" if more else "") + f". {breach['way_out']}"
                grid.add_row("warning", Text(told, style="yellow"))
    grid.add_row("not checked", "digests and values: `onecard check` without --engine reads them")
    console.print(Panel(grid, title="onecard check --engine", box=box.ROUNDED, expand=False))
