"""The Python API: what the verbs do, as functions that print nothing and return typed results.

Paths may be strings or Paths, a recipe a name, a path or a Recipe. What the user can mend is raised as an OnecardError,
of the kinds in core/errors.py. `from onecard import quantize` loads this module, and torch with it, on first use.
The functions add defaults and conversions only; the work is where each of them points.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from .checkpoint.inspect import Inspection
from .checkpoint.inspect import inspect as run_inspect
from .conversion.export import Exported
from .conversion.export import export as run_export
from .core.errors import InputError
from .core.record.schema import Record
from .core.record.verdict import Verdict
from .eval.comparison import Tolerances
from .eval.gate import run_gate
from .eval.tasks import load_tasks
from .eval.verify import VerifyOptions
from .eval.verify import flips as run_flips
from .eval.verify import verify as run_verify
from .forecast import CardWish, Forecast, plan_on_card
from .pipeline import Options
from .pipeline import quantize as run_quantize
from .publish.check import check as run_check
from .publish.findings import Checked
from .recipe import Recipe, load_limits, load_recipe
from .report.progress import Progress

AnyPath = str | Path
AnyRecipe = str | Path | Recipe
# The recipe of a measurement that names none: only its evaluation texts, lengths and dtype count.
MEASURING = "rtn-int4"


class QuantizeOptions(TypedDict, total=False):
    """Keywords of `quantize`, all optional."""

    # cpu, cuda, or auto: a GPU if there is one.
    device: str
    # Where the run keeps what is finished. Default: OUT.work.
    work: AnyPath
    # Go on with a stopped run; it ends in the same bytes.
    resume: bool
    # Replace what a run put into OUT and the work directory.
    overwrite: bool
    # The user's own texts in place of the recipe's: JSONL, Parquet, plain text, or a folder of them.
    calibration: AnyPath
    evaluation: AnyPath
    # Prices that `onecard pareto` wrote, for recipes with bits: fit.
    prices: AnyPath
    # Take the weights alone, although an adapter lies beside them.
    without_adapter: bool
    # bits: fit, with this budget of files in decimal GB.
    budget_gb: float
    # False: show progress on stderr.
    quiet: bool


class CardOptions(TypedDict, total=False):
    """Keywords of `plan` about the card; forecast.CardWish says what each means."""

    gpu: str
    context: int
    sequences: int
    kv_dtype: str
    engine: str
    tensor_parallel: int
    vision: bool
    images: int
    batch_tokens: int
    memory_share: float
    keep_local: bool


def quantize(model: AnyPath, out: AnyPath, recipe: AnyRecipe, **options: Unpack[QuantizeOptions]) -> Record:
    """Calibrate, quantize, emit and verify `model` into the folder `out`; returns the run's record.

    `model` is a local folder, a hub id, or "demo". A finished run that broke a limit of its recipe returns as well: its
    record's `gate` says so.
    Raises InputError for unusable input, before anything is written; FitError for a checkpoint that would not fit the
    recipe's card; LimitError for a limit that stopped the run; ResourceError when disk, memory or network give out:
    `resume=True` goes on.
    """
    chosen = _recipe(recipe)
    if "budget_gb" in options:
        chosen = chosen.within(options["budget_gb"])
    prices = _path(options.get("prices"))
    if prices is not None and chosen.widths.bits != "fit":
        raise InputError(f"prices are for recipes with bits: fit, and {chosen.name} has bits: {chosen.widths.bits}")
    return run_quantize(
        str(model),
        Path(out),
        chosen,
        Options(
            device_name=options.get("device", "auto"),
            work=_path(options.get("work")),
            resume=options.get("resume", False),
            overwrite=options.get("overwrite", False),
            calibration=_path(options.get("calibration")),
            evaluation=_path(options.get("evaluation")),
            prices=prices,
            without_adapter=options.get("without_adapter", False),
        ),
        quiet=options.get("quiet", True),
    )


def plan(
    model: AnyPath,
    recipe: AnyRecipe | None = None,
    *,
    device: str = "auto",
    measure: bool = False,
    **card: Unpack[CardOptions],
) -> Forecast:
    """Whether `model` fits a card, and with a recipe what quantizing emits and takes. Reads headers only.

    `model` is an original or a finished checkpoint. `device` is where it would be quantized; `measure` measures this
    machine for half a minute first. A plan that does not fit is no error: `fits` is False. Raises InputError.
    """
    chosen = None if recipe is None else _recipe(recipe)
    return plan_on_card(str(model), chosen, CardWish(**card), device, measure)


def inspect(model: AnyPath) -> Inspection:
    """What a checkpoint is, original or quantized, from config.json and headers alone. Raises InputError."""
    return run_inspect(str(model))


def verify(
    source: AnyPath,
    checkpoint: AnyPath,
    recipe: AnyRecipe = MEASURING,
    *,
    evaluation: AnyPath | None = None,
    keep_tokens: AnyPath | None = None,
    floor: bool = False,
    device: str = "auto",
    quiet: bool = True,
) -> Record:
    """KL(source || checkpoint) in nats a token and the recipe's tasks, measured on the files as they are read back.

    `recipe` gives evaluation texts, row lengths and tasks; `evaluation` replaces its texts. `keep_tokens` is a Parquet
    file to write, one row a token. `floor` also measures what computing in the recipe's dtype costs by
    itself. Raises InputError for what is no pair, ResourceError.
    """
    return run_verify(
        str(source),
        str(checkpoint),
        _recipe(recipe),
        VerifyOptions(evaluation=_path(evaluation), keep_tokens=_path(keep_tokens), floor=floor),
        device_name=device,
        quiet=quiet,
    )


def flips(
    source: AnyPath,
    checkpoint: AnyPath,
    tasks: Sequence[str] = ("demo",),
    *,
    shots: int = 0,
    items: int | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> Record:
    """Both models answer multiple-choice items; the record's `flips` counts the answers that change.

    `tasks` are those of eval/tasks.py; `shots` examples precede each question; `items` limits each task, drawn by a
    seed. Raises InputError, ResourceError.
    """
    wanted = load_tasks(tasks, shots, items)
    return run_flips(str(source), str(checkpoint), load_recipe(MEASURING), wanted, device_name=device, quiet=quiet)


def gate(
    report: AnyPath,
    baseline: AnyPath | None = None,
    *,
    limits: AnyPath | None = None,
    tolerances: Tolerances | None = None,
    across_dtypes: bool = False,
) -> Verdict:
    """Hold a record, or the folder of a checkpoint, against limits and a baseline. `passed` is the answer.

    `limits` is a YAML file in place of the limits that the record names. `across_dtypes` compares two that were
    computed in different dtypes, and notes it. Raises InputError for records that cannot be
    compared.
    """
    named = None if limits is None else load_limits(Path(limits))
    return run_gate(Path(report), _path(baseline), named, tolerances or Tolerances(), across_dtypes)


def export(
    checkpoint: AnyPath,
    format: str,
    out: AnyPath,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    without_adapter: bool = False,
    quiet: bool = True,
) -> Exported:
    """Write `checkpoint` anew in another format, from its own integer codes: nothing is quantized again.

    `without_adapter` takes the weights alone, although an adapter lies beside them.
    Raises InputError with every reason why the format cannot hold it, before anything is written; ResourceError.
    """
    with Progress(f"onecard export {checkpoint}", 1, None, quiet) as progress:
        return run_export(
            str(checkpoint),
            format,
            Path(out),
            progress,
            overwrite=overwrite,
            dry_run=dry_run,
            without_adapter=without_adapter,
        )


def check(checkpoint: AnyPath) -> Checked:
    """Hold a finished folder against its digests, record and config; reads every byte, runs nothing.

    The result's `sound` is the answer, `problems` lists every offender, and `refuse()` raises DamageError for them.
    Raises InputError for what is no checkpoint.
    """
    return run_check(str(checkpoint))


def _path(given: AnyPath | None) -> Path | None:
    return None if given is None else Path(given)


def _recipe(given: AnyRecipe) -> Recipe:
    return given if isinstance(given, Recipe) else load_recipe(given)
