"""Lists the stages of a run or verification, with the seconds of planner/times.py, for the ETA.

The stages of run_stages add up to the estimate of `onecard plan`. run_schedule adds what that estimate leaves out:
choosing rows from a pool, writing a format other than the work directory's, and the digests at the end. Stages without
counted work (figures) have zero seconds.
"""

from dataclasses import replace

from ..core.rates import Rates
from ..core.rows import spacing
from ..core.schedule import Expected, Schedule
from ..models.adapter import Adapter
from .times import Parts, StageTimes, WalkTimes, seconds_of, verified_parts, walked_again
from .work import VERIFICATION_SHARE, RunWork, Work, pass_work

CHECK, COPY, MOVE, CHECKSUMS = "check weights", "copy the rest", "move to OUT", "checksums"
QUANTIZING = ("tune", "statistics", "quantize", "propagate")
VERIFYING = ("verify: reference", "verify: quantized", "verify: errors")


def run_stages(work: RunWork, times: StageTimes) -> tuple[Expected, ...]:
    """All stages of a run in order. Their seconds add up to the estimate of cost.py."""
    verification = _verification(work.adapter, times.verified, times.head, work.tokens.evaluation)
    embedded, *walked, head, figures, end = verification
    blocks = [
        Expected(
            name=f"block {index + 1}",
            kind=f"quantize {_kind(work.adapter, index)}",
            weight=seconds_of(parts),
            tasks=QUANTIZING,
            block=index,
        )
        for index, parts in enumerate(times.blocks)
    ]
    before = [_single(CHECK, times.check), _single(COPY, times.copy), _single("embed", times.embed)]
    before += [] if times.walk is None else _sensitivities(times.walk, work.tokens.calibration)
    moved = _single(MOVE, {})
    if work.method.verifies_at_the_end:
        return (*before, *blocks, moved, *verification)
    # Each block is verified as soon as its shards are written.
    blocks = [
        replace(ours, weight=ours.weight + theirs.weight, tasks=(*ours.tasks, *theirs.tasks))
        for ours, theirs in zip(blocks, walked, strict=True)
    ]
    return (*before, embedded, *blocks, moved, head, figures, end)


def run_schedule(
    work: RunWork,
    times: StageTimes,
    rates: Rates,
    *,
    pool_tokens: int = 0,
    written_again: int = 0,
    with_tasks: bool = False,
) -> Schedule:
    """The stages of a run with the work that the plan's estimate leaves out.

    `pool_tokens` is the size of a pool whose rows are counted first, 0 without a pool. `written_again` is the bytes
    written in a format other than the work directory's. `with_tasks` says whether questions are verified too.
    """
    emitted = written_again or work.plan.emitted_bytes
    stages: list[Expected] = []
    for stage in run_stages(work, times):
        again = Work(read_bytes=written_again, write_bytes=written_again)
        stages.append(_single(MOVE, again.seconds_by(rates)) if stage.name == MOVE else stage)
        if stage.name == CHECK and pool_tokens:
            stages += [_counting(work, index, pool_tokens, rates) for index in range(work.adapter.n_blocks)]
    stages.append(_single(CHECKSUMS, Work(read_bytes=emitted).seconds_by(rates)))
    return Schedule(_without_tokens(stages) if with_tasks else tuple(stages))


def verification_schedule(
    adapter: Adapter,
    source_bytes: int,
    emitted_bytes: int,
    tokens: int,
    rates: Rates,
    *,
    with_tasks: bool,
    with_floor: bool = False,
) -> Schedule:
    """The stages of `onecard verify` and `flips`: both folders are checked, then walked block by block.

    `tokens` is the number of evaluation tokens. `with_tasks` says whether questions are verified too, `with_floor`
    whether the original is walked against itself afterwards.
    """
    read = source_bytes + emitted_bytes
    blocks = tuple(pass_work(adapter, index) for index in range(adapter.n_blocks))
    flops = sum(block.pass_flops for block in blocks)
    head = 2.0 * adapter.vocab_size * adapter.hidden_size
    scale = 2 * tokens * VERIFICATION_SHARE
    work = Work(forward_flops=scale * flops, head_flops=scale * head, read_bytes=read)

    def walked(what: Work) -> list[Expected]:
        *parts, end = verified_parts(blocks, what, rates)
        return _verification(adapter, tuple(parts), end, tokens)

    stages = [_single(CHECK, Work(read_bytes=read).seconds_by(rates)), *walked(work)]
    stages = list(_without_tokens(stages)) if with_tasks else stages
    if with_floor:
        # The last two stages, figures and the end, come once.
        floor = [_of_floor(stage) for stage in walked(replace(work, read_bytes=2 * source_bytes))[:-2]]
        stages[-1:] = [*floor, stages[-1]]
    return Schedule(tuple(stages))


def _of_floor(stage: Expected) -> Expected:
    """The same stage of the walk that measures a floor. It errs as the verification's do."""
    tasks = tuple(task.replace("verify: ", "floor: ", 1) for task in stage.tasks)
    return replace(stage, name=stage.name.replace("verify", "floor", 1), tasks=tasks)


def _sensitivities(times: WalkTimes, tokens: int) -> list[Expected]:
    """The walk of calibration/sensitivity.py: forward to the head, then each stretch of blocks forward again and
    back."""
    blocks = len(times.forward)
    again, apart = walked_again(blocks), spacing(blocks)

    def passed(kind: str, index: int, parts: Parts) -> Expected:
        return Expected("sensitivities", f"sensitivity {kind}", seconds_of(parts), ("sensitivity",), index, tokens)

    head = Expected("sensitivities", "sensitivity head", seconds_of(times.head), ("sensitivity",), None, tokens)
    stages = [_single("sensitivity", {})]
    stages += [*(passed("forward", index, times.forward[index]) for index in range(blocks)), head]
    for begin in reversed(range(0, blocks, apart)):
        stretch = range(begin, min(begin + apart, blocks))
        stages += [passed("forward", index, times.forward[index]) for index in stretch if index in again]
        stages += [passed("back", index, times.back[index]) for index in reversed(stretch)]
    return stages


def _verification(adapter: Adapter, blocks: tuple[Parts, ...], head: Parts, tokens: int) -> list[Expected]:
    """The stages of a verification that takes so long at each block, and at the head."""
    return [
        _single("verify: embed", {}),
        *(
            Expected(
                name=f"verify block {index + 1}",
                kind=f"verify {_kind(adapter, index)}",
                weight=seconds_of(parts),
                tasks=VERIFYING,
                block=index,
                tokens=2 * tokens,
            )
            for index, parts in enumerate(blocks)
        ),
        Expected("verify head", "verify head", seconds_of(head), ("verify: head",), None, tokens),
        _single("verify: figures", {}),
        _single("finish", {}),
    ]


def _counting(work: RunWork, index: int, tokens: int, rates: Rates) -> Expected:
    """One pass of the pool's rows through one block."""
    seconds = Work(forward_flops=tokens * work.blocks[index].pass_flops).seconds(rates)
    return Expected(f"count block {index + 1}", "count", seconds, ("coverage: count",), index, tokens)


def _single(task: str, parts: Parts) -> Expected:
    """A stage of one task, outside the blocks."""
    return Expected(task, task, seconds_of(parts), (task,))


def _kind(adapter: Adapter, index: int) -> str:
    return "experts" if adapter.is_moe(index) else "dense"


def _without_tokens(stages: list[Expected]) -> tuple[Expected, ...]:
    """Drops the token counts of the verification stages: with questions, more tokens pass than the texts have."""
    return tuple(replace(stage, tokens=0) if stage.kind.startswith("verify") else stage for stage in stages)
