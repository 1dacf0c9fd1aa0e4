"""`onecard quantize`: calibrate, quantize, emit and verify."""

import json
import sys
from pathlib import Path

import click

from .shared import DEVICE_HELP, RECIPE_HELP, TEXTS_HELP, make_console, print_line, verb


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--work", type=click.Path(path_type=Path), help="Where a run keeps what is finished. [default: OUT.work]")
@click.option("--resume", is_flag=True, help="Go on with a stopped run; it ends in the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace what a run put into OUT and the work directory.")
@click.option("--calibration", type=click.Path(path_type=Path), help=f"Your own calibration texts: {TEXTS_HELP}.")
@click.option("--evaluation", type=click.Path(path_type=Path), help=f"Your own evaluation texts: {TEXTS_HELP}.")
@click.option("--prices", type=click.Path(path_type=Path), help="Prices that `onecard pareto` wrote, for bits: fit.")
@click.option("--budget-gb", type=click.FloatRange(0, min_open=True), help="bits: fit, to so many GB of files.")
@verb
def quantize(
    model: str,
    out: Path,
    recipe: str,
    device: str,
    work: Path | None,
    resume: bool,
    overwrite: bool,
    calibration: Path | None,
    evaluation: Path | None,
    prices: Path | None,
    budget_gb: float | None,
) -> None:
    """Calibrate, quantize, emit and verify MODEL into the folder OUT.

    MODEL is a local safetensors folder, a hub id, or `demo`. Texts are JSONL (a line {"text": ...} or {"messages":
    [...]}), Parquet, plain text, or a folder of them; they take the place of the recipe's.

    \b
    Example, Llama 4 Scout on one H100 with your own texts:
      onecard quantize ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 \\
          --recipe llama4-scout-h100 --device cuda \\
          --calibration chats.jsonl --evaluation held-out.jsonl
    Stopped? The same line with --resume goes on where it was and ends in the same bytes (of the record, all but times
    and memory). It must find the same number of threads.
    """
    from ..checkpoint.paths import work_folder
    from ..core.errors import InputError
    from ..eval.gate import refuse_failed
    from ..pipeline import Options
    from ..pipeline import quantize as run
    from ..recipe import load_recipe
    from ..report.card import draw_card
    from ..report.record import result_line

    console = make_console()
    loaded = load_recipe(recipe)
    if budget_gb is not None:
        loaded = loaded.changed(bits="fit", budget_gb=budget_gb, gpu=None)
    if prices is not None and loaded.widths.bits != "fit":
        raise InputError(f"--prices is for recipes with bits: fit, and {recipe} has bits: {loaded.widths.bits}")
    try:
        record = run(
            model,
            out,
            loaded,
            Options(
                device_name=device,
                work=work,
                resume=resume,
                overwrite=overwrite,
                calibration=calibration,
                evaluation=evaluation,
                prices=prices,
            ),
            console=console,
        )
    except KeyboardInterrupt:
        click.echo(
            f"stopped: what is finished lies in {work_folder(out, work)}. Go on with the same command and --resume, or "
            "remove it.",
            err=True,
        )
        sys.exit(130)
    draw_card(record, str(out), console)
    print_line(json.dumps(result_line(record, str(out))))
    refuse_failed(record.to_json(), str(out))
