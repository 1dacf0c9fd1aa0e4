"""The verbs of `onecard calibration`: show rows, count the rows of every expert, let the model write answers."""

import sys
from pathlib import Path
from typing import Any

import click

from .options import Between, ModelOrRun, device_option, model_argument, recipe_option, texts_option
from .shared import make_console, print_json, verb

ROWS_HELP = "Write at most this many conversations."
ANSWER_HELP = "At most this many tokens in an answer."
TURNS_HELP = "At most this many answers in a conversation."


class _Verbs(click.Group):
    """A group whose verbs can also be written as flags: `onecard calibration --show` is `onecard calibration show`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = [arg for arg in args if arg in ("--show", "--coverage")]
        if len(flags) == 1:
            args = [flags[0].removeprefix("--"), *(arg for arg in args if arg not in flags)]
        return super().parse_args(ctx, args)


@click.group(cls=_Verbs)
@click.option("--show", is_flag=True, help="Another spelling of the verb.")
@click.option("--coverage", is_flag=True, help="Another spelling of the verb.")
def calibration(show: bool, coverage: bool) -> None:
    """Look at calibration texts, count the rows of every expert, or let the model write the answers.

    \b
    Example:
      onecard calibration --show
    """
    if show or coverage:
        raise click.UsageError("--show and --coverage are verbs: give one of them")


def _recipe(model: str, name: str | None) -> Any:
    """The named recipe; the demo has one of its own. Raises InputError."""
    from ..core.errors import InputError
    from ..recipe import load_recipe

    if name is None and model != "demo":
        raise InputError(f"no recipe is named for {model}: add --recipe NAME")
    return load_recipe(name or "demo")


def _rows_options(function: Any) -> Any:
    """Which rows: --recipe and the user's own texts."""
    return recipe_option()(texts_option("calibration")(texts_option("evaluation")(function)))


@calibration.command()
@model_argument(default="demo")
@_rows_options
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="How many rows to print.")
@click.option("--whole", is_flag=True, help="Do not shorten long rows.")
@verb
def show(
    model: str, recipe: str | None, calibration: Path | None, evaluation: Path | None, rows: int, whole: bool
) -> None:
    """Print example rows as MODEL sees them, special tokens included, and what all rows are made of. Reads no weights.

    \b
    Example:
      onecard calibration show ./Llama-4-Scout-17B-16E-Instruct --recipe llama4-scout-h100 --rows 5
    """
    from ..calibration.show import example_rows

    found = example_rows(model, _recipe(model, recipe), rows, calibration, evaluation)
    found.draw(whole, make_console())
    print_json(found.line())


@calibration.command()
@click.argument("model", type=ModelOrRun(), default="demo")
@_rows_options
@device_option()
@click.option("--svg", type=click.Path(path_type=Path), help="Also write the heat map to this file.")
@verb
def coverage(
    model: str,
    recipe: str | None,
    calibration: Path | None,
    evaluation: Path | None,
    device: str,
    svg: Path | None,
) -> None:
    """Count the calibration rows that every expert of MODEL gets, in one pass without quantizing; draw a heat map.

    MODEL may also be the OUT of a finished run: then the counts in its record are drawn.

    \b
    Example:
      onecard calibration coverage ./Llama-4-Scout-17B-16E-Instruct --recipe llama4-scout-h100 --svg coverage.svg
    """
    from ..calibration.coverage import coverage as run
    from ..checkpoint import files
    from ..core.errors import InputError
    from ..core.file_names import RECORD_NAME
    from ..report import heatmap

    if svg is not None and (svg.suffix != ".svg" or not svg.parent.is_dir()):
        raise InputError(f"the picture {svg} must be an .svg file in a folder that exists")
    console = make_console()
    chosen = _recipe("demo" if (Path(model) / RECORD_NAME).is_file() else model, recipe)
    found = run(model, chosen, calibration=calibration, evaluation=evaluation, device_name=device, console=console)
    heatmap.draw_coverage(found.title, found.blocks, found.counts, found.enough, console)
    if svg is not None:
        files.write_bytes(svg, heatmap.svg(found.title, found.blocks, found.counts, found.enough).encode())
    print_json(found.line())


@calibration.command()
@model_argument()
@click.argument("out", type=click.Path(path_type=Path))
@recipe_option()
@texts_option("calibration")
@click.option("--rows", default=512, show_default=True, type=click.IntRange(1), help=ROWS_HELP)
@click.option(
    "--max-new-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help=ANSWER_HELP,
)
@click.option("--temperature", default=0.7, show_default=True, type=Between(0, 10), help="0: greedy decoding.")
@click.option("--turns", default=4, show_default=True, type=click.IntRange(1), help=TURNS_HELP)
@click.option("--seed", default=0, show_default=True)
@device_option()
@click.option("--block-by-block", is_flag=True, help="Never load the whole model. [default: if it does not fit]")
@click.option("--overwrite", is_flag=True, help="Replace OUT and what a stopped run left beside it.")
@verb
def synthesize(
    model: str,
    out: Path,
    recipe: str | None,
    calibration: Path | None,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    turns: int,
    seed: int,
    device: str,
    block_by_block: bool,
    overwrite: bool,
) -> None:
    """Let MODEL answer the recipe's calibration conversations; OUT is a JSONL file for --calibration.

    Stopped? The same command goes on where it was.

    \b
    Example:
      onecard calibration synthesize ./Llama-4-Scout-17B-16E-Instruct own.jsonl --recipe llama4-scout-h100
      onecard quantize ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 --recipe llama4-scout-h100 --calibration own.jsonl
    """
    from ..calibration.conversations import SynthesisSettings
    from ..calibration.synthesis import Where
    from ..calibration.synthesis import synthesize as run

    try:
        line = run(
            model,
            out,
            _recipe(model, recipe),
            SynthesisSettings(
                rows=rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, turns=turns
            ),
            Where(device, block_by_block),
            calibration=calibration,
            overwrite=overwrite,
            console=make_console(),
        )
    except KeyboardInterrupt:
        click.echo(f"stopped: what is finished is in {out}.unfinished. Go on with the same command.", err=True)
        sys.exit(130)
    print_json(line)
