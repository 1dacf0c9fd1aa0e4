"""What a run will take: time, RAM, device memory and disk. Estimates with their formulas; the plan's bytes are exact.

Time is each kind of work (planner/work.py counts it) over its rate on this machine (core/rates.py): the rates that
`onecard plan --measure` kept, or one matrix product of half a second for all of them, which errs low where matrices are
small and attention long. It counts the tokens that a recipe wants: texts that hold fewer take less. With measured rates
it came out 15 to 30 % below the processor time of runs on the embedded model (benchmarks/plan_cost.py): figures,
intervals and files are not arithmetic, and no rate has them.
"""

from dataclasses import dataclass

import torch

from ..core.device import site_budget
from ..core.head_slices import ARRAYS_PER_SLICE, COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from ..core.rates import Rates
from ..core.rows import rows_at_once
from ..core.schedule import Expected
from ..models.adapter import Adapter
from .work import Counts, RunWork, StageWork, Workload, run_work, total

# Experts are held as they are stored, in bf16.
STORED_BYTES = 2
# A tuned parameter holds its old value, its gradient, the master copy, that one's gradient, and the optimizer's two
# moments.
TUNING_BYTES = 2 + 2 + 4 + 4 + 8
# The interpreter with torch and transformers imported, texts and tokenizer: 0.45 GB before the first block, and 0.1 to
# 0.2 GB of buffers that come and go. Measured on the embedded model, whose weights are small beside it.
BASE_RAM_BYTES = 550_000_000
# Verification beside its two forward walks: where errors come from, intervals, files. docs/benchmarks.md has 1.29.
VERIFICATION_SHARE = 1.3


@dataclass(frozen=True)
class Cost:
    """Estimates."""

    flops: float
    # Of all computing together.
    flops_per_second: float
    # Checking the source, quantizing and verifying.
    seconds: float
    # Its parts by kind of work.
    seconds_by: dict[str, float]
    # Its parts by stage of the run, in order; they add up to `seconds`.
    stages: tuple[Expected, ...]
    ram_bytes: int
    # 0 on a CPU.
    device_bytes: int
    disk_bytes: int


def estimate(load: Workload, rates: Rates, device: torch.device) -> Cost:
    """Counts the work, and sets it against the rates of a machine."""
    work = run_work(load)
    flops = _flops(work)
    moved = total(work.stages)
    seconds_by = {
        "forward": flops.forward / rates.forward_flops,
        "statistics": flops.statistics / rates.product_flops,
        "quantize": flops.solve / rates.solve_flops,
        "head": flops.head / rates.head_flops,
        "disk": moved.read / rates.read_bytes + moved.write / rates.write_bytes,
    }
    seconds = sum(seconds_by.values())
    all_flops = flops.forward + flops.statistics + flops.head + flops.solve
    held = device_bytes(load, site_budget(device))
    on_cpu = device.type == "cpu"
    largest = max(piece.data_bytes for piece in load.plan.pieces)
    return Cost(
        flops=all_flops,
        flops_per_second=all_flops / (seconds - seconds_by["disk"]),
        seconds=seconds,
        seconds_by=seconds_by,
        stages=expected(work.stages, rates),
        ram_bytes=BASE_RAM_BYTES + largest + (held if on_cpu else _block_bytes(load) // 16),
        device_bytes=0 if on_cpu else held,
        disk_bytes=disk_bytes(load),
    )


@dataclass(frozen=True)
class _Flops:
    """Operations of a whole run by kind, what verification does beside its walks included."""

    forward: float
    statistics: float
    solve: float
    head: float


def _flops(work: RunWork) -> _Flops:
    verifying, blocks, back = total(work.verification), total(work.blocks), total(work.sensitivities)
    return _Flops(
        forward=verifying.forward * VERIFICATION_SHARE + blocks.forward + back.forward,
        statistics=float(blocks.statistics),
        solve=float(blocks.solve),
        head=verifying.head * VERIFICATION_SHARE + back.head,
    )


# --- seconds of one stage


def expected(stages: list[StageWork], rates: Rates) -> tuple[Expected, ...]:
    """The stages with their seconds on a machine with these rates."""
    return tuple(
        Expected(
            name=stage.name,
            kind=stage.kind,
            weight=_seconds(stage.counts, rates, VERIFICATION_SHARE if stage.kind.startswith("verify") else 1.0),
            tasks=stage.tasks,
            block=stage.block,
            tokens=stage.tokens,
        )
        for stage in stages
    )


def _seconds(counts: Counts, rates: Rates, share: float) -> float:
    return (
        share * (counts.forward / rates.forward_flops + counts.head / rates.head_flops)
        + counts.statistics / rates.product_flops
        + counts.solve / rates.solve_flops
        + counts.read / rates.read_bytes
        + counts.write / rates.write_bytes
    )


# --- bytes


def _block_bytes(load: Workload) -> int:
    """The largest block as it is stored."""
    return max((block.weights for block in load.blocks), default=0) * STORED_BYTES


def _head_bytes(adapter: Adapter) -> int:
    """Both heads, and a slice of their logits in fp32."""
    slices = 4 * ARRAYS_PER_SLICE * TOKENS_PER_SLICE * min(COLUMNS_PER_SLICE, adapter.vocab_size)
    return slices + 2 * STORED_BYTES * adapter.vocab_size * adapter.hidden_size


def device_bytes(load: Workload, site_budget_bytes: int) -> int:
    """The most that the device holds: while a block is quantized, or while it is verified.

    Verification holds both versions of a block. Quantizing holds the block as it was and as it becomes. It also holds
    the moments of one stage and one cut of its matrices, one matrix at least; before there are moments, it holds what
    tuning needs.
    """
    pair, blocks = 2 * _block_bytes(load), load.blocks
    verifying = pair + _head_bytes(load.adapter)
    if not load.method.needs_statistics:
        return verifying
    matrix = max((block.matrix_bytes for block in blocks), default=0)
    moments = max((block.moment_bytes for block in blocks), default=0)
    tuned = max((block.tuned_weights for block in blocks), default=0) * TUNING_BYTES
    return max(verifying, pair + max(moments + max(site_budget_bytes, matrix), tuned))


def disk_bytes(load: Workload) -> int:
    """The most that lies on disk: hidden rows, and beside them what is emitted.

    Verification keeps the rows of both models before and after a block. Sensitivities keep the calibration rows at
    several places of the model at the same time, while nothing is emitted yet.
    """
    row_bytes = load.adapter.hidden_size * load.dtype.itemsize
    most = load.plan.disk_bytes + 4 * load.evaluation_tokens * row_bytes
    if load.method.needs_statistics:
        most = max(most, load.plan.disk_bytes + 7 * load.stream_bytes)
    if load.method.walks_back:
        most = max(most, (2 + rows_at_once(load.adapter.n_blocks)) * load.stream_bytes)
    return most
