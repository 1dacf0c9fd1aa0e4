"""The verb that draws a record as a page."""

from pathlib import Path

import click

from .shared import make_console, print_json, verb


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", default="report.html", show_default=True, type=click.Path(path_type=Path), help="The page's file."
)
@click.option("--overwrite", is_flag=True, help="Replace the file even if it is no report.")
@verb
def report(run: Path, output: Path, overwrite: bool) -> None:
    """Draw RUN as one self-contained HTML page, from its record alone: no network, no model, no texts are needed.

    RUN is a record (of `verify --record` or `flips --record`) or the folder of a finished checkpoint. A report that is
    there already is replaced.

    \b
    Example:
      onecard report ./scout-int4 -o report.html
    """
    from ..checkpoint import files
    from ..core.errors import InputError
    from ..core.outputs import refuse_unwritable
    from ..core.record.reading import read_record
    from ..core.units import size
    from ..report.html import facts, is_report, render

    refuse_unwritable({"the page": output})
    if output.exists() and not overwrite:
        with output.open("rb") as file:
            if not is_report(file.read(4096)):
                raise InputError(f"{output} exists and is no report: name another file, or add --overwrite")
    record = read_record(run)
    if run.is_dir():
        record = record.called(run.resolve().name)
    page = render(record)
    files.write_bytes(output, page.encode())
    line = {"report": str(output), **facts(record, page)}
    make_console().print(
        f"{output}: {size(line['bytes'])}, {line['figures']} charts in {len(line['sections'])} sections. Open it in "
        "any browser; it fetches nothing.",
        soft_wrap=True,
        highlight=False,
    )
    print_json(line)
