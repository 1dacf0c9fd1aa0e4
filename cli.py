"""The command line: verbs -> recipe -> pipeline -> exit code. torch is imported only inside a verb.

Two voices: a card for people on stderr, one JSON line on stdout for scripts.
Exit codes: 0 done; 1 a limit of the recipe was exceeded; 2 unusable input, nothing was written; 4 the machine gave out
(disk, memory, network), what is finished is kept; 130 stopped with Ctrl-C or SIGTERM, likewise.
"""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from . import __version__
from .core.errors import OnecardError, ResourceError

RECIPE_HELP = "A shipped recipe (see `onecard recipes`) or the path of a .yaml file."
DEVICE_HELP = "cpu, cuda, or auto: a GPU when there is one."


def _quiet_libraries() -> None:
    """Other libraries' warnings and bars would bury ours; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    """A line on stdout."""
    try:
        click.echo(text)
    except OSError as error:
        # Nothing more is tried when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(
            f"standard output could not be written ({error.strerror}). What the command put into files is whole"
        ) from error


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Errors of the user's become one message and their exit code; anything else is a bug and keeps its traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _stop)  # a scheduler's way to say Ctrl-C
            _quiet_libraries()
            function(*args, **kwargs)
        except OnecardError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:  # torch's own kinds are RuntimeErrors
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            first = str(error).partition("\n")[0]
            click.echo(
                f"error: memory ran out ({first}). What is finished is kept. A recipe with `output_blocks: 0` or a "
                "smaller `batch_tokens` needs less (it is another recipe: --overwrite); with more memory go on with "
                "--resume",
                err=True,
            )
            sys.exit(ResourceError.exit_code)

    return run


def _console() -> Any:
    from rich.console import Console

    # Names of folders and recipes are no markup.
    console = Console(file=sys.stderr, markup=False, emoji=False)
    # A log or a pipe has no width of its own: 110 columns hold every line of the card.
    return console if console.is_terminal else Console(file=sys.stderr, width=110, markup=False, emoji=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onecard")
def main() -> None:
    """Pack a mixture-of-experts model onto one GPU: Int4 experts, verified against the bf16 model.

    \b
    Start here:
      onecard quantize demo demo-int4 --recipe demo
    """


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--work", type=click.Path(path_type=Path), help="Where a run keeps what is finished. [default: OUT.work]")
@click.option("--resume", is_flag=True, help="Go on with a stopped run; it ends in the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace what a run put into OUT and the work directory.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Your own calibration texts (JSONL).")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Your own evaluation texts (JSONL).")
@_verb
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
) -> None:
    """Calibrate, quantize, emit and verify MODEL into the folder OUT.

    MODEL is a local safetensors folder, a hub id, or `demo`. Texts are JSONL, a line {"text": ...} or
    {"messages": [...]}; they take the place of the recipe's.

    \b
    Example, Llama 4 Scout on one H100 with your own texts:
      onecard quantize ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 \\
          --recipe llama4-scout-h100 --device cuda \\
          --calibration chats.jsonl --evaluation held-out.jsonl
    Stopped? The same line with --resume goes on where it was and ends in the same bytes (of the record, all but times
    and memory). It must find the same number of threads.
    """
    from .pipeline import quantize as run
    from .prepare import work_folder
    from .recipe import load_recipe
    from .report.card import draw_card
    from .report.record import result_line

    console = _console()
    try:
        record = run(
            model,
            out,
            load_recipe(recipe),
            device_name=device,
            work=work,
            resume=resume,
            overwrite=overwrite,
            calibration=calibration,
            evaluation=evaluation,
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
    _print(json.dumps(result_line(record, str(out))))


@main.command()
@click.argument("source")
@click.argument("checkpoint")
@click.option("--recipe", help=f"{RECIPE_HELP} Its evaluation texts and row lengths. [default: rtn-int4]")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Your own evaluation texts (JSONL).")
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@_verb
def verify(source: str, checkpoint: str, recipe: str | None, evaluation: Path | None, device: str) -> None:
    """Measure KL(SOURCE || CHECKPOINT) on the files as they are read back; neither model is ever whole in memory.

    \b
    Example:
      onecard verify ./Llama-4-Scout-17B-16E-Instruct ./scout-int4 --evaluation held-out.jsonl
    """
    from .recipe import load_recipe
    from .report.card import draw_card
    from .report.record import result_line
    from .verification import verify as run

    console = _console()
    record = run(
        source,
        checkpoint,
        load_recipe(recipe or "rtn-int4"),
        evaluation=evaluation,
        device_name=device,
        console=console,
    )
    draw_card(record, checkpoint, console)
    _print(json.dumps(result_line(record, checkpoint)))


@main.command()
@click.argument("model")
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--tensors", is_flag=True, help="List every tensor that will be emitted.")
@_verb
def plan(model: str, recipe: str, device: str, tensors: bool) -> None:
    """Say what quantizing MODEL would emit, to the byte, and what it would take; reads no weights.

    \b
    Example:
      onecard plan ./Llama-4-Scout-17B-16E-Instruct --recipe llama4-scout-h100 --tensors
    """
    from .inspection import plan as run
    from .recipe import load_recipe
    from .report.plan_card import draw_plan

    result = run(model, load_recipe(recipe), device)
    draw_plan(result, tensors, _console())
    _print(json.dumps(result.line()))


@main.command()
@click.argument("model")
@_verb
def inspect(model: str) -> None:
    """Show what MODEL (an original or a quantized checkpoint) is: family, layers, experts, widths, sizes, faults.

    \b
    Example:
      onecard inspect demo
    """
    from .inspection import inspect as run
    from .report.plan_card import draw_inspection

    facts = run(model)
    draw_inspection(facts, _console())
    _print(json.dumps(facts))


@main.command()
@click.argument("checkpoint")
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--image", type=click.Path(path_type=Path), help="A picture to ask about, for models that can see.")
@_verb
def generate(checkpoint: str, prompt: str, max_new_tokens: int, image: Path | None) -> None:
    """Load CHECKPOINT with transformers and answer PROMPT: the smoke test that other people's software reads the files.

    The whole model is loaded, dequantized, into memory.

    \b
    Example:
      onecard generate demo-int4 "What do you see?" --image picture.png
    """
    from .generate import generate as run

    _print(run(checkpoint, prompt, max_new_tokens, image))


@main.command()
@click.argument("name", required=False)
@_verb
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the one called NAME.

    \b
    Example: take one as the start of your own
      onecard recipes llama4-scout-h100 > mine.yaml
    """
    from .recipe import load_recipe, recipe_names, recipe_text

    if name is not None:
        _print(recipe_text(name).rstrip())
        return
    for known in recipe_names():
        recipe = load_recipe(known)
        _print(f"{known}\n    {recipe.description}" + (f"\n    {recipe.note}" if recipe.note else ""))
