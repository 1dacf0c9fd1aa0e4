"""The project's own run on a pretended card: a published model of a few blocks and a few batches of rows.

The model has true shapes and files of headers alone. Every stage of a run is taken in order, as pipeline.py does; the
texts are rows of one length, and the figures of the verification are left out. table.py makes a whole run of it.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from hollow import write_hollow
from onecard import pipeline, stages
from onecard.blocks import sensitivity as kept
from onecard.calibration import sensitivity
from onecard.calibration.texts import RunTexts
from onecard.checkpoint import activations, checksums
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.keeper import Keeper
from onecard.checkpoint.model import open_source, open_written
from onecard.checkpoint.workdir import WorkDir
from onecard.conversion.run_output import config_of_run, planned_files
from onecard.core.device import Compute
from onecard.core.rows import Row
from onecard.core.schedule import Schedule
from onecard.core.shipped_recipes import recipe_text
from onecard.core.yaml_file import parse_yaml
from onecard.models.walk import Walk
from onecard.quantize import gptq, grid, metric, refine, restarts, site, tabu
from onecard.recipe import Recipe
from onecard.stages import Run, StageJob

from . import disk, kernels, memory, rates, threads
from .card import Asked, Counting
from .ledger import Key, Ledger, Stage
from .tensors import Pretended

ROW_TOKENS = 2048
# The walk back, block by block, and what it keeps for a resumed run between its stretches.
WALK_FORWARD, WALK_BACK, WALK_STOPS = "walk forward", "walk back", "walk, kept"
# The functions of the solver that are called again and again with tensors of the same shapes.
REMEMBERED = {
    gptq: ("gptq", "factor", "prepare", "round_columns", "_round_block"),
    grid: ("searched_scales",),
    metric: ("quantize_by_row_blocks",),
    refine: ("refine", "_improve", "_refit", "_sweep"),
    restarts: ("prepare_restarts", "_stretch", "restarted", "restart", "_try"),
    site: ("_searched_codes", "quantize_batch"),
    tabu: ("tabu_searched", "tabu_search", "_search"),
}


@dataclass(frozen=True)
class Size:
    """How much of a run is gone through."""

    blocks: int
    # Of rows to calibrate on, and of rows to evaluate.
    batches: int
    # How many batches of calibration rows a whole run has: memory for rows is scaled alike, so that the same share of
    # them stays on the card and in RAM.
    of: int = 0

    @property
    def share(self) -> float:
        return self.batches / self.of if self.of else 1.0


class Tasks:
    """A Step that opens the ledger's stages."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.seconds: dict[str, float] = {}
        self.renamed = ""  # what all tasks are called for a while

    def expect(self, schedule: Schedule) -> None: ...

    def begin(self, task: str, block: int | None = None) -> None:
        self.ledger.begin(self.renamed or task, block)

    def advance(self, tokens: int) -> None: ...

    def warn(self, text: str) -> None: ...


def shortened(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The config with fewer blocks."""
    found = copy.deepcopy(config)
    text = found.get("text_config", found)
    whole = text["num_hidden_layers"]
    text["num_hidden_layers"] = blocks
    for key, value in text.items():
        if isinstance(value, list) and len(value) == whole:
            text[key] = value[:blocks]
    return found


def recipe_of(shipped: str, method: str, keys: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe with another method, whose presets count; without items to answer."""
    given = parse_yaml(shipped, recipe_text(shipped), "")
    given = {key: value for key, value in given.items() if key not in ("tasks", "gpu", "context")}
    return Recipe.model_validate(given | {"method": method, "tasks": []} | (keys or {}))


def _card() -> Any:
    return SimpleNamespace(total_memory=rates.CARD_BYTES, name="H100", multi_processor_count=rates.MULTIPROCESSORS)


class _Generator(torch.Generator):
    """Stands for torch.Generator, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None: ...


def _torch_stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    def synchronize(*_: Any) -> None:
        ledger.sync("synchronize", "torch.cuda.synchronize")

    def free(*_: Any) -> tuple[int, int]:
        return rates.CARD_BYTES - ledger.live_bytes, rates.CARD_BYTES

    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: _card(),
        "get_device_name": lambda *_: "H100",
        "mem_get_info": free,
        "max_memory_allocated": lambda *_: ledger.peak,
        "memory_allocated": lambda *_: ledger.live_bytes,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
    }
    # Tensors of inference mode cannot be wrapped.
    return [(torch.cuda, name, value) for name, value in cuda.items()] + [
        (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
        (torch, "Generator", _Generator),
    ]


@contextmanager
def pretended(ledger: Ledger, triton: bool = True, remember: bool = True) -> Iterator[None]:
    """While open, 'cuda' is a card that counts into the ledger."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    patches = _torch_stand_ins(ledger) + disk.stand_ins(ledger) + threads.stand_ins(ledger)
    patches += kernels.stand_ins(ledger) if triton else kernels.without(ledger)
    if remember:
        for module, names in REMEMBERED.items():
            for function in (getattr(module, name) for name in names if hasattr(module, name)):
                patches += memory.everywhere(function, memory.remembering(function, ledger))
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        counting = Counting(ledger)
        stack.enter_context(mock.patch.object(Pretended, "counting", counting.__torch_dispatch__))
        stack.enter_context(Asked(ledger))
        stack.enter_context(counting)
        yield


def _with_stops(tasks: Tasks, sensitivities: Any) -> Any:
    """The walk back with its stops as a stage of their own."""

    def call(*args: Any, stop: Any, **named: Any) -> Any:
        def counted(at: Any) -> None:
            tasks.begin(WALK_STOPS)
            stop(at)

        return sensitivities(*args, stop=counted, **named)

    return call


def _rows(count: int, vocabulary: int) -> list[Row]:
    return [Row(f"row {n}", "text", torch.zeros(ROW_TOKENS, dtype=torch.long)) for n in range(count)]


def _named(tasks: Tasks, function: Any, name: str) -> Any:
    """A part of the walk back, as a stage of its own, from loading its block on."""

    def call(hidden: Any, block: Any, *more: Any, **named: Any) -> Any:
        tasks.begin(name, getattr(block, "index", block))
        tasks.renamed = name
        try:
            return function(hidden, block, *more, **named)
        finally:
            tasks.renamed = ""

    return call


def go_through(
    config: dict[str, Any], recipe: Recipe, size: Size, triton: bool = True, disk_rate: float = rates.DISK
) -> "Gone":
    """One run of `size` of the model with this config.json. `triton`: whether the kernels are there."""
    with tempfile.TemporaryDirectory() as folder:
        return _gone_through(Path(folder), shortened(config, size.blocks), recipe, size, triton, disk_rate)


@dataclass(frozen=True)
class Gone:
    """What a run of some size has cost, and the bytes of the model and of what it emitted."""

    size: Size
    stages: dict[Key, Stage]
    source_bytes: int
    emitted_bytes: int
    kinds: tuple[str, ...]  # of each block: blocks of a kind cost the same


def _gone_through(
    folder: Path, config: dict[str, Any], recipe: Recipe, size: Size, triton: bool, disk_rate: float
) -> Gone:
    write_hollow(folder / "model", config)
    model = open_source(str(folder / "model"))
    adapter = model.adapter
    compute = Compute(torch.device("cuda", 0), torch.bfloat16, recipe.batch_tokens)
    rows_a_batch = max(1, recipe.batch_tokens // ROW_TOKENS)
    texts = RunTexts(
        calibration=_rows(size.batches * rows_a_batch, adapter.vocab_size),
        evaluation=_rows(size.batches * rows_a_batch, adapter.vocab_size),
        facts={},
        warnings=[],
        wanted={ROW_TOKENS: size.batches * rows_a_batch},
    )
    plan = plan_for(model, recipe)
    plan = replace(plan, shards=plan.pieces)  # few blocks would fit into one file; the whole model does not
    run = Run(
        model=model,
        plan=plan,
        planned=planned_files(model, plan, recipe.format),
        recipe=recipe,
        texts=texts,
        tasks=[],
        out=folder / "out",
        compute=compute,
        began=time.monotonic(),
        identity={},
    )
    ledger = Ledger(disk_rate)
    tasks = Tasks(ledger)
    with pretended(ledger, triton), ExitStack() as stack:
        for name, said in (("_forward", WALK_FORWARD), ("_back_through", WALK_BACK)):
            given = _named(tasks, getattr(sensitivity, name), said)
            stack.enter_context(mock.patch.object(sensitivity, name, given))
        stack.enter_context(mock.patch.object(kept, "sensitivities", _with_stops(tasks, kept.sensitivities)))
        free = SimpleNamespace(available=int(rates.RAM_BYTES * size.share))
        stack.enter_context(mock.patch.object(activations.psutil, "virtual_memory", return_value=free))
        _carried_out(replace(run, room=activations.Room.now(0)), tasks, folder)
    kinds = tuple(
        " ".join(sorted(f"{s.role}{s.out_features}{s.in_features}x{len(s.members)}" for s in adapter.sites(block)))
        for block in range(adapter.n_blocks)
    )
    return Gone(size, ledger.finish(), plan.source_bytes, plan.emitted_bytes, kinds)


def _carried_out(run: Run, tasks: Any, folder: Path) -> None:
    """The pipeline's own way through the stages; what has no cost for a card or a disk is left out."""

    def quantize_one(block: int, job: StageJob) -> None:
        tasks.begin("load", block)
        real(block, job)
        tasks.begin("commit", block)

    def closed(job: StageJob) -> None:
        tasks.begin("checksums")
        checksums.write_sums(run.out, [name for name, _ in run.planned], {}, stages.known_digests(job))

    class Rarely(Keeper):
        """Commits no block: a short run would commit each, and a long one does every few minutes (whole.py)."""

        def finished(self, number: int, block: int | None) -> None:
            if block:
                self._let_go(block - 1)
            elif block is None:
                self.written()
            self.workdir.commit(number)

    real = stages.quantize_one
    walk = Walk.over(run.adapter, run.model.source, run.compute, tasks)
    with (
        mock.patch.object(stages, "quantize_one", quantize_one),
        mock.patch.object(stages, "verify", _verify),
        mock.patch.object(stages, "Encoder", return_value=None),
        mock.patch.object(pipeline, "_closed", closed),
        mock.patch.object(pipeline, "Keeper", Rarely),
        WorkDir(folder / "work", {}, False, False, run.out) as workdir,
    ):
        pipeline._carried_out(run, walk, workdir, tasks)


def _verify(job: StageJob) -> None:
    """As stages.verify does, without the figures."""
    run = job.run
    emitted = open_written(run.model, run.out, config_of_run(run.model, run.plan, run.recipe.format))
    job.measuring.twin.finish(job.walk.beside(emitted.adapter, emitted.source))
