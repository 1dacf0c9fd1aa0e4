"""The verb that writes a checkpoint anew in another format: `onecard export`."""

import json
import sys
from pathlib import Path

import click

from .options import FormatName, model_argument
from .shared import make_console, print_line, verb


@click.command()
@model_argument("checkpoint")
@click.option(
    "--format",
    "format_name",
    type=FormatName(),
    required=True,
    help="What to write: compressed-tensors, gptq, gptq-v2, bnb-nf4, gguf or bf16.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace what onecard put into OUT.")
@click.option("--dry-run", is_flag=True, help="Say which files there would be, to the byte, and write nothing.")
@verb
def export(checkpoint: str, format_name: str, out: Path, overwrite: bool, dry_run: bool) -> None:
    """Write CHECKPOINT anew in another format, from its own integer codes: nothing is quantized again.

    CHECKPOINT may be another tool's. A format that cannot hold it says why, before anything is written.

    \b
    Examples:
      onecard export ./scout-int4 --format gptq -o ./scout-int4-gptq
      onecard export ./scout-int4 --format bf16 -o ./scout-dequantized --dry-run
    """
    from ..conversion.export import export as run
    from ..report.export_card import draw_export
    from ..report.progress import Progress

    console = make_console()
    try:
        with Progress(f"onecard export {checkpoint}", 1, console) as progress:
            done = run(checkpoint, format_name, out, progress, overwrite=overwrite, dry_run=dry_run)
    except KeyboardInterrupt:
        click.echo(f"stopped: {out} is no checkpoint yet. The same command with --overwrite starts anew.", err=True)
        sys.exit(130)
    draw_export(done.line(), console)
    print_line(json.dumps(done.line()))
