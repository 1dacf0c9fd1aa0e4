"""The verbs of a finished checkpoint: check it, write its model card, publish it."""

from pathlib import Path
from typing import Any

import click

from .shared import make_console, print_json, verb


@click.command()
@click.argument("checkpoint")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(["vllm", "transformers", "llama.cpp", "gptqmodel"]),
    help="Instead: will this engine load it, and load it right? May be given again.",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    help="With --engine vllm: over so many cards. [default: 1]",
)
@verb
def check(checkpoint: str, engines: tuple[str, ...], tensor_parallel: int | None) -> None:
    """Check a downloaded or finished CHECKPOINT: its digests, widths, shapes and values. Reads every byte.

    Against SHA256SUMS, onecard.json and its own config.json; a folder of another tool against what of these it has.
    With --engine its config.json and headers, and no weight, against that engine's loading rules (docs/engines.md).
    Exit code 0: sound, or it loads; 1: damaged, not as recorded, or a rule is broken; 2: no checkpoint.

    \b
    Examples:
      onecard check ./scout-int4
      onecard check ./scout-int4 --engine vllm --tensor-parallel 2
    """
    if engines or tensor_parallel:
        _check_engines(checkpoint, engines, tensor_parallel)
        return
    from ..publish.check import check as run
    from ..report.check_card import draw_check
    from ..report.progress import Progress

    console = make_console()
    with Progress(f"onecard check {checkpoint}", 1, console) as progress:
        found = run(checkpoint, progress)
    draw_check(found.line(), console)
    print_json(found.line())
    found.refuse()


def _check_engines(checkpoint: str, engines: tuple[str, ...], tensor_parallel: int | None) -> None:
    from ..checkpoint.engines.check import hold_against
    from ..core.errors import InputError
    from ..report.engine_card import draw_engines

    if tensor_parallel and "vllm" not in engines:
        raise InputError("--tensor-parallel is a setting of vLLM: give --engine vllm with it")
    held = hold_against(checkpoint, engines, tensor_parallel or 1)
    draw_engines(held.line(), make_console())
    print_json(held.line())
    held.refuse()


def _card_options(function: Any) -> Any:
    options = [
        click.option("--base-model", help="Hub id of the original. [default: where the run fetched it]"),
        click.option("--license", "licence", help="The hub's id of the licence. [default: the original's]"),
        click.option("--license-name", "licence_name", help="Its name, when the hub has no id for it."),
        click.option(
            "--record",
            "records",
            multiple=True,
            type=click.Path(path_type=Path),
            help="What verify or flips recorded of these files later; may be given again.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("checkpoint")
@_card_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write here. [default: README.md in CHECKPOINT]")
@click.option("--overwrite", is_flag=True, help="Replace a card that onecard did not draw.")
@verb
def card(checkpoint: str, out: Path | None, overwrite: bool, **wishes: Any) -> None:
    """Draw the model card of CHECKPOINT from its record: README.md, and the NOTICE that a Llama licence asks for.

    \b
    Example:
      onecard card ./scout-int4 --base-model meta-llama/Llama-4-Scout-17B-16E-Instruct
    """
    from ..publish.card import Wishes, draw, write
    from ..report.model_card import card_problems

    drawn = draw(checkpoint, Wishes(**wishes))
    written = [str(path) for path in write(drawn, Path(checkpoint), out, overwrite)]
    lacking = drawn.contradictions + card_problems(drawn.text)
    for problem in lacking:
        click.echo(f"warning: {problem}", err=True)
    click.echo(f"written: {', '.join(written)}", err=True)
    print_json({"checkpoint": checkpoint, "written": written, "lacking": lacking})


@click.command()
@click.argument("checkpoint")
@click.argument("repo")
@_card_options
@click.option("--dry-run", is_flag=True, help="Say what would be sent and what would be refused; send nothing.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--force", is_flag=True, help="Publish although the gate failed; the card says so.")
@verb
def publish(checkpoint: str, repo: str, dry_run: bool, private: bool, force: bool, **wishes: Any) -> None:
    """Send CHECKPOINT to the hub as REPO (owner/name), after checking everything. Stopped? The same line goes on.

    Refused: what is unfinished, unverified, damaged, without base model or licence, or against the terms of a Llama
    licence; and what failed its gate, unless --force. The token is the one of `hf auth login`, or HF_TOKEN.

    \b
    Example:
      onecard publish ./scout-int4 me/Llama-4-Scout-17B-16E-Instruct-int4 --dry-run
    """
    from ..publish.card import Wishes
    from ..publish.upload import prepare, send
    from ..report.progress import Progress
    from ..report.publish_card import draw_publication

    console = make_console()
    with Progress(f"onecard publish {checkpoint}", 1, console) as progress:
        found = prepare(checkpoint, repo, Wishes(**wishes), force, progress)
        line = found.line() | {"dry_run": dry_run}
        if not dry_run and not found.refused:
            line |= send(found, private, progress)
    draw_publication(line, dry_run, console)
    if dry_run or not found.refused:
        print_json(line)
    found.refuse()
