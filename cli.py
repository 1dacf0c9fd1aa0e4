"""The command line: verbs -> recipe -> pipeline -> exit code. torch is imported only inside a verb.

Two voices: a card for people on stderr, one JSON line on stdout for scripts.
Exit codes: 0 done; 1 a limit was exceeded, or the gate found a regression; 2 unusable input, nothing was written; 4 the
machine gave out (disk, memory, network), what is finished is kept; 130 stopped with Ctrl-C or SIGTERM, likewise.
"""

import json
import sys
from pathlib import Path

import click

from . import __version__
from .cli_calibration import calibration
from .cli_evidence import flips, verify
from .cli_export import export
from .cli_gate import baseline, gate
from .cli_publish import card, check, publish
from .cli_report import report
from .verbs import DEVICE_HELP, RECIPE_HELP, TEXTS_HELP, make_console, print_line, verb


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onecard")
def main() -> None:
    """Pack a mixture-of-experts model onto one GPU: Int4 experts, verified against the bf16 model.

    \b
    Start here:
      onecard quantize demo demo-int4 --recipe demo
    """


main.add_command(calibration)
main.add_command(verify)
main.add_command(flips)
main.add_command(gate)
main.add_command(baseline)
main.add_command(report)
main.add_command(check)
main.add_command(card)
main.add_command(publish)
main.add_command(export)


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--work", type=click.Path(path_type=Path), help="Where a run keeps what is finished. [default: OUT.work]")
@click.option("--resume", is_flag=True, help="Go on with a stopped run; it ends in the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace what a run put into OUT and the work directory.")
@click.option("--calibration", type=click.Path(path_type=Path), help=f"Your own calibration texts: {TEXTS_HELP}.")
@click.option("--evaluation", type=click.Path(path_type=Path), help=f"Your own evaluation texts: {TEXTS_HELP}.")
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
    from .gate import refuse_failed
    from .pipeline import quantize as run
    from .prepare import work_folder
    from .recipe import load_recipe
    from .report.card import draw_card
    from .report.record import result_line

    console = make_console()
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
    print_line(json.dumps(result_line(record, str(out))))
    refuse_failed(record.to_json(), str(out))


@main.command()
@click.argument("model")
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--tensors", is_flag=True, help="List every tensor that will be emitted.")
@verb
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
    draw_plan(result, tensors, make_console())
    print_line(json.dumps(result.line()))


@main.command()
@click.argument("model")
@verb
def inspect(model: str) -> None:
    """Show what MODEL (an original or a quantized checkpoint) is: family, layers, experts, widths, sizes, faults.

    \b
    Example:
      onecard inspect demo
    """
    from .inspection import inspect as run
    from .report.plan_card import draw_inspection

    facts = run(model)
    draw_inspection(facts, make_console())
    print_line(json.dumps(facts))


@main.command()
@click.argument("checkpoint")
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--image", type=click.Path(path_type=Path), help="A picture to ask about, for models that can see.")
@verb
def generate(checkpoint: str, prompt: str, max_new_tokens: int, image: Path | None) -> None:
    """Load CHECKPOINT with transformers and answer PROMPT: the smoke test that other people's software reads the files.

    The whole model is loaded, dequantized, into memory.

    \b
    Example:
      onecard generate demo-int4 "What do you see?" --image picture.png
    """
    from .generate import generate as run

    print_line(run(checkpoint, prompt, max_new_tokens, image))


@main.command()
@click.argument("name", required=False)
@verb
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the one called NAME.

    \b
    Example: take one as the start of your own
      onecard recipes llama4-scout-h100 > mine.yaml
    """
    from .recipe import load_recipe, recipe_names, recipe_text

    if name is not None:
        print_line(recipe_text(name).rstrip())
        return
    for known in recipe_names():
        recipe = load_recipe(known)
        print_line(f"{known}\n    {recipe.description}" + (f"\n    {recipe.note}" if recipe.note else ""))
