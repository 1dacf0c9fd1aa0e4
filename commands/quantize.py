"""`onecard quantize`: calibrate, quantize, emit and verify."""

import sys
from pathlib import Path

import click

from .options import budget_option, device_option, model_argument, recipe_option, texts_option, without_adapter_option
from .shared import make_console, print_json, verb


@click.command()
@model_argument()
@click.argument("out", type=click.Path(path_type=Path))
@recipe_option(required=True)
@device_option()
@click.option("--work", type=click.Path(path_type=Path), help="Where the run keeps finished work. [default: OUT.work]")
@click.option("--resume", is_flag=True, help="Continue a stopped run. It ends in the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run put into OUT and the work directory.")
@texts_option("calibration")
@texts_option("evaluation")
@click.option("--prices", type=click.Path(path_type=Path), help="Prices measured by `onecard pareto`, for bits: fit.")
@without_adapter_option()
@budget_option("bits: fit, with this budget of files in decimal GB.")
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
    without_adapter: bool,
    budget_gb: float | None,
) -> None:
    """Calibrate, quantize, emit and verify MODEL into the folder OUT.

    MODEL is a local safetensors folder, a hub id, or `demo`. A line of JSONL texts is {"text": ...} or {"messages":
    [...]}.

    \b
    Example, Llama 4 Scout on one H100 with your own texts:
      onecard quantize ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 \\
          --recipe llama4-scout-h100 --device cuda \\
          --calibration chats.jsonl --evaluation held-out.jsonl

    Stopped? The same command with --resume continues and writes the same bytes (in the record, times and memory
    differ). The number of threads must be the same.
    """
    from ..checkpoint.paths import work_folder
    from ..core.errors import InputError
    from ..eval.gate import refuse_failed
    from ..pipeline import Options
    from ..pipeline import quantize as run
    from ..recipe import load_recipe
    from ..report.card import draw_card
    from ..report.line import result_line

    console = make_console()
    loaded = load_recipe(recipe)
    if budget_gb is not None:
        loaded = loaded.within(budget_gb)
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
                without_adapter=without_adapter,
            ),
            console=console,
        )
    except KeyboardInterrupt:
        click.echo(
            f"stopped: finished work is kept in {work_folder(out, work)}. Continue with the same command and --resume, "
            "or remove it.",
            err=True,
        )
        sys.exit(130)
    draw_card(record, str(out), console)
    print_json(result_line(record, str(out)))
    refuse_failed(record, str(out))
