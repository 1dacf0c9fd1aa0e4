"""The one story: plan, calibrate, quantize, emit, verify.

A run is a row of stages; after each one the work directory is committed, so a killed run goes on where it was:

    0 embed     token rows -> hidden rows that enter block 0, for both streams
    1..n        one block: statistics, codes, packed shards, hidden rows that enter the next block
    n+1 rest    what lies outside the blocks is copied
    n+2 move    shards, index and side files move to OUT, or are written there in the recipe's format
    n+3 verify  the twin walk over source and emitted files; then the record, SHA256SUMS and, last of all, config.json
"""

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import __version__
from .bits.fitting import fit_to, load_prices, on_its_card, price_model, refuse_unmeetable
from .bits.pricing import Prices, priced_rows
from .blocks.quantize import BlockJob, quantize_block
from .blocks.streams import QUANTIZED, REFERENCE
from .calibration.coverage import balanced
from .calibration.sensitivity import Sensitivity, sensitivities
from .calibration.texts import RunTexts, prepare_texts
from .checkpoint import files
from .checkpoint.assign import plan_for
from .checkpoint.checksums import write_sums
from .checkpoint.emit import (
    ShardWriter,
    carry_side_files,
    clear_checkpoint,
    emitted_before,
    side_files_digest,
    written_files,
)
from .checkpoint.formats.shard_formats import SHARD_FORMATS
from .checkpoint.model import Model, open_source, open_written
from .checkpoint.paths import check_paths, check_space, occupied
from .checkpoint.plan import Plan
from .checkpoint.source import INDEX_NAME
from .checkpoint.source_checks import refuse_nonfinite
from .checkpoint.stored_widths import stored_facts
from .checkpoint.workdir import Activations, WorkDir, has_run, read_json, read_tensors, refuse_resumed
from .conversion.export import matrices
from .conversion.exporters import FORMATS, Files
from .conversion.run_output import config_of_run, finished_run, planned_files, planned_run, weight_bytes
from .core.device import Compute, choose_compute, site_budget
from .core.errors import InputError, LimitError
from .core.file_names import RECORD_NAME
from .core.layout import index_json, json_bytes
from .core.limits import Limits
from .core.method import Method
from .core.rates import uniform
from .core.record.blocks import BlockFacts
from .core.record.reading import check_record, read_record, validated
from .core.record.schema import CheckpointFacts, ExportFacts, ModelFacts, PlanSummary, Record, TextFacts
from .core.record.sizes import Allocation, FitSummary
from .core.rows import Row
from .eval.gate import gate_of_run, refuse_too_large
from .eval.tasks import Task
from .eval.verify import WITHOUT_VISION, close_machine, measure, rows_of_experts, tasks_of
from .models.adapter import Adapter
from .models.walk import HiddenRows, Walk
from .planner.cost import estimate, work_of
from .recipe import Recipe
from .report.progress import Progress
from .report.resources import package_versions

RECORD, PRICES = "record.json", "prices.json"
# What tensors of a block's sensitivity file are, before the site's key.
METRIC, WEIGHT = "metric:", "weight:"


@dataclass(frozen=True)
class Run:
    """What a run was asked to do, checked and prepared: nothing of it changes any more."""

    model: Model
    plan: Plan
    planned: Files  # what of OUT holds weights, in the recipe's format; the plan's shards are the work directory's
    recipe: Recipe
    texts: RunTexts
    tasks: list[Task]
    out: Path
    compute: Compute
    began: float
    # All that the bytes of a run depend on. A resumed run must find every one of them again.
    identity: dict[str, str]
    card: dict[str, Any] = field(default_factory=dict)  # how it does on the recipe's card (sizing.py)
    allocation: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        return self.model.adapter

    @property
    def method(self) -> Method:
        return self.recipe.quantizer

    @property
    def files(self) -> list[str]:
        """All that will lie in OUT."""
        return written_files([name for name, _ in self.planned], self.model.path)

    def new_record(self) -> Record:
        return Record(
            command="quantize",
            onecard=__version__,
            model=ModelFacts(**self.model.facts()),
            recipe=self.recipe.model_dump(mode="json") | {"digest": self.recipe.digest},
            texts={which: TextFacts(**facts) for which, facts in self.texts.facts.items()},
            plan=PlanSummary(**self.plan.facts() | {"emitted_bytes": weight_bytes(self.planned)}),
            fit=FitSummary.model_validate(self.card) if self.card else None,
            allocation=Allocation.model_validate(self.allocation) if self.allocation else None,
            versions=package_versions(),
            identity=self.identity,
            files=self.files,
            warnings=self.adapter.faults(self.model.config) + self.model.warnings + self.texts.warnings,
        )

    def check_space(self, work: Path) -> None:
        wanted = sum(length * count for length, count in self.texts.wanted.items())
        cost = estimate(
            self.adapter,
            self.plan,
            work_of(self.recipe),
            wanted,
            _tokens(self.texts.evaluation),
            self.compute.dtype.itemsize,
            uniform(1.0),
            self.compute.device,
            site_budget(self.compute.device),
        )
        # Beside the pool's hidden rows, before and after a block, nothing lies there yet.
        row_bytes = self.adapter.hidden_size * self.compute.dtype.itemsize
        pool_bytes = 2 * _tokens(self.texts.calibration) * row_bytes
        # Shards are moved to OUT, or written there anew in another format.
        anew = 0 if self.recipe.format in SHARD_FORMATS else weight_bytes(self.planned)
        check_space(work, max(cost.disk_bytes, pool_bytes if self.texts.is_pool else 0) + anew)


def _identity(model: Model, recipe: Recipe, texts: RunTexts, compute: Compute) -> dict[str, str]:
    device = compute.device
    identity = {
        "onecard": __version__,
        "source": model.folder.digest,
        "tokenizer and other files beside the weights": side_files_digest(model.path),
        # Another card has other kernels, and memory for other batches.
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute dtype": str(compute.dtype).removeprefix("torch."),
        # Sums over another number of threads round differently.
        "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
    }
    identity |= {f"recipe's {key}": str(value) for key, value in recipe.model_dump(mode="json").items()}
    identity |= {f"{which} texts": str(facts["digest"]) for which, facts in texts.facts.items()}
    return identity | {f"version of {name}": v for name, v in package_versions().items() if name != "datasets"}


def _tokens(rows: list[Row]) -> int:
    return sum(len(row.tokens) for row in rows)


def quantize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    *,
    device_name: str = "auto",
    work: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    prices: Path | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Record:
    """Run the whole job; returns its record, which lies in OUT as onecard.json too.

    Limits of the recipe that only the finished checkpoint can pass are judged in the record's `gate`: the checkpoint is
    finished all the same, since it is what one wants to look at, and the command line ends in their exit code.
    """
    began = time.monotonic()
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens)
    model = open_source(model_name)
    plan = plan_for(model, recipe)  # of a recipe that is yet to be fitted, about the least there can be
    planned = planned_files(model, plan, recipe.format)
    if recipe.widths.bits == "fit":
        refuse_unmeetable(model, recipe)
    else:
        refuse_too_large(weight_bytes(planned), recipe)
    card_facts = on_its_card(model, recipe)
    work_path = check_paths(out, work, model.path, resume, overwrite)
    texts = prepare_texts(
        model, recipe, calibration, evaluation, recipe.quantizer.needs_statistics or recipe.widths.bits == "fit"
    )
    if recipe.widths.bits == "fit":
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
        card=card_facts,
    )
    given = None if prices is None else load_prices(prices, model, recipe, texts.calibration, compute)
    finished = None
    if resume and not has_run(work_path):
        finished = _finished(run)
    if finished is None and not (resume and has_run(work_path)):
        run.check_space(work_path)
    with WorkDir(work_path, run.identity, resume, overwrite, out) as workdir:
        if finished is None:
            if workdir.moving_to is None and occupied(out) and not workdir.may_clear(out):
                raise InputError(
                    f"the output {out} is not empty, and the run in {work_path} was not begun with --overwrite for it: "
                    "empty it, or name another folder"
                )
            if workdir.moving_to not in (None, str(out.resolve())):
                raise InputError(
                    f"the run in {work_path} has begun to move its files to {workdir.moving_to}, and {out} is another "
                    "folder: name that one, or start anew with --overwrite"
                )
            with Progress(f"onecard quantize {model_name}", model.adapter.n_blocks, console, quiet) as progress:
                finished = _stages(run, workdir, progress, given)
        workdir.remove()
    return finished


def _finished(run: Run) -> Record | None:
    """The record of the finished run that OUT holds, when it was this very run; None when OUT is empty."""
    if not occupied(run.out):
        return None
    path = run.out / RECORD_NAME
    if not path.exists() or not (run.out / "config.json").exists():
        replace = "empty it" if emitted_before(run.out) is None else "replace it with --overwrite"
        raise InputError(f"{run.out} is not empty and there is no run to resume: {replace}, or name another folder")
    try:
        record = read_record(path)
    except InputError:
        raise InputError(f"{path} is damaged: start anew with --overwrite") from None
    refuse_resumed(record.identity, run.identity, run.out)
    return record


def _fitted(run: Run, walk: Walk, workdir: WorkDir, given: Prices | None) -> Run:
    """The run with the widths that its prices and its budget choose. What was priced lies in the work directory."""
    kept = workdir.path / PRICES
    if not kept.exists():
        found = given or price_model(walk, run.model, run.recipe, run.texts.calibration, workdir.folder("price"))
        files.write_json(kept, found.facts())
        shutil.rmtree(workdir.path / "price", ignore_errors=True)
    prices = Prices.from_facts(read_json(kept))
    fitted = fit_to(run.model, run.recipe, prices)
    allocation = fitted.facts(run.adapter) | {"prices": prices.facts()}
    plan = plan_for(run.model, fitted.recipe)
    planned = planned_files(run.model, plan, run.recipe.format)
    card = on_its_card(run.model, fitted.recipe)
    return replace(run, recipe=fitted.recipe, plan=plan, planned=planned, card=card, allocation=allocation)


def _stages(run: Run, workdir: WorkDir, progress: Progress, given: Prices | None = None) -> Record:
    """Every stage that is not done yet."""
    walk = Walk.over(run.adapter, run.model.source, run.compute, progress)
    if run.recipe.widths.bits == "fit":
        run = _fitted(run, walk, workdir, given)
        refuse_too_large(weight_bytes(run.planned), run.recipe)
    record = run.new_record()
    for warning in record.warnings:
        progress.warn(warning)
    blocks = run.adapter.n_blocks
    if workdir.done == 0:
        progress.begin("check weights")
        try:
            refuse_nonfinite(run.model.folder, run.model.name)
        except InputError:
            workdir.remove()
            raise
    finished = {s.file: s.file_bytes for s in run.plan.shards if s.part < workdir.done - 1}
    workdir.refuse_damaged(finished, run.out)
    store = Activations(workdir.path / "acts")
    chosen = balanced(run.texts, walk, run.recipe, workdir.path)
    if chosen is not run.texts:
        run = replace(run, texts=chosen)
        record = run.new_record()
    hidden = walk.hidden_rows(run.texts.calibration, store)
    if workdir.done < 1:
        if run.method.needs_statistics:
            progress.begin("embed")
            hidden.embed(REFERENCE, QUANTIZED)
        if run.method.walks_back:
            _sensitivities(run, walk, workdir)
        store.settle(0)
        workdir.commit(1)
    for index in range(blocks):
        file = workdir.folder("blocks") / f"{index:04d}.json"
        if workdir.done < 2 + index:
            job = BlockJob(
                hidden=hidden,
                index=index,
                plan=run.plan,
                recipe=run.recipe,
                shard_folder=workdir.folder("shards"),
                sensitivity=_sensitivity(run, workdir, index, hidden),
            )
            facts = quantize_block(job)
            files.write_json(file, facts)
            store.settle(index + 1)
            workdir.commit(2 + index)
            store.drop(index)
        record.blocks.append(validated(BlockFacts, read_json(file), str(file)))
        _check_limits(record, run.recipe.limits, workdir.path)
    _summarise_coverage(record, run.recipe)
    if workdir.done < 2 + blocks:
        progress.begin("copy the rest")
        writer = ShardWriter([s for s in run.plan.shards if s.part == blocks], workdir.folder("shards"))
        for name in writer.names():
            writer.put(name, run.model.source.get(name))
        workdir.commit(2 + blocks)
    if workdir.done < 3 + blocks:
        progress.begin("move to OUT")
        _move(run, workdir, progress)
        workdir.commit(3 + blocks)
    config = config_of_run(run.model, run.plan, run.recipe.format)
    if workdir.done < 4 + blocks:
        emitted = open_written(run.model, run.out, config)
        emitted_bytes = emitted.folder.file_bytes
        assert emitted_bytes == weight_bytes(run.planned), (emitted_bytes, run.planned)
        if run.recipe.format not in SHARD_FORMATS:
            assert record.plan is not None
            record.plan = PlanSummary(**record.plan.to_json() | stored_facts(emitted))
            record.export = ExportFacts(format=run.recipe.format, onecard=__version__, matrices=matrices(emitted))
            record.warnings += FORMATS[run.recipe.format].warnings(planned_run(run.model, run.plan))
        rows = run.texts.evaluation
        if run.adapter.has_vision and not emitted.adapter.has_vision:
            rows = [row for row in rows if row.pixels is None]
            record.warnings.append(WITHOUT_VISION.format(name=run.recipe.format))
        measured = measure(
            walk,
            run.model,
            emitted,
            rows=rows,
            tasks=run.tasks,
            folder=workdir.folder("verify"),
            calibration_rows=rows_of_experts(record.blocks),
        )
        measured.put_into(record)
        record.checkpoint = CheckpointFacts(bytes=emitted_bytes)
        record.gate = gate_of_run(record, RECORD_NAME, run.recipe)
        close_machine(record, progress, run.compute.device, run.began)
        files.write_json(workdir.path / RECORD, record.to_json())
        workdir.commit(4 + blocks)
    else:
        record = check_record(read_json(workdir.path / RECORD), str(workdir.path / RECORD))
    files.write_json(run.out / RECORD_NAME, record.to_json())
    progress.begin("checksums")
    config_bytes = json_bytes(config)
    write_sums(run.out, record.files, {"config.json": config_bytes})
    files.write_bytes(run.out / "config.json", config_bytes)
    return record


def _sensitivity_file(workdir: WorkDir, block: int) -> Path:
    return workdir.folder("sensitivity") / f"{block:04d}.safetensors"


def _sensitivities(run: Run, walk: Walk, workdir: WorkDir) -> None:
    def keep(block: int, metrics: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        found = {f"{METRIC}{key}": metric for key, metric in metrics.items() if run.method.output_metric}
        if run.recipe.quantizer.token_weighting == "gradient":
            found |= {f"{WEIGHT}{key}": weight for key, weight in weights.items()}
        files.write_tensors(_sensitivity_file(workdir, block), found)

    hidden = walk.hidden_rows(run.texts.calibration, Activations(workdir.folder("sensitivity", "acts")))
    sensitivities(hidden, keep, run.method.token_weighting)


def _sensitivity(run: Run, workdir: WorkDir, block: int, hidden: HiddenRows) -> Sensitivity:
    """What the walk back has found for a block; empty where the method wants nothing of it."""
    if not run.method.walks_back:
        return Sensitivity()
    found = read_tensors(_sensitivity_file(workdir, block))
    sizes = [sum(len(hidden.rows[number].tokens) for number in numbers) for numbers in hidden.groups]
    device = run.compute.device
    metrics = {key.removeprefix(METRIC): x.to(device) for key, x in found.items() if key.startswith(METRIC)}
    weights = {key.removeprefix(WEIGHT): list(x.split(sizes)) for key, x in found.items() if key.startswith(WEIGHT)}
    return Sensitivity(metrics=metrics, token_weights=weights)


def _move(run: Run, workdir: WorkDir, progress: Progress) -> None:
    """Everything but config.json: a folder without it is no checkpoint to any engine."""
    if workdir.moving_to is None:
        clear_checkpoint(run.out)  # there is none, unless the run was begun with --overwrite for it
        files.make_folder(run.out)
        workdir.begin_move(run.out)
    # First of all, what will lie there: a folder with this file may be cleared of it.
    files.write_json(run.out / RECORD_NAME, {"files": run.files})
    if run.recipe.format in SHARD_FORMATS:
        for shard in run.plan.shards:
            finished = workdir.path / "shards" / shard.file
            if finished.exists():
                files.move(finished, run.out / shard.file)
        files.write_json(run.out / INDEX_NAME, index_json(run.plan.shards))
    else:
        stored = finished_run(run.model, run.plan, workdir.path / "shards")
        FORMATS[run.recipe.format].write(stored, run.out, progress)
    carry_side_files(run.model.path, run.out)


def _check_limits(record: Record, limits: Limits, work: Path) -> None:
    """Limits that a block can pass: the run stops there, and what is finished is kept."""
    block = record.blocks[-1]
    starved = [f"expert {e} got {n} rows" for e, n in enumerate(block.expert_rows) if n < limits.fail_below_expert_rows]
    if starved:
        raise LimitError(
            f"block {block.block}: {', '.join(starved[:8])}, and the recipe fails below "
            f"{limits.fail_below_expert_rows} (fail_below_expert_rows): give more or more varied calibration texts "
            f"and start anew with --overwrite. What is finished lies in {work}"
        )
    fallbacks = sum(b.diagonal_fallbacks for b in record.blocks)
    if fallbacks > limits.max_fallbacks:
        raise LimitError(
            f"{fallbacks} matrices had second moments that could not be factored, and the recipe allows "
            f"{limits.max_fallbacks} (max_fallbacks): raise damping or shrinkage, or give more calibration texts, "
            f"and start anew with --overwrite. What is finished lies in {work}"
        )


def _summarise_coverage(record: Record, recipe: Recipe) -> None:
    """Count what fell back, and warn where experts saw little."""
    covered = [n for block in record.blocks for n in block.expert_rows]
    if not covered:
        return
    least = recipe.texts.warn_below_expert_rows
    low = [n for n in covered if n < least]
    record.fallbacks = {
        "experts_in_all": len(covered),
        "least_rows_of_an_expert": min(covered),
        "experts_without_rows": sum(n == 0 for n in covered),
        "experts_starved": len(low),  # below the recipe's warn_below_expert_rows
        "damping_raised": sum(b.damping_raised for b in record.blocks),
        "diagonal_fallbacks": sum(b.diagonal_fallbacks for b in record.blocks),
    }
    if low:
        record.warnings.append(
            f"{len(low)} of {len(covered)} experts got fewer than {least} calibration rows "
            "and borrowed from their layers: give more or more varied calibration texts"
        )
