"""What a run will take: time, RAM, device memory and disk. Estimates; the plan's bytes are exact.

Time is each kind of work, counted in operations or bytes (work.py), over its rate on this machine (core/rates.py): the
rates that `onecard plan --measure` kept, or one matrix product of half a second for all of them, which errs low where
matrices are small and attention long. It counts the tokens that a recipe wants: texts that hold fewer take less. With
measured rates it came out 15 to 30 % below the processor time of runs on the embedded model (benchmarks/plan_cost.py):
what is not arithmetic (figures, intervals, files) is in no rate.
"""

from dataclasses import dataclass

import torch

from ..checkpoint.plan import Plan
from ..core.device import Compute, site_budget
from ..core.rates import Rates
from ..models.adapter import Adapter
from .memory import compute_bytes, disk_bytes, ram_bytes
from .work import MethodCosts, RunWork, Tokens


@dataclass(frozen=True)
class Cost:
    """Estimates. `seconds` covers check, quantize and verify; `seconds_by`: its parts by kind of work.
    `flops_per_second`: all computing together."""

    flops: float
    flops_per_second: float
    seconds: float
    seconds_by: dict[str, float]
    ram_bytes: int
    device_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Machine:
    """What an estimate depends on of the machine, beside its rates. `itemsize`: bytes of a computed number;
    `site_budget_bytes`: what quantizing one part of a site may take."""

    device: torch.device
    itemsize: int
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
        ram_bytes=ram_bytes(work, compute, machine.on_cpu),
        device_bytes=0 if machine.on_cpu else compute,
        disk_bytes=disk_bytes(work),
    )
