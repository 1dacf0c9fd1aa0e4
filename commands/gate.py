"""The verbs `gate` and `baseline`: is a report good enough, and no worse than a frozen one?"""

import sys
from pathlib import Path

import click

from .options import Between
from .shared import make_console, print_json, verb


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="A frozen baseline, or another report.")
@click.option(
    "--limits",
    type=click.Path(path_type=Path),
    help="A YAML file of limits, or a recipe, instead of the record's own.",
)
@click.option(
    "--tolerance",
    type=Between(0, 10),
    default=0.01,
    show_default=True,
    help="The mean KL may exceed the baseline's by this share of it.",
)
@click.option(
    "--tolerance-top1",
    type=Between(0, 1),
    default=0.002,
    show_default=True,
    help="The share of tokens with the same top-1 may fall by this much.",
)
@click.option(
    "--tolerance-flips",
    type=Between(0, 1),
    default=0.01,
    show_default=True,
    help="The share of changed answers of each task may rise by this much.",
)
@click.option(
    "--across-dtypes",
    is_flag=True,
    help="Compare although REPORT and the baseline were computed in different dtypes; a note says so.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks into this file as JUnit XML.")
@click.option(
    "--summary",
    type=click.Path(path_type=Path),
    envvar="GITHUB_STEP_SUMMARY",
    help="Append the checks to this file as Markdown. [default: $GITHUB_STEP_SUMMARY where it is set]",
)
@verb
def gate(
    report: Path,
    baseline: Path | None,
    limits: Path | None,
    tolerance: float,
    tolerance_top1: float,
    tolerance_flips: float,
    across_dtypes: bool,
    junit: Path | None,
    summary: Path | None,
) -> None:
    """Compare REPORT with limits and with a baseline. Exit code 0: pass; 1: a limit or a regression; 2: unusable input.

    REPORT is a record (JSON) or a checkpoint folder with its onecard.json. Limits are those of the recipe that made
    it (a record of verify or flips names none), or the keys of --limits: max_kl_mean_nats, max_kl_p99_nats,
    min_same_top1, max_flip_rate, max_emitted_bytes, fail_below_expert_rows, max_fallbacks. A limit is compared with
    the measured figure. Against a baseline, documents and items are pairs, and a check fails only if even the low end
    of the interval is beyond the tolerance.

    \b
    Example:
      onecard gate ./scout-int4 --baseline baseline.json --junit gate.xml
    """
    from ..checkpoint import files
    from ..core.errors import LimitError
    from ..core.outputs import refuse_unwritable
    from ..eval.comparison import Tolerances
    from ..eval.gate import run_gate
    from ..recipe import load_limits
    from ..report.gate_card import draw_verdict, markdown
    from ..report.junit import junit as as_junit

    refuse_unwritable({"--junit": junit, "--summary": summary})
    verdict = run_gate(
        report,
        baseline,
        None if limits is None else load_limits(limits),
        Tolerances(tolerance, tolerance_top1, tolerance_flips),
        across_dtypes,
    )
    draw_verdict(verdict, make_console())
    if junit is not None:
        files.write_bytes(junit, as_junit(verdict))
    if summary is not None:
        with files.disk_errors(summary), summary.open("a", encoding="utf-8") as file:
            file.write(markdown(verdict))
    print_json(verdict.to_json())
    if not verdict.passed:
        sys.exit(LimitError.exit_code)


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@verb
def baseline(report: Path, out: Path) -> None:
    """Freeze REPORT into a small file that `gate --baseline` compares with; it holds no text and no paths.

    \b
    Example:
      onecard baseline ./scout-int4 -o baseline.json
    """
    from ..eval.baseline import freeze

    print_json(freeze(report, out))
