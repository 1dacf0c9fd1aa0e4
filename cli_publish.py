"""The verbs of a finished checkpoint: check it, write its model card, publish it."""

import json

import click

from .verbs import make_console, print_line, verb


@click.command()
@click.argument("checkpoint")
@verb
def check(checkpoint: str) -> None:
    """Check a downloaded or finished CHECKPOINT: its digests, widths, shapes and values. Reads every byte.

    Against SHA256SUMS, onecard.json and its own config.json; a folder of another tool against what of these it has.
    Exit code 0: sound; 1: damaged, or not as recorded; 2: no checkpoint.

    \b
    Example:
      onecard check ./scout-int4
    """
    from .check import check as run
    from .report.check_card import draw_check
    from .report.progress import Progress

    console = make_console()
    with Progress(f"onecard check {checkpoint}", 1, console) as progress:
        found = run(checkpoint, progress.begin)
    draw_check(found.line(), console)
    print_line(json.dumps(found.line()))
    found.refuse()
