"""The command line: one verb each from commands/. torch is imported only inside a verb.

Two voices: a card for people on stderr, one JSON line for scripts on stdout.
Exit codes: 0 done; 1 a limit was exceeded, or the gate found a regression; 2 unusable input, nothing was written; 3 the
model does not fit the card; 4 the machine failed (disk, memory, network), finished work is kept; 130 stopped with
Ctrl-C or SIGTERM, finished work is kept.
"""

import click

from . import __version__
from .commands.calibration import calibration
from .commands.completion import completion
from .commands.export import export
from .commands.gate import baseline, gate
from .commands.inspect import generate, inspect, recipes
from .commands.pareto import pareto
from .commands.plan import plan
from .commands.publish import card, check, publish
from .commands.quantize import quantize
from .commands.report import report
from .commands.verify import flips, verify

# A verb has them without the group too: click keeps the help option of the first context that asks for it.
HELP_NAMES = ["-h", "--help"]


@click.group(context_settings={"help_option_names": HELP_NAMES, "max_content_width": 110})
@click.version_option(__version__, prog_name="onecard")
def main() -> None:
    """Pack a mixture-of-experts model onto one GPU: Int4 experts, measured against the bf16 model.

    \b
    Start here:
      onecard quantize demo demo-int4 --recipe demo
    """


# Each verb with its line in `onecard --help`.
VERBS = {
    quantize: "Calibrate, quantize, emit and verify a model.",
    plan: "Say whether a model fits a card.",
    calibration: "Look at calibration texts, or make some.",
    pareto: "Draw predicted KL against bytes.",
    inspect: "Show what a checkpoint is.",
    verify: "Measure a checkpoint's KL from its original.",
    flips: "Count the answers that change.",
    gate: "Hold a report against limits and a baseline.",
    baseline: "Freeze a report into a baseline for the gate.",
    report: "Draw a record as an HTML page.",
    check: "Check the files of a checkpoint.",
    export: "Write a checkpoint in another format.",
    card: "Draw the model card of a checkpoint.",
    publish: "Send a checkpoint to the hub.",
    generate: "Let a checkpoint answer a prompt.",
    recipes: "List the shipped recipes, or print one.",
    completion: "Print the script for shell completion.",
}
for command, line in VERBS.items():
    command.short_help = line
    command.context_settings["help_option_names"] = HELP_NAMES
    main.add_command(command)
