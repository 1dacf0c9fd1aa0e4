"""The floor of a verification: what computing in its dtype costs by itself, whatever the checkpoint.

The original is walked against itself on the same rows, in float32 and in the compute dtype. In bf16 both sides of a
verification are rounded, so a part of their KL is the rounding of either, and no better checkpoint can go below it by
much. A floor is measured on request: it costs another twin walk.
"""

from dataclasses import dataclass, replace

import torch

from ..core.device import Compute
from ..core.errors import InputError
from ..core.record.kl import Floor
from ..core.rows import Row, RowStore, Step
from ..core.schedule import Schedule
from ..models.walk import Walk
from .summary import summarize
from .twin import twin_walk


def refuse_without_floor(compute: Compute) -> None:
    """Raises InputError where the verification computes in the dtype that a floor is measured against."""
    if compute.dtype == torch.float32:
        raise InputError(
            "--floor measures what a narrower dtype costs, and this verification computes in float32: drop it, or name "
            "a recipe with compute_dtype: bfloat16"
        )


@dataclass(frozen=True)
class _FloorStep:
    """Tells `step` the tasks of a twin walk under names of their own."""

    step: Step

    def expect(self, schedule: Schedule) -> None:
        self.step.expect(schedule)

    def begin(self, task: str, block: int | None = None) -> None:
        self.step.begin(task.replace("verify: ", "floor: ", 1), block)

    def advance(self, tokens: int) -> None:
        self.step.advance(tokens)


def measure_floor(walk: Walk, rows: list[Row], store: RowStore) -> Floor:
    """KL(original in float32 || original in the dtype of `walk`) over `rows`. Leaves the store empty. Raises
    UnusableModelError."""
    step = _FloorStep(walk.step)
    sides = [Walk.over(walk.adapter, walk.source, replace(walk.compute, dtype=torch.float32), step)]
    sides.append(Walk.over(walk.adapter, walk.source, walk.compute, step))
    twin = twin_walk(sides[0], sides[1], rows, store)
    assert twin.tokens is not None
    found = summarize(twin.tokens)
    return Floor(
        compute_dtype=walk.compute.dtype_name,
        kl_mean_nats=found.kl_mean_nats,
        kl_low_nats=found.kl_low_nats,
        kl_high_nats=found.kl_high_nats,
        kl_p99_nats=found.kl_p99_nats,
        same_top1=found.same_top1,
        changed_routes=twin.mean_changed_routes,
    )
