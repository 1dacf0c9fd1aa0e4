"""What a run will take: time, RAM, device memory and disk. Estimates with their formulas; the plan's bytes are exact.

Time is arithmetic over a rate measured on this machine in half a second (a matmul in the compute dtype), plus reading
and writing at the given disk rate. It errs low: small matrices run below the measured rate.
"""

import time
from dataclasses import dataclass

import torch

from ..models.adapter import Adapter, Role
from .plan import Plan

# Sequential rate of a plain NVMe disk; a network disk is slower, a warm page cache faster.
DISK_BYTES_PER_SECOND = 1e9
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
    needs_statistics: bool,
    calibration_tokens: int,
    evaluation_tokens: int,
    compute_itemsize: int,
    flops_per_second: float,
    device: torch.device,
    site_budget_bytes: int,
) -> Cost:
    """Add up the work of every site.

    forward:    2 x outputs x inputs a row; an expert site sees tokens x top-k rows in all
    statistics: 2 x inputs^2 a row
    GPTQ:       2 x outputs x inputs^2 a matrix for the column updates, 3 x inputs^3 for the factors
    The calibration rows go through each block three times (reference, statistics, quantized), the evaluation rows
    twice, and twice through the head.
    """
    forward = statistics = solve = 0.0
    block_bytes = moment_bytes = 0
    for block in range(adapter.n_blocks):
        block_params = moments = 0
        for site in adapter.sites(block):
            outputs = sum(site.out_features)
            share = adapter.top_k if site.role is Role.EXPERT else 1
            forward += 2.0 * outputs * site.in_features * share
            block_params += outputs * site.in_features * len(site.members)
            if site.members[0][0] in plan.schemes:
                statistics += 2.0 * site.in_features**2 * share
                moments += 4 * site.in_features**2 * len(site.members)
                solve += len(site.members) * (2.0 * outputs * site.in_features**2 + 3.0 * site.in_features**3)
        block_bytes = max(block_bytes, block_params * compute_itemsize)
        moment_bytes = max(moment_bytes, moments)
    head = 2.0 * adapter.vocab_size * adapter.hidden_size
    flops = 2 * evaluation_tokens * (forward + head)
    largest_shard = max(shard.data_bytes for shard in plan.shards)
    working = site_budget_bytes if needs_statistics else min(site_budget_bytes, block_bytes)
    stream = calibration_tokens * adapter.hidden_size * compute_itemsize
    if needs_statistics:
        flops += calibration_tokens * (3 * forward + statistics) + solve
        device_bytes = block_bytes + moment_bytes + working
        disk = plan.emitted_bytes + 4 * stream
    else:
        device_bytes = block_bytes  # the verification walk
        disk = plan.emitted_bytes
    traffic = (
        3 * plan.source_bytes + 2 * plan.emitted_bytes + adapter.n_blocks * (5 * stream if needs_statistics else 0)
    )
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
