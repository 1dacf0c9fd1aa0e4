"""What a run will take: time, RAM, device memory and disk. Estimates with their formulas; the plan's bytes are exact.

Time is arithmetic over a rate measured on this machine in half a second (a matmul in the compute dtype), plus reading
and writing at the given disk rate. It errs low: small matrices run below the measured rate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.adapter import Adapter, Half, Role
from .plan import Plan

# Sequential rate of a plain NVMe disk; a network disk is slower, a warm page cache faster.
DISK_BYTES_PER_SECOND = 1e9
# Experts are held as they are stored, in bf16.
STORED_BYTES = 2
# Of a parameter that is tuned: as it was, its gradient, master, master's gradient, and the optimizer's two moments.
TUNING_BYTES = 2 + 2 + 4 + 4 + 8
# The interpreter with torch and transformers imported.
BASE_RAM_BYTES = 900_000_000


@dataclass(frozen=True)
class Cost:
    """Estimates. `seconds` covers scan, quantize and verify."""

    flops: float
    flops_per_second: float
    seconds: float
    ram_bytes: int
    device_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Work:
    """What of the method costs time and memory: none of it for round-to-nearest. `matrix_bytes`, `matrix_flops`:
    (outputs, inputs, whether with an output metric) -> what quantizing one matrix holds, and takes."""

    statistics: bool
    one_by_one: bool  # statistics for every stage of a half, or once for each half
    output_metric: bool
    # All calibration rows through the model and back, for metrics or token weights: number of blocks -> of places at
    # which they lie on disk at the same time. None: no such walk.
    walk_back: Callable[[int], int] | None
    tune_epochs: int
    token_gradients: bool  # tokens count by each site's own gradients, so that sites share no statistics
    matrix_bytes: Callable[[int, int, bool], int]
    matrix_flops: Callable[[int, int, bool], float]


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds count two: a square matmul repeated for about half a second."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
    a @ a
    count = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.4:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - begin)


def estimate(
    adapter: Adapter,
    plan: Plan,
    work: Work,
    calibration_tokens: int,
    evaluation_tokens: int,
    compute_itemsize: int,
    flops_per_second: float,
    device: torch.device,
    site_budget_bytes: int,
) -> Cost:
    """Add up the work of every site.

    forward:    2 x outputs x inputs a row; an expert site sees tokens x top-k rows in all
    statistics: 2 x inputs^2 a row for each of the two second moments; slopes of gates and ups: 2 x outputs^2 and once
                more the forward
    GPTQ:       quantize/site.matrix_flops
    The calibration rows of the quantized stream go through the attention half once, and through the feed-forward half
    once for every stage and once more; those of the reference stream once, and in the feed-forward half once more for
    every later stage that reads inner inputs. In the attention half both go once more for what reads inside it (MLA's
    latents). For metrics and token weights they go through a block three times forward
    and once back, and lie on disk at several places meanwhile. An epoch of tuning
    takes them through a feed-forward half forward and back. The evaluation rows go through each block twice,
    and twice through the head.
    """
    forward = calibration = statistics = solve = 0.0
    block_bytes = moment_bytes = matrix_bytes = tuned_bytes = 0
    for block in range(adapter.n_blocks):
        block_forward = 0.0
        block_params = 0
        moments: dict[tuple[Half, int], int] = {}
        inner: set[tuple[Half, int]] = set()
        inside: set[int] = set()
        half_forward = dict.fromkeys(Half, 0.0)
        tuned_params = 0
        tuned_stages: set[int] = set()
        norms: set[str] = set()
        for site in adapter.sites(block):
            outputs, inputs, count = sum(site.out_features), site.in_features, len(site.members)
            share = adapter.top_k if site.role is Role.EXPERT else 1
            block_forward += 2.0 * outputs * inputs * share
            half_forward[site.half] += 2.0 * outputs * inputs * share
            stage = (site.half, site.stage if work.one_by_one else 0)
            block_params += outputs * inputs * count
            if site.members[0][0] in plan.schemes:
                common = site.reads_norm in norms and not work.token_gradients
                norms |= {site.reads_norm} if site.reads_norm else set()
                measured = work.output_metric and (bool(site.feeds) or site.reaches_residual)
                slopes = outputs if work.output_metric and site.feeds else 0
                miss = outputs if site.adds_to_residual else inputs
                moments.setdefault(stage, 0)
                if not common:
                    statistics += (4.0 * inputs**2 + 2.0 * slopes**2 + 2.0 * slopes * inputs) * share
                    moments[stage] += 4 * count * (inputs**2 + miss * inputs + slopes**2)
                solve += count * work.matrix_flops(outputs, inputs, measured)
                matrix_bytes = max(matrix_bytes, work.matrix_bytes(outputs, inputs, measured))
                if not site.adds_to_residual:
                    inner.add(stage)
                    inside |= {site.stage} if site.half is Half.ATTENTION and site.reads_norm is None else set()
                if work.tune_epochs and site.half is Half.FEED_FORWARD:
                    tuned_params += outputs * inputs * count
                    tuned_stages |= set() if site.adds_to_residual else {stage[1]}
        forward += block_forward
        for half, flops_a_token in half_forward.items():
            stages, reads = (sum(stage[0] is half for stage in group) for group in (moments, inner))
            attention = 2 + 2 * len(inside)
            calibration += flops_a_token * (attention if half is Half.ATTENTION else stages + 1 + max(1, reads))
        calibration += 3 * half_forward[Half.FEED_FORWARD] * work.tune_epochs * len(tuned_stages)
        tuned_bytes = max(tuned_bytes, tuned_params * TUNING_BYTES)
        block_bytes = max(block_bytes, block_params * STORED_BYTES)
        moment_bytes = max(moment_bytes, max(moments.values(), default=0))
    head = 2.0 * adapter.vocab_size * adapter.hidden_size
    flops = 2 * evaluation_tokens * (forward + head)
    largest_shard = max(shard.data_bytes for shard in plan.shards)
    stream = calibration_tokens * adapter.hidden_size * compute_itemsize
    if work.statistics:
        flops += calibration_tokens * (calibration + statistics) + solve
        # The block as it was and as it becomes; moments of one stage, and one cut, which holds a matrix at least; or,
        # before there are moments, what tuning holds.
        device_bytes = 2 * block_bytes + max(moment_bytes + max(site_budget_bytes, matrix_bytes), tuned_bytes)
        disk = plan.emitted_bytes + 7 * stream
        if work.walk_back is not None:
            flops += calibration_tokens * (5 * forward + 2 * head)
            disk = max(disk, (2 + work.walk_back(adapter.n_blocks)) * stream)
    else:
        device_bytes = 2 * block_bytes  # the verification walk: both versions of one block
        disk = plan.emitted_bytes
    traffic = 3 * plan.source_bytes + 2 * plan.emitted_bytes + adapter.n_blocks * (8 * stream if work.statistics else 0)
    on_cpu = device.type == "cpu"
    ram = BASE_RAM_BYTES + largest_shard + (device_bytes if on_cpu else block_bytes // 16)
    return Cost(
        flops=flops,
        flops_per_second=flops_per_second,
        seconds=flops / flops_per_second + traffic / DISK_BYTES_PER_SECOND,
        ram_bytes=ram,
        device_bytes=0 if on_cpu else device_bytes,
        disk_bytes=disk,
    )
