"""The card of `onecard export`: every file with its bytes."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.units import size
from .card import labelled


def draw_export(line: dict[str, Any], console: Console) -> None:
    """Print the card on `console` (stderr); `line` is the verb's JSON line."""
    grid = labelled()
    grid.add_row("checkpoint", Text(line["checkpoint"], overflow="fold"))
    grid.add_row("format", line["format"])
    grid.add_row("into", Text(line["out"], overflow="fold"))
    for name, count in line["files"].items():
        grid.add_row("", Text(f"{count:>15,} bytes  {name}", overflow="fold"))
    grid.add_row("in all", f"{size(line['bytes'])} beside tokenizer and papers")
    for warning in line["warnings"]:
        grid.add_row("warning", Text(warning, overflow="fold"))
    title = "onecard export, a dry run: nothing is written" if line["dry_run"] else "onecard export"
    console.print(Panel(grid, title=title, box=box.ROUNDED, expand=False))
