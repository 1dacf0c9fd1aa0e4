"""The card of `onecard check`: what was checked, and the verdict. The problems themselves are in the error message."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.units import counted, size
from .card import labelled


def draw_check(line: dict[str, Any], console: Console) -> None:
    """Print the card on `console` (stderr); `line` is the verb's JSON line."""
    grid = labelled()
    grid.add_row("checkpoint", Text(line["checkpoint"], overflow="fold"))
    if "files" in line:
        grid.add_row("digests", f"of {counted(line['files'], 'file')} computed and compared")
    if "tensors" in line:
        grid.add_row(
            "tensors",
            f"{counted(line['tensors'], 'tensor')} in {size(line['weight_bytes'])}, "
            f"{line['quantized_modules']:,} of them matrices in few bits",
        )
    for what in line["not_checked"]:
        grid.add_row("not checked", Text(what, style="yellow"))
    count = counted(len(line["problems"]), "problem")
    grid.add_row("verdict", Text("sound", style="green") if line["sound"] else Text(count, style="red"))
    console.print(Panel(grid, title="onecard check", box=box.ROUNDED, expand=False))
