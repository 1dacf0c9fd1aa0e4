"""Estimates a run's time, RAM, device memory and disk. The bytes of the plan itself are exact.

work.py counts each kind of work in operations or bytes. The time is that count divided by this machine's rate
(core/rates.py). The rates are those that `onecard plan --measure` kept. Without them, one matrix product of half a
second gives a rate for every kind; the estimate is then too low for small matrices and long attention.

The estimate counts the tokens that the recipe wants, so texts with fewer tokens take less time. With measured rates it
was 15 to 30 % below the processor time of runs on the embedded model (benchmarks/plan_cost.py), because no rate covers
work that is not arithmetic (figures, intervals, files).
"""

from dataclasses import dataclass

import torch

from ..checkpoint.plan import Plan
from ..core.device import Compute, site_budget
from ..core.rates import Rates
from ..core.schedule import Expected
from ..models.adapter import Adapter
from .memory import compute_bytes, disk_bytes, ram_bytes
from .schedule import run_stages
from .work import MethodCosts, RunWork, Tokens


@dataclass(frozen=True)
class Cost:
    """The estimates for one run."""

    flops: float
    # Averaged over all computation, without disk time.
    flops_per_second: float
    # Checking the source, quantizing and verifying.
    seconds: float
    # The same seconds by kind of work.
    seconds_by: dict[str, float]
    # The same seconds by stage of the run, in order.
    stages: tuple[Expected, ...]
    ram_bytes: int
    # 0 on a CPU.
    device_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Machine:
    """The facts about a machine, apart from its rates, that an estimate depends on."""

    device: torch.device
    # Bytes of a number in the compute dtype.
    itemsize: int
    # The most memory for quantizing one part of a site.
    site_budget_bytes: int

    @classmethod
    def of(cls, compute: Compute) -> "Machine":
        return cls(compute.device, compute.dtype.itemsize, site_budget(compute.device))

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


def estimate(adapter: Adapter, plan: Plan, method: MethodCosts, tokens: Tokens, machine: Machine, rates: Rates) -> Cost:
    work = RunWork.of(adapter, plan, method, tokens, machine.itemsize)
    total = work.total()
    seconds_by = total.seconds_by(rates)
    seconds = sum(seconds_by.values())
    compute = compute_bytes(work, machine.site_budget_bytes)
    return Cost(
        flops=total.flops,
        flops_per_second=total.flops / (seconds - seconds_by["disk"]),
        seconds=seconds,
        seconds_by=seconds_by,
        stages=run_stages(work, rates),
        ram_bytes=ram_bytes(work, compute, machine.on_cpu),
        device_bytes=0 if machine.on_cpu else compute,
        disk_bytes=disk_bytes(work),
    )
