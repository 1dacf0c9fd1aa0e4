"""`onecard export`: writes a checkpoint in another format."""

import sys
from pathlib import Path

import click

from ..conversion.names import FORMAT_NAMES
from .options import FormatName, model_argument, without_adapter_option
from .shared import make_console, print_json, verb


@click.command()
@model_argument("checkpoint")
@click.option(
    "--format",
    "format_name",
    type=FormatName(),
    required=True,
    help=f"One of {', '.join(FORMAT_NAMES)}.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace what onecard wrote to OUT before.")
@click.option("--dry-run", is_flag=True, help="List the files with their exact sizes, and write nothing.")
@without_adapter_option()
@verb
def export(checkpoint: str, format_name: str, out: Path, overwrite: bool, dry_run: bool, without_adapter: bool) -> None:
    """Write CHECKPOINT in another format, with the same integer codes: nothing is quantized again.

    CHECKPOINT may come from another tool. A format that cannot hold it is refused with the reasons, before anything is
    written.

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
            done = run(
                checkpoint,
                format_name,
                out,
                progress,
                overwrite=overwrite,
                dry_run=dry_run,
                without_adapter=without_adapter,
            )
    except KeyboardInterrupt:
        click.echo(f"stopped: {out} is not a checkpoint yet. The same command with --overwrite starts again.", err=True)
        sys.exit(130)
    draw_export(done.line(), console)
    print_json(done.line())
