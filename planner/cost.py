"""Estimates a run's time, RAM, device memory and disk. The bytes of the plan itself are exact.

On a CPU, work.py counts each kind of work in operations or bytes, and the time is that count divided by this machine's
rates (core/rates.py). Without rates that `onecard plan --measure` kept, one matrix product of half a second gives a
rate for every kind; the estimate is then too low for small matrices and long attention. On a GPU, card_times.py counts
launches, products, kernels and copies, and core/card_rates.py has the rates.

The estimate counts the tokens that the recipe wants, so texts with fewer tokens take less time. With measured rates it
was 15 to 30 % below the processor time of runs on the embedded model (benchmarks/plan_cost.py), because no rate covers
work that is not arithmetic (figures, intervals, files). For a GPU it is a model that no GPU has confirmed;
tests/test_card_plan.py holds it beside what the real code counts (benchmarks/gpu_cost.py).
"""

from dataclasses import dataclass

import torch

from ..checkpoint.activations import Room
from ..checkpoint.plan import Plan
from ..core.card_rates import AssumedCard, CardRates
from ..core.device import Compute, card_site_budget, site_budget
from ..core.rates import Rates
from ..core.schedule import Expected
from ..models.adapter import Adapter
from .card_times import card_times
from .memory import compute_bytes, disk_bytes, ram_bytes
from .rows import RowPlaces, rows_on_device
from .schedule import run_stages
from .times import StageTimes, cpu_times
from .work import MethodCosts, RunWork, Tokens


@dataclass(frozen=True)
class Cost:
    """The estimates for one run."""

    # Checking the source, quantizing and verifying.
    seconds: float
    # The same seconds by kind of work.
    seconds_by: dict[str, float]
    # The same seconds by stage of the run, in order.
    stages: tuple[Expected, ...]
    ram_bytes: int
    # What the computation takes of a card, and the rows that stay there besides; 0 on a CPU.
    device_bytes: int
    disk_bytes: int
    rows: RowPlaces
    # Whether nothing measured has confirmed the time: a GPU's.
    is_a_model: bool


@dataclass(frozen=True)
class Machine:
    """The facts about a machine, apart from its rates, that an estimate depends on."""

    device: torch.device
    # Bytes of a number in the compute dtype.
    itemsize: int
    # The most tokens that go through a block at once.
    batch_tokens: int
    # The most memory for quantizing one part of a site.
    site_budget_bytes: int
    # All memory of the card; 0 on a CPU.
    card_bytes: int
    # What rows between blocks may take of the RAM.
    rows_ram_bytes: int

    @classmethod
    def of(cls, compute: Compute) -> "Machine":
        device = compute.device
        return cls(
            device=device,
            itemsize=compute.dtype.itemsize,
            batch_tokens=compute.batch_tokens,
            site_budget_bytes=site_budget(device),
            card_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
            rows_ram_bytes=Room.now(None if compute.device.type == "cpu" else 0).ram_bytes,
        )

    @classmethod
    def assumed(cls, card: AssumedCard, itemsize: int, batch_tokens: int) -> "Machine":
        """A machine with a card that is not at hand."""
        budget = card_site_budget(card.card_bytes)
        ram = Room.of(card.ram_bytes, 0).ram_bytes
        return cls(torch.device("cuda"), itemsize, batch_tokens, budget, card.card_bytes, ram)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


def estimate(
    adapter: Adapter, plan: Plan, method: MethodCosts, tokens: Tokens, machine: Machine, rates: Rates | CardRates
) -> Cost:
    work = RunWork.of(adapter, plan, method, tokens, machine.itemsize)
    compute = compute_bytes(work, machine.site_budget_bytes)
    on_device = 0 if machine.on_cpu else rows_on_device(work, machine.card_bytes, machine.site_budget_bytes)
    room = Room(on_device, machine.rows_ram_bytes)
    pinned_tokens = 0 if machine.on_cpu else machine.batch_tokens
    times = times_of(work, rates, machine.batch_tokens, RowPlaces.of(work, room, pinned_tokens).share_in_files)
    seconds_by = times.by_kind()
    rows = RowPlaces.of(work, room, pinned_tokens, times.block_seconds)
    return Cost(
        seconds=sum(seconds_by.values()),
        seconds_by=seconds_by,
        stages=run_stages(work, times),
        ram_bytes=ram_bytes(work, compute, machine.on_cpu, rows.ram_taken_bytes),
        device_bytes=0 if machine.on_cpu else compute + rows.device_bytes,
        disk_bytes=disk_bytes(work, rows.disk_bytes),
        rows=rows,
        is_a_model=not machine.on_cpu,
    )


def times_of(work: RunWork, rates: Rates | CardRates, batch_tokens: int, share_in_files: float = 0.0) -> StageTimes:
    """What each stage of a run takes. `share_in_files`: of the rows between blocks."""
    if isinstance(rates, Rates):
        return cpu_times(work, rates)
    return card_times(work, rates, batch_tokens, share_in_files)
