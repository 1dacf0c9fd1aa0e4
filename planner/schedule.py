"""What a run or a verification will do, for the ETA: the stages of planner/work.py, and what the estimate leaves out.

The estimate of `onecard plan` takes no time for choosing rows from a pool, for writing another format than that of the
work directory, and for the digests at the end.
"""

from dataclasses import replace

from ..core.rates import Rates
from ..core.schedule import Expected, Schedule
from ..models.adapter import Adapter
from .cost import expected
from .work import Counts, StageWork, Workload, block_forward, run_work, verification


def run_schedule(
    load: Workload, rates: Rates, *, pool_tokens: int = 0, written_again: int = 0, with_tasks: bool = False
) -> Schedule:
    """`pool_tokens`: of a pool that is counted first; `written_again`: bytes of another format than the work
    directory's; `with_tasks`: questions are verified beside the texts."""
    work, emitted = run_work(load), written_again or load.plan.emitted_bytes
    again = Counts(read=written_again, write=written_again)
    rest = [replace(stage, counts=again) if written_again and stage is work.move else stage for stage in work.rest]
    pool = _counting(load.adapter, pool_tokens) if pool_tokens else []
    before = work.check[:1] + pool + work.check[1:] + work.sensitivities + work.blocks + rest
    stages = expected([*before, *work.verification, _checksums(emitted)], rates)
    return Schedule(_without_tokens(stages) if with_tasks else stages)


def verification_schedule(
    adapter: Adapter, source_bytes: int, emitted_bytes: int, tokens: int, rates: Rates, *, with_tasks: bool
) -> Schedule:
    """For `onecard verify` and `flips`."""
    check = StageWork("check weights", "check weights", Counts(read=source_bytes + emitted_bytes), ("check weights",))
    stages = expected([check, *verification(adapter, source_bytes, emitted_bytes, tokens)], rates)
    return Schedule(_without_tokens(stages) if with_tasks else stages)


def _counting(adapter: Adapter, tokens: int) -> list[StageWork]:
    """The pool's rows go through every block once."""
    return [
        StageWork(
            name=f"count block {index + 1}",
            kind="count",
            counts=Counts(forward=tokens * block_forward(adapter, index)),
            tasks=("coverage: count",),
            block=index,
            tokens=tokens,
        )
        for index in range(adapter.n_blocks)
    ]


def _checksums(emitted_bytes: int) -> StageWork:
    return StageWork("checksums", "checksums", Counts(read=emitted_bytes), ("checksums",))


def _without_tokens(stages: tuple[Expected, ...]) -> tuple[Expected, ...]:
    """Questions take more tokens through the verification than the texts have."""
    return tuple(replace(stage, tokens=0) if stage.kind.startswith("verify") else stage for stage in stages)
