"""The one story: plan, calibrate, quantize, emit, verify.

A run is prepared (everything that can be refused is refused before a weight is read), goes through its stages
(stages.py), and is finished: the record, SHA256SUMS and, last of all, config.json go to OUT. Work that is finished is
committed after every stage, so a killed run goes on where it was.
"""

import datetime as dates
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from . import __version__
from .bits.fitting import fit_to, load_prices, on_its_card, price_model, refuse_unmeetable
from .bits.pricing import Prices, priced_rows
from .bits.schedule import pricing_schedule
from .blocks.limits import refuse_passed
from .calibration.coverage import balanced
from .calibration.templates import DATE
from .calibration.texts import RunTexts, prepare_texts
from .checkpoint import files
from .checkpoint.activations import Room
from .checkpoint.assign import plan_for
from .checkpoint.checked import check_weights, checked_as_loaded
from .checkpoint.checksums import write_sums
from .checkpoint.emit import clear_checkpoint, emitted_before
from .checkpoint.formats.shard_formats import SHARD_FORMATS
from .checkpoint.keeper import Keeper
from .checkpoint.model import Model, open_source
from .checkpoint.paths import check_paths, check_space, occupied
from .checkpoint.side_files import refuse_adapter, side_files_digest
from .checkpoint.source_checks import zero_matrices
from .checkpoint.workdir import WorkDir, has_run, kept_identity, read_json, refuse_resumed
from .conversion.run_output import config_of_run, planned_files, weight_bytes
from .core.card_rates import H100_80GB
from .core.device import Compute, card_identity, choose_compute, site_budget
from .core.errors import InputError, UnusableModelError
from .core.file_names import RECORD_NAME
from .core.layout import json_bytes
from .core.rates import Rates, first_guess
from .core.record.reading import check_record, read_record
from .core.record.schema import Record
from .core.rows import Row
from .core.schedule import Schedule
from .eval.gate import refuse_too_large
from .eval.verify import tasks_of
from .models.scan import Scan
from .models.walk import Walk
from .planner.cost import times_of
from .planner.memory import disk_bytes
from .planner.rows import RowPlaces, rows_on_device
from .planner.schedule import run_schedule
from .planner.work import MethodCosts, RunWork, Tokens
from .quantize.card import refuse_without_compiler
from .recipe import Recipe
from .report.progress import Progress
from .report.resources import device_name, package_versions
from .stages import (
    RECORD,
    ZEROS,
    Run,
    Stage,
    StageJob,
    finished_blocks,
    finished_shards,
    known_digests,
    stages_of,
)

PRICES = "prices.json"


@dataclass(frozen=True)
class Options:
    """What a user may say beside the model, OUT and the recipe. None: the default place, the recipe's own texts, or
    prices that the run measures itself."""

    device_name: str = "auto"
    work: Path | None = None
    resume: bool = False
    overwrite: bool = False
    calibration: Path | None = None
    evaluation: Path | None = None
    prices: Path | None = None
    # Quantize the weights alone, although an adapter lies beside them.
    without_adapter: bool = False


def quantize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    options: Options | None = None,
    *,
    console: Console | None = None,
    quiet: bool = False,
) -> Record:
    """Run the whole job. Returns its record, which OUT holds as onecard.json.

    The recipe's limits on the finished checkpoint are judged in the record's `gate`. The checkpoint is finished even
    if it fails, since a user wants to look at it; the command line ends in the gate's exit code. Raises OnecardError.
    """
    options = options or Options()
    run, work = _prepared(model_name, out, recipe, options)
    given = None
    if options.prices is not None:
        given = load_prices(options.prices, run.model, recipe, run.texts.calibration, run.compute)
    begun = options.resume and has_run(work)
    finished = _finished(run) if options.resume and not begun else None
    if finished is None and not begun:
        _refuse_full_disk(run, work)
    with WorkDir(work, run.identity, options.resume, options.overwrite, out) as workdir:
        if finished is None:
            _refuse_other_out(workdir, out)
            with Progress(f"onecard quantize {model_name}", run.adapter.n_blocks, console, quiet) as progress:
                walk = Walk.over(run.adapter, run.model.source, run.compute, progress)
                rates = first_guess(run.compute.device, run.compute.dtype)
                progress.expect(_schedule(run, rates))
                with _removed_if_unusable(workdir, out), checked_as_loaded(run.compute, run.model):
                    if recipe.widths.bits == "fit":
                        run = _fitted(run, walk, workdir, given)
                        progress.expect(_schedule(run, rates))
                    finished = _carried_out(run, walk, workdir, progress)
        workdir.remove()
    return finished


@contextmanager
def _removed_if_unusable(workdir: WorkDir, out: Path) -> Iterator[None]:
    """A run that finds its model unusable leaves nothing behind, for a resume would end where this run does. A method
    without statistics finds it in the verification only, when OUT has all files but config.json."""
    try:
        yield
    except UnusableModelError:
        if workdir.moving_to is not None:
            clear_checkpoint(out)
            with suppress(OSError):  # other files stay
                out.rmdir()
        workdir.remove()
        raise


def _prepared(model_name: str, out: Path, recipe: Recipe, options: Options) -> tuple[Run, Path]:
    """The run and its work directory. Whatever can be refused before a weight is read is refused here. The plan of a
    recipe that is yet to be fitted is about the smallest there can be."""
    began = time.monotonic()
    compute = choose_compute(options.device_name, recipe.compute_dtype, recipe.batch_tokens)
    if recipe.quantizer.needs_statistics:
        refuse_without_compiler(compute.device)
    model = open_source(model_name)
    refuse_adapter(model.path, options.without_adapter)
    plan = plan_for(model, recipe)
    planned = planned_files(model, plan, recipe.format)
    fits = recipe.widths.bits == "fit"
    if fits:
        refuse_unmeetable(model, recipe)
    else:
        refuse_too_large(weight_bytes(planned), recipe)
    card = on_its_card(model, recipe)
    work = check_paths(out, options.work, model.path, options.resume, options.overwrite)
    calibrates = recipe.quantizer.needs_statistics or fits
    date = _resumed_date(out, work) if options.resume else None
    texts = prepare_texts(model, recipe, options.calibration, options.evaluation, calibrates, date)
    if fits:
        priced_rows(texts.calibration, recipe)  # refuses too few
    run = Run(
        model=model,
        plan=plan,
        planned=planned,
        recipe=recipe,
        texts=texts,
        tasks=tasks_of(recipe),
        out=out,
        compute=compute,
        began=began,
        identity=_identity(model, recipe, texts, compute),
        card=card,
    )
    return replace(run, room=_room(run)), work


def _pinned_tokens(run: Run) -> int:
    return 0 if run.compute.device.type == "cpu" else run.compute.batch_tokens


def _room(run: Run) -> Room:
    """For rows between blocks, from what is free now."""
    device = run.compute.device
    if device.type == "cpu":
        return Room.now()
    total = torch.cuda.get_device_properties(device).total_memory
    return Room.now(rows_on_device(_work(run), total, site_budget(device)))


def _identity(model: Model, recipe: Recipe, texts: RunTexts, compute: Compute) -> dict[str, str]:
    device = compute.device
    identity = {
        "onecard": __version__,
        "source": model.folder.digest,
        "tokenizer and other files beside the weights": side_files_digest(model.path),
        # Another card has other kernels, and memory for other batches.
        "device": device_name(device),
        **card_identity(device),
        "compute dtype": compute.dtype_name,
        # Sums over another number of threads round differently.
        "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
    }
    identity |= {f"recipe's {key}": str(value) for key, value in recipe.model_dump(mode="json").items()}
    identity |= {f"{which} texts": str(facts["digest"]) for which, facts in texts.facts.items()}
    identity |= {f"{which} rows": str(facts["rows_digest"]) for which, facts in texts.facts.items()}
    identity |= {} if texts.date is None else {DATE: texts.date.isoformat()}
    return identity | {f"version of {name}": v for name, v in package_versions().items() if name != "datasets"}


def _resumed_date(out: Path, work: Path) -> dates.date | None:
    """The date of the run that is resumed; None where its chat template asks for none, or where there is no run."""
    identity = kept_identity(work)
    if not identity and occupied(out):
        try:
            identity = read_record(out / RECORD_NAME).identity
        except InputError:  # what it is will be said when the run is looked for
            return None
    try:
        return dates.date.fromisoformat(identity[DATE])
    except (KeyError, ValueError):
        return None


def _finished(run: Run) -> Record | None:
    """The record of the finished run in OUT; None when OUT is empty. Raises InputError when OUT holds something else
    than a result of this very run."""
    if not occupied(run.out):
        return None
    path = run.out / RECORD_NAME
    if not path.exists() or not (run.out / "config.json").exists():
        way_out = "empty it" if emitted_before(run.out) is None else "replace it with --overwrite"
        raise InputError(f"{run.out} is not empty and there is no run to resume: {way_out}, or name another folder")
    try:
        record = read_record(path)
    except InputError:
        raise InputError(f"{path} is damaged: start anew with --overwrite") from None
    refuse_resumed(record.identity, run.identity, run.out)
    return record


def _refuse_full_disk(run: Run, work: Path) -> None:
    """Raises ResourceError when the disk of `work` cannot hold what the run will put there."""
    rows, itemsize = run.texts, run.compute.dtype.itemsize
    # While the pool's rows are counted, the disk holds their hidden rows before and after a block, and nothing else.
    pool_bytes = 2 * _tokens(rows.calibration) * run.adapter.hidden_size * itemsize if rows.is_pool else 0
    # The work directory's own formats are moved to OUT, others are written there a second time.
    written_again = 0 if run.recipe.format in SHARD_FORMATS else weight_bytes(run.planned)
    planned = _work(run)
    needed = disk_bytes(planned, RowPlaces.of(planned, run.room, _pinned_tokens(run)).disk_bytes)
    check_space(work, max(needed, pool_bytes) + written_again)


def _work(run: Run) -> RunWork:
    """What the run will do with the tokens of its texts."""
    wanted = sum(length * count for length, count in run.texts.wanted.items())
    tokens = Tokens(wanted, _tokens(run.texts.evaluation), run.recipe.texts.calibration_row_tokens)
    return RunWork.of(run.adapter, run.plan, MethodCosts.of(run.recipe), tokens, run.compute.dtype.itemsize)


def _schedule(run: Run, rates: Rates) -> Schedule:
    """The stages that the run is expected to go through; while its widths are to be fitted, pricing before them."""
    work, compute = _work(run), run.compute
    guess = H100_80GB.rates.at(rates.product_flops) if compute.device.type == "cuda" else rates
    schedule = run_schedule(
        work,
        times_of(work, guess, compute.batch_tokens),
        rates,
        pool_tokens=_tokens(run.texts.calibration) if run.texts.is_pool else 0,
        written_again=0 if run.recipe.format in SHARD_FORMATS else weight_bytes(run.planned),
        with_tasks=bool(run.tasks),
    )
    if run.recipe.widths.bits != "fit":
        return schedule
    return pricing_schedule(run.adapter, run.recipe, run.texts.calibration, run.compute, rates) + schedule


def _tokens(rows: list[Row]) -> int:
    return sum(len(row.tokens) for row in rows)


def _refuse_other_out(workdir: WorkDir, out: Path) -> None:
    """Raises InputError when the run in `workdir` may not write to `out`."""
    if workdir.moving_to is None and occupied(out) and not workdir.may_clear(out):
        raise InputError(
            f"the output {out} is not empty, and the run in {workdir.path} was not begun with --overwrite for it: "
            "empty it, or name another folder"
        )
    if workdir.moving_to not in (None, str(out.resolve())):
        raise InputError(
            f"the run in {workdir.path} has begun to move its files to {workdir.moving_to}, and {out} is another "
            "folder: name that one, or start anew with --overwrite"
        )


# --- going through the stages


def _fitted(run: Run, walk: Walk, workdir: WorkDir, given: Prices | None) -> Run:
    """The run with the widths that its prices and its budget choose. The prices stay in the work directory."""
    kept = workdir.path / PRICES
    if not kept.exists():
        found = given or price_model(walk, run.model, run.recipe, run.texts.calibration, workdir.folder("price"))
        files.write_json(kept, found.facts())
        shutil.rmtree(workdir.path / "price", ignore_errors=True)
    prices = Prices.from_facts(read_json(kept))
    fitted = fit_to(run.model, run.recipe, prices)
    plan = plan_for(run.model, fitted.recipe)
    planned = planned_files(run.model, plan, run.recipe.format)
    card = on_its_card(run.model, fitted.recipe)
    refuse_too_large(weight_bytes(planned), fitted.recipe)
    allocation = fitted.facts(run.adapter) | {"prices": prices.facts()}
    return replace(run, recipe=fitted.recipe, plan=plan, planned=planned, card=card, allocation=allocation)


def _carried_out(run: Run, walk: Walk, workdir: WorkDir, progress: Progress) -> Record:
    """Every stage that is not finished yet; then OUT is closed."""
    for warning in run.new_record().warnings:
        progress.warn(warning)
    stages = stages_of(run.adapter.n_blocks)
    if not workdir.done:
        progress.begin("check weights")
        suspects = check_weights(run.model, run.compute)
        files.write_json(workdir.path / ZEROS, zero_matrices(run.adapter, run.model.source, suspects))
    if not run.compute.checks_first:
        walk = replace(walk, scan=Scan(read_json(workdir.path / ZEROS)))
    workdir.refuse_damaged(finished_shards(run.plan, stages[: workdir.done]), run.out)
    run = replace(run, texts=balanced(run.texts, walk, run.recipe, workdir.path))
    job = StageJob(run, walk, workdir, progress)
    try:
        _through_stages(job, stages)
    finally:
        job.store.close()
        job.disk.close()
    return _closed(job)


def _through_stages(job: StageJob, stages: list[Stage]) -> None:
    """Every stage that is not finished yet, each followed by its commit (checkpoint/keeper.py)."""
    done, workdir = job.workdir.done, job.workdir
    resting_on = max((stage.rows_enter for stage in stages[:done] if stage.rows_enter is not None), default=None)
    job.store.remove_files_but(resting_on)
    keeper = Keeper(job.store, workdir, resting_on, job.disk.wait)
    for number, stage in list(enumerate(stages, 1))[done:]:
        refuse_passed(finished_blocks(job, stages[: number - 1]), job.run.recipe.limits, workdir.path)
        stage.do(job)
        if job.walk.scan is not None:
            files.write_json(workdir.path / ZEROS, sorted(job.walk.scan.zeros))
        keeper.finished(number, stage.rows_enter)


def _closed(job: StageJob) -> Record:
    """The record, the checksums and, last of all, config.json go to OUT."""
    run, workdir, progress = job.run, job.workdir, job.progress
    record = check_record(read_json(workdir.path / RECORD), str(workdir.path / RECORD))
    files.write_json(run.out / RECORD_NAME, record.to_json())
    progress.begin("checksums")
    config_bytes = json_bytes(config_of_run(run.model, run.plan, run.recipe.format))
    write_sums(run.out, record.files, {"config.json": config_bytes}, known_digests(job))
    files.write_bytes(run.out / "config.json", config_bytes)
    return record
