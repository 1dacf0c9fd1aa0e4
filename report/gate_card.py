"""A verdict for people: a card on the terminal, and Markdown for a CI's job summary."""

import html
import re

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.record.verdict import BASELINE, LIMIT, Verdict
from ..core.units import counted

# Control characters can steer a terminal and are not allowed in XML; a lone surrogate cannot be encoded.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEADINGS = {LIMIT: "limit", BASELINE: "against the baseline"}


def clean(text: str) -> str:
    """Text from records and paths, safe to show anywhere."""
    return _FORBIDDEN.sub("\ufffd", text)


def headline(verdict: Verdict) -> str:
    """The result in one line."""
    checked = counted(len(verdict.checks), "check")
    return f"passed: {checked}" if verdict.passed else f"failed: {len(verdict.failed)} of {checked}"


def draw_verdict(verdict: Verdict, console: Console) -> None:
    """Print the card on `console` (stderr)."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for check in verdict.checks:
        mark = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        where = " (baseline)" if check.kind == BASELINE else ""
        grid.add_row(mark, Text(clean(f"{check.name}{where}")), Text(clean(check.said)))
    for note in verdict.notes:
        grid.add_row("", "note", Text(clean(note), style="yellow"))
    title = Text(clean(f"onecard gate {verdict.report}: {headline(verdict)}"))
    console.print(Panel(grid, title=title, box=box.ROUNDED, expand=False))


def _cell(text: str) -> str:
    """Foreign text inside a Markdown table: no markup, one line."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(clean(text).split()), quote=False))


def markdown(verdict: Verdict) -> str:
    """For $GITHUB_STEP_SUMMARY: a heading, a table of checks, notes. Ends in an empty line: others append too."""
    lines = [f"### onecard gate {headline(verdict)}", "", f"Report: {_cell(verdict.report)}  "]
    if verdict.baseline is not None:
        lines.append(f"Baseline: {_cell(verdict.baseline)}")
    lines += ["", "| | check | |", "|---|---|---|"]
    for check in verdict.checks:
        mark = "pass" if check.passed else "**FAIL**"
        lines.append(f"| {mark} | {_cell(check.name)} ({HEADINGS[check.kind or LIMIT]}) | {_cell(check.said)} |")
    lines += ["", *(f"- {_cell(note)}" for note in verdict.notes)]
    return "\n".join(lines).rstrip() + "\n\n"
