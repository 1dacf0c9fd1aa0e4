"""The card of `onecard publish`: every file with its bytes, what is not sent, and what is refused."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.units import size
from .card import labelled


def draw_publication(line: dict[str, Any], dry: bool, console: Console) -> None:
    """Print the card on `console` (stderr); `line` is the verb's JSON line."""
    grid = labelled()
    grid.add_row("checkpoint", Text(line["checkpoint"], overflow="fold"))
    grid.add_row("repository", Text(line["repo"], overflow="fold"))
    for name, count in line["files"].items():
        grid.add_row("", Text(f"{count:>15,} bytes  {name}", overflow="fold"))
    grid.add_row("in all", f"{len(line['files'])} files, {size(line['bytes'])}; card: {line['card']}")
    if line["not_sent"]:
        grid.add_row("not sent", Text(", ".join(line["not_sent"]), overflow="fold"))
    for what in line["forced"]:
        grid.add_row("forced", Text(what, style="yellow"))
    for what in line["refused"]:
        grid.add_row("refused", Text(what, style="red"))
    if "url" in line:
        grid.add_row("published", Text(line["url"], style="green"))
    title = "onecard publish, a dry run: nothing is sent" if dry else "onecard publish"
    console.print(Panel(grid, title=title, box=box.ROUNDED, expand=False))
