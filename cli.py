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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onecard")
def main() -> None:
    """Pack a mixture-of-experts model onto one GPU: Int4 experts, measured against the bf16 model.

    \b
    Start here:
      onecard quantize demo demo-int4 --recipe demo
    """


VERBS = (
    quantize,
    plan,
    calibration,
    pareto,
    inspect,
    verify,
    flips,
    gate,
    baseline,
    report,
    check,
    export,
    card,
    publish,
    generate,
    recipes,
    completion,
)
for command in VERBS:
    main.add_command(command)
