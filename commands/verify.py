"""The verbs that measure a checkpoint against its original: `onecard verify` and `onecard flips`."""

import os
from datetime import datetime
from pathlib import Path

import click

from .options import date_option, dated, device_option, model_argument, recipe_option, texts_option
from .shared import make_console, print_json, verb

RECORD_HELP = "Write the whole record, every figure of the run, as JSON to this file."


def _check_files(record: Path | None, tokens: Path | None = None) -> None:
    """Refuse files that could not be written at the end, before hours of work. Raises InputError."""
    from ..core.errors import InputError
    from ..core.file_names import RECORD_NAME
    from ..core.outputs import refuse_unwritable

    refuse_unwritable({"the record": record, "the tokens": tokens})
    paths = (record, tokens)
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if not os.access(folder, os.W_OK):
            raise InputError(f"{path} cannot be written: the folder {folder} is read-only")
        if path.name == RECORD_NAME and path.exists() and (folder / "config.json").exists():
            raise InputError(f"{path} is a checkpoint's own record, which is not replaced: name another file")
    named = [path.absolute() for path in paths if path is not None]
    if len({*named}) < len(named):
        raise InputError(f"{named[0]} is named for two things: name two files")


@click.command()
@model_argument("source")
@model_argument("checkpoint")
@recipe_option(more="Its evaluation texts, row lengths and tasks. [default: rtn-int4]")
@texts_option("evaluation")
@click.option("--record", type=click.Path(path_type=Path), help=RECORD_HELP)
@click.option("--keep-tokens", type=click.Path(path_type=Path), help="Keep every token's results in a Parquet file.")
@click.option(
    "--floor",
    is_flag=True,
    help="Also measure KL(SOURCE in float32 || SOURCE in the compute dtype): what that dtype costs by itself. It takes "
    "about as long again.",
)
@date_option()
@device_option()
@verb
def verify(
    source: str,
    checkpoint: str,
    recipe: str | None,
    evaluation: Path | None,
    record: Path | None,
    keep_tokens: Path | None,
    floor: bool,
    date: datetime | None,
    device: str,
) -> None:
    """Measure KL(SOURCE || CHECKPOINT) on the files as they are read back; neither model is ever whole in memory.

    CHECKPOINT may be another tool's: whatever `onecard inspect` can read. With --record: figures by position, kind and
    document, worst tokens, worst experts, and what `onecard gate` and `onecard report` work from.

    \b
    Example:
      onecard verify ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 --evaluation held-out.jsonl --record verify.json
    """
    from ..checkpoint.files import write_json
    from ..eval.verify import VerifyOptions
    from ..eval.verify import verify as run
    from ..recipe import load_recipe
    from ..report.card import draw_card
    from ..report.line import result_line

    _check_files(record, keep_tokens)
    console = make_console()
    found = run(
        source,
        checkpoint,
        dated(load_recipe(recipe or "rtn-int4"), date),
        VerifyOptions(evaluation=evaluation, keep_tokens=keep_tokens, floor=floor),
        device_name=device,
        console=console,
    )
    draw_card(found, checkpoint, console)
    if record is not None:
        write_json(record, found.to_json())
    print_json(result_line(found, checkpoint))


@click.command()
@model_argument("source")
@model_argument("checkpoint")
@click.option(
    "--tasks",
    default="demo",
    show_default=True,
    help="Comma-separated: demo (the embedded questions), mmlu, arc-easy, arc-challenge, hellaswag, "
    "lm-eval:TASK (a task of lm-evaluation-harness, or its YAML file), or .jsonl and .parquet files with question, "
    "choices and answer.",
)
@click.option("--shots", default=0, show_default=True, type=click.IntRange(0, 32), help="Examples before a question.")
@click.option("--items", type=click.IntRange(1), help="Of each task so many, drawn by a seed. [default: all]")
@click.option("--record", type=click.Path(path_type=Path), help=RECORD_HELP)
@date_option()
@device_option()
@verb
def flips(
    source: str,
    checkpoint: str,
    tasks: str,
    shots: int,
    items: int | None,
    record: Path | None,
    date: datetime | None,
    device: str,
) -> None:
    """Let SOURCE and CHECKPOINT answer multiple-choice items, and count the answers that change.

    Accuracy hides them: as many answers may turn right as turn wrong. Both models answer by the likelihood of the
    options, in one walk side by side, neither ever whole in memory.

    \b
    Examples:
      onecard flips demo demo-int4
      onecard flips ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 --tasks mmlu,arc-challenge --shots 5 --items 1000
    """
    from ..checkpoint.files import write_json
    from ..eval.tasks import load_tasks
    from ..eval.verify import flips as run
    from ..recipe import load_recipe
    from ..report.card import draw_card
    from ..report.line import result_line

    _check_files(record)
    console = make_console()
    wanted = load_tasks([name.strip() for name in tasks.split(",")], shots, items)
    use = dated(load_recipe("rtn-int4"), date)
    found = run(source, checkpoint, use, wanted, device_name=device, console=console)
    draw_card(found, checkpoint, console)
    if record is not None:
        write_json(record, found.to_json())
    print_json(result_line(found, checkpoint))
