"""The stages of a run: what each one does, and what it needs to know.

`stages_of` gives them in order. After each one the work directory is committed, so a resumed run begins with the first
stage that is not finished. A stage writes all its files before the commit and reads nothing but the run, the source,
and files of finished stages; so it may be killed anywhere and begun again.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from . import __version__
from .blocks.limits import coverage_facts, coverage_warning
from .blocks.quantize import BlockJob, QuantizedBlock, quantize_block
from .blocks.sensitivity import SensitivityFiles
from .blocks.streams import QUANTIZED, REFERENCE
from .calibration.documents import Document
from .calibration.texts import RunTexts
from .calibration.tokens import Encoder
from .checkpoint import files
from .checkpoint.activations import Activations, Room
from .checkpoint.checksums import read_back_digest
from .checkpoint.emit import ShardWriter, emission_warnings, written_files
from .checkpoint.formats.shard_formats import SHARD_FORMATS
from .checkpoint.model import Model, open_written
from .checkpoint.plan import Plan
from .checkpoint.stored_widths import stored_facts
from .checkpoint.workdir import WorkDir, read_json
from .conversion.export import matrices
from .conversion.exporters import FORMATS, Files
from .conversion.move import move_to_out
from .conversion.run_output import WrittenParts, config_of_run, planned_run, weight_bytes
from .core.device import Compute
from .core.file_names import RECORD_NAME
from .core.method import Method
from .core.record.blocks import BlockFacts
from .core.record.reading import validated
from .core.record.schema import CheckpointFacts, ExportFacts, ModelFacts, PlanSummary, Record, TextFacts
from .core.record.sizes import Allocation, FitSummary
from .core.rows import Row
from .eval.gate import gate_of_run
from .eval.measuring import WITHOUT_VISION, Calibrated, Evaluation, Measured, Measuring, measure
from .eval.sides import compare_sides
from .eval.tasks import Task
from .eval.twin import BlockSeen
from .eval.verify import close_machine
from .models.adapter import Adapter
from .models.block import Block
from .models.walk import HiddenRows, Walk
from .recipe import Recipe
from .report.progress import Progress
from .report.resources import package_versions

RECORD = "record.json"
# The matrices that are all zeros in the source.
ZEROS = "zeros.json"


@dataclass(frozen=True)
class Run:
    """What a run was asked to do, checked and prepared."""

    model: Model
    plan: Plan
    planned: Files  # the files of OUT that hold weights, in the recipe's format; `plan` lays out the work directory's
    recipe: Recipe
    texts: RunTexts
    tasks: list[Task]
    out: Path
    compute: Compute
    began: float
    # All that the bytes of a run depend on. A resumed run must find every one of them again.
    identity: dict[str, str]
    room: Room = field(default_factory=Room.now)  # for rows between blocks
    card: dict[str, Any] = field(default_factory=dict)  # how the result fits the recipe's card (planner/sizing.py)
    allocation: dict[str, Any] = field(default_factory=dict)  # prices and chosen widths of `bits: fit`

    @property
    def adapter(self) -> Adapter:
        return self.model.adapter

    @property
    def method(self) -> Method:
        return self.recipe.quantizer

    @property
    def verifies_on_the_way(self) -> bool:
        """Whether each block is verified as soon as its shards are written. Files of another format exist only at the
        end: then both models are walked once more."""
        return self.recipe.format in SHARD_FORMATS

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.model.path, self.model.adapter, self.texts.date)

    def evaluation(self, rows: list[Row]) -> Evaluation:
        return Evaluation(self.encoder, rows, self.tasks)

    @property
    def files(self) -> list[str]:
        """All files that OUT will hold."""
        return written_files([name for name, _ in self.planned], self.model.path)

    def new_record(self) -> Record:
        return Record(
            command="quantize",
            onecard=__version__,
            model=ModelFacts(**self.model.facts()),
            recipe=self.recipe.model_dump(mode="json") | {"digest": self.recipe.digest},
            texts={which: TextFacts(**facts) for which, facts in self.texts.facts.items()},
            template_date=None if self.texts.date is None else self.texts.date.isoformat(),
            plan=PlanSummary(**self.plan.facts() | {"emitted_bytes": weight_bytes(self.planned)}),
            fit=FitSummary.model_validate(self.card) if self.card else None,
            allocation=Allocation.model_validate(self.allocation) if self.allocation else None,
            versions=package_versions(),
            identity=self.identity,
            files=self.files,
            warnings=self.adapter.faults(self.model.config)
            + self.model.warnings
            + emission_warnings(self.model.path, self.model.folder.shards)
            + self.texts.warnings,
        )


class Disk:
    """A thread that writes what a stage leaves, and reads it back, while the next stage computes."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "shards")
        self._left: list[Future[None]] = []

    def later(self, work: Callable[[], None]) -> None:
        """After all that was given before."""
        self._left.append(self.pool.submit(work))

    def wait(self) -> None:
        """Until all is done. Raises what the work raised."""
        for future in list(self._left):
            future.result()

    def close(self) -> None:
        """What has not begun is not done."""
        self.pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class StageJob:
    """All that a stage needs to know."""

    run: Run
    walk: Walk
    workdir: WorkDir
    progress: Progress
    disk: Disk = field(default_factory=Disk)

    @cached_property
    def store(self) -> Activations:
        """The rows between the blocks: both streams of calibration, and both models' of a verification on the way."""
        return Activations(self.workdir.path / "acts", self.run.compute.device, self.run.room)

    @cached_property
    def hidden(self) -> HiddenRows:
        """The calibration rows in batches."""
        return self.walk.hidden_rows(self.run.texts.calibration, self.store)

    @property
    def shards(self) -> Path:
        return self.workdir.folder("shards")

    @property
    def sensitivity(self) -> SensitivityFiles:
        return SensitivityFiles(self.workdir.path / "sensitivity", self.run.method)

    def facts_file(self, block: int) -> Path:
        """What the record says of a finished block."""
        return self.workdir.folder("blocks") / f"{block:04d}.json"

    def seen_file(self, block: int) -> Path:
        """What the verification has seen of a finished block."""
        return self.workdir.folder("verified") / f"{block:04d}.json"

    def digests_file(self, part: int) -> Path:
        """The digests of the finished shards of a part, as they were read back."""
        return self.workdir.folder("digests") / f"{part:04d}.json"

    @cached_property
    def parts(self) -> WrittenParts:
        run = self.run
        return WrittenParts(run.model, run.plan, run.recipe.format, self.shards, run.out)

    @cached_property
    def measuring(self) -> Measuring:
        """The verification on the way, with what it has seen of the blocks that are finished."""
        run = self.run
        emitted = self.walk.beside(self.parts.adapter, self.parts.source(run.adapter.n_blocks))
        made = Measuring(self.walk, emitted, run.evaluation(run.texts.evaluation), self.store)
        finished = {stage.shard_part for stage in stages_of(run.adapter.n_blocks)[: self.workdir.done]}
        for part in range(run.adapter.n_blocks + 1):
            if part in finished:
                read_json(self.digests_file(part))  # damage is said before there is work to lose
        for block in range(run.adapter.n_blocks):
            if block in finished:
                made.twin.seen[block] = BlockSeen.of_json(read_json(self.seen_file(block)))
        return made


@dataclass(frozen=True)
class Stage:
    """`shard_part`: the shards of the plan that the stage writes: a block's number, or the number of blocks for what
    lies outside them. `rows_enter`: the block whose rows wait in the store when the stage has ended."""

    name: str
    do: Callable[[StageJob], None]
    shard_part: int | None = None
    rows_enter: int | None = None


def stages_of(blocks: int) -> list[Stage]:
    """The stages of a run over so many blocks, in order."""
    return [
        Stage("embed", begin, shard_part=blocks, rows_enter=0),
        *(Stage(f"block {n + 1}", partial(quantize_one, n), shard_part=n, rows_enter=n + 1) for n in range(blocks)),
        Stage("move to OUT", move),
        Stage("verify", verify),
    ]


def finished_shards(plan: Plan, finished: list[Stage]) -> dict[str, int]:
    """Name -> bytes of the shards that these stages have written."""
    parts = {stage.shard_part for stage in finished}
    return {shard.file: shard.file_bytes for shard in plan.pieces if shard.part in parts}


def known_digests(job: StageJob) -> dict[str, str]:
    """Shard -> its digest, of the shards that were read back and have moved to OUT unchanged."""
    run = job.run
    if not run.verifies_on_the_way or run.plan.shards != run.plan.pieces:
        return {}
    found = [read_json(job.digests_file(part)) for part in range(run.adapter.n_blocks + 1)]
    return {name: digest for digests in found for name, digest in digests.items()}


def keep_digests(job: StageJob, part: int) -> None:
    """Of the shards of a part, once the disk gives them back. Raises ResourceError where it does not."""
    files.write_json(job.digests_file(part), {path.name: read_back_digest(path) for path in job.parts.pieces(part)})


def finished_blocks(job: StageJob, finished: list[Stage]) -> list[BlockFacts]:
    """What the record says of the blocks that these stages have quantized. Raises InputError for a damaged file."""
    parts = {stage.shard_part for stage in finished}
    paths = [job.facts_file(block) for block in range(job.run.adapter.n_blocks) if block in parts]
    return [validated(BlockFacts, read_json(path), str(path)) for path in paths]


def begin(job: StageJob) -> None:
    """What lies outside the blocks is copied. Token rows become the hidden rows that enter block 0, for both streams;
    and sensitivities are measured."""
    copied = copy_rest(job)
    if job.run.method.needs_statistics:
        job.progress.begin("embed")
        job.hidden.embed(REFERENCE, QUANTIZED)
    if job.run.method.walks_back:
        job.sensitivity.measure(job.walk, job.run.texts.calibration)
    copied.wait()
    if job.run.verifies_on_the_way:
        job.measuring.twin.embed()  # the quantized model's rows, from its embedding as it was written


def copy_rest(job: StageJob) -> ShardWriter:
    """What lies outside the blocks is copied from the source: it is read now, and written and read back by the disk's
    thread."""
    job.progress.begin("copy the rest")
    outside = [shard for shard in job.run.plan.pieces if shard.part == job.run.adapter.n_blocks]
    writer = ShardWriter(outside, job.shards, job.disk.pool)
    for name in writer.names():
        writer.put(name, job.walk.read(name))
    writer.check_complete()
    if job.run.verifies_on_the_way:
        job.disk.later(partial(keep_digests, job, job.run.adapter.n_blocks))
    return writer


def quantize_one(block: int, job: StageJob) -> None:
    """One block: statistics, codes, packed shards, and the hidden rows that enter the next block. Then its shards are
    verified."""
    made = quantize_block(
        BlockJob(
            hidden=job.hidden,
            index=block,
            plan=job.run.plan,
            recipe=job.run.recipe,
            shard_folder=job.shards,
            sensitivity=job.sensitivity.read(block, job.hidden),
            loads_block=job.run.verifies_on_the_way,
            pool=job.disk.pool,
        )
    )
    files.write_json(job.facts_file(block), made.facts)
    if job.run.verifies_on_the_way:
        verify_block(job, made)
    else:
        made.wait()


def verify_block(job: StageJob, made: QuantizedBlock) -> None:
    """The evaluation rows through the original block, and through the one in the shards. What was seen is kept once the
    disk has given the shards back."""
    original = made.original
    assert original is not None
    block = original.index

    def as_written() -> Block:
        made.wait()
        return job.measuring.twin.quantized.reading(job.parts.source(block)).load(block)

    seen = job.measuring.twin.through(block, (lambda: original, as_written)).to_json()

    def keep() -> None:
        keep_digests(job, block)
        files.write_json(job.seen_file(block), seen)

    job.disk.later(keep)


def move(job: StageJob) -> None:
    """Shards, index and side files move to OUT, or are written there in the recipe's format."""
    run = job.run
    job.progress.begin("move to OUT")
    move_to_out(run.model, run.plan, run.recipe.format, job.workdir, run.out, run.files, job.progress)


def verify(job: StageJob) -> None:
    """The twin walk over source and emitted files. The record is complete after it."""
    run = job.run
    record = run.new_record()
    zeros = job.workdir.path / ZEROS
    if zeros.exists():  # an older onecard may have begun the run
        record.model = record.model.model_copy(update={"zero_matrices": tuple(read_json(zeros))})
    record.blocks = finished_blocks(job, stages_of(run.adapter.n_blocks)[: job.workdir.done])
    record.fallbacks = coverage_facts(record.blocks, run.recipe.texts.warn_below_expert_rows)
    record.warnings += coverage_warning(record.fallbacks, run.recipe.texts.warn_below_expert_rows)
    emitted = open_written(run.model, run.out, config_of_run(run.model, run.plan, run.recipe.format))
    emitted_bytes = emitted.folder.file_bytes
    assert emitted_bytes == weight_bytes(run.planned), (emitted_bytes, run.planned)
    if not run.verifies_on_the_way:
        assert record.plan is not None
        record.plan = PlanSummary(**record.plan.to_json() | stored_facts(emitted))
        record.export = ExportFacts(format=run.recipe.format, onecard=__version__, matrices=matrices(emitted))
        record.warnings += FORMATS[run.recipe.format].warnings(planned_run(run.model, run.plan))
    measured, documents = _measured(job, emitted, record)
    measured.put_into(record)
    record.checkpoint = CheckpointFacts(bytes=emitted_bytes)
    compare_sides(run.model, emitted, run.encoder, documents, run.tasks).put_into(record)
    record.gate = gate_of_run(record, RECORD_NAME, run.recipe)
    close_machine(record, job.progress, run.compute.device, run.began)
    files.write_json(job.workdir.path / RECORD, record.to_json())


def _measured(job: StageJob, emitted: Model, record: Record) -> tuple[Measured, tuple[Document, ...]]:
    """The figures, and the evaluation documents that they are of. A format that exists only now is walked now."""
    run, rows, documents = job.run, job.run.texts.evaluation, job.run.texts.documents
    calibrated = Calibrated.of(record)
    if run.verifies_on_the_way:
        other = job.walk.beside(emitted.adapter, emitted.source)
        measured = job.measuring.figures(other, calibrated)
        return measured, documents
    if run.adapter.has_vision and not emitted.adapter.has_vision:
        rows = [row for row in rows if row.pixels is None]
        documents = tuple(document for document in documents if not document.images)
        record.warnings.append(WITHOUT_VISION.format(name=run.recipe.format))
    folder = job.workdir.folder("verify")
    shutil.rmtree(folder)
    measured = measure(job.walk, emitted, run.evaluation(rows), folder=folder, calibrated=calibrated)
    return measured, documents
