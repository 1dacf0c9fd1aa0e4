"""Splits the work of planner/work.py into the stages of a run or verification, with their seconds, for the ETA.

The stages of run_stages add up to the estimate of `onecard plan`. run_schedule adds what that estimate leaves out:
choosing rows from a pool, writing a format other than the work directory's, and the digests at the end. Stages without
counted work (embedding, figures) have zero seconds.
"""

from dataclasses import replace

from ..core.rates import Rates
from ..core.rows import spacing
from ..core.schedule import Expected, Schedule
from ..models.adapter import Adapter
from .work import VERIFICATION_SHARE, BlockWork, RunWork, Work, pass_work

CHECK, COPY, MOVE, CHECKSUMS = "check weights", "copy the rest", "move to OUT", "checksums"
QUANTIZING = ("tune", "statistics", "quantize", "propagate")
VERIFYING = ("verify: reference", "verify: quantized", "verify: errors")


def run_stages(work: RunWork, rates: Rates) -> tuple[Expected, ...]:
    """All stages of a run in order. Their seconds add up to the estimate of cost.py."""
    verification = _verification(work.adapter, work.blocks, work.verification(), work.tokens.evaluation, rates)
    embedded, *walked, head, figures, end = verification
    blocks = [
        Expected(
            name=f"block {index + 1}",
            kind=f"quantize {_kind(work.adapter, index)}",
            weight=work.quantizing((block,)).seconds(rates),
            tasks=QUANTIZING,
            block=index,
        )
        for index, block in enumerate(work.blocks)
    ]
    before = [_single(CHECK, work.check(), rates), _single(COPY, Work(), rates), _single("embed", Work(), rates)]
    before += _sensitivities(work, rates)
    moved = _single(MOVE, Work(), rates)
    if work.method.verifies_at_the_end:
        return (*before, *blocks, moved, *verification)
    # Each block is verified as soon as its shards are written.
    blocks = [
        replace(ours, weight=ours.weight + theirs.weight, tasks=(*ours.tasks, *theirs.tasks))
        for ours, theirs in zip(blocks, walked, strict=True)
    ]
    return (*before, embedded, *blocks, moved, head, figures, end)


def run_schedule(
    work: RunWork, rates: Rates, *, pool_tokens: int = 0, written_again: int = 0, with_tasks: bool = False
) -> Schedule:
    """The stages of a run with the work that the plan's estimate leaves out.

    `pool_tokens` is the size of a pool whose rows are counted first, 0 without a pool. `written_again` is the bytes
    written in a format other than the work directory's. `with_tasks` says whether questions are verified too.
    """
    emitted = written_again or work.plan.emitted_bytes
    stages: list[Expected] = []
    for stage in run_stages(work, rates):
        again = Work(read_bytes=written_again, write_bytes=written_again)
        stages.append(_single(MOVE, again, rates) if stage.name == MOVE else stage)
        if stage.name == CHECK and pool_tokens:
            stages += [_counting(work, index, pool_tokens, rates) for index in range(work.adapter.n_blocks)]
    stages.append(_single(CHECKSUMS, Work(read_bytes=emitted), rates))
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
    stages = [
        _single(CHECK, Work(read_bytes=read), rates),
        *_verification(adapter, blocks, work, tokens, rates),
    ]
    stages = list(_without_tokens(stages)) if with_tasks else stages
    if with_floor:
        again = replace(work, read_bytes=2 * source_bytes)
        # The last two stages, figures and the end, come once.
        floor = [_of_floor(stage) for stage in _verification(adapter, blocks, again, tokens, rates)[:-2]]
        stages[-1:] = [*floor, stages[-1]]
    return Schedule(tuple(stages))


def _of_floor(stage: Expected) -> Expected:
    """The same stage of the walk that measures a floor. It errs as the verification's do."""
    tasks = tuple(task.replace("verify: ", "floor: ", 1) for task in stage.tasks)
    return replace(stage, name=stage.name.replace("verify", "floor", 1), tasks=tasks)


def _sensitivities(work: RunWork, rates: Rates) -> list[Expected]:
    """The walk of calibration/sensitivity.py: forward to the head, then each stretch of blocks forward again and back.

    The last stretch is not walked forward again, and neither is the last block of any stretch. RunWork.sensitivity
    counts five passes per block: one forward, one forward again, three back. Where the second forward pass is not made,
    its share goes to the way back, which then counts four.
    """
    whole = work.sensitivity()
    if not whole.flops:
        return []
    tokens, blocks = work.tokens.calibration, work.adapter.n_blocks
    apart = spacing(blocks)
    last = (blocks - 1) // apart * apart

    def passed(kind: str, index: int, times: int) -> Expected:
        flops = whole.forward_flops * _share(work.blocks, index) * times / 5
        seconds = Work(forward_flops=flops).seconds(rates)
        return Expected("sensitivities", f"sensitivity {kind}", seconds, ("sensitivity",), index, tokens)

    head = Work(head_flops=whole.head_flops).seconds(rates)
    stages = [_single("sensitivity", Work(), rates)]
    stages += [passed("forward", index, 1) for index in range(blocks)]
    stages.append(Expected("sensitivities", "sensitivity head", head, ("sensitivity",), None, tokens))
    for begin in reversed(range(0, blocks, apart)):
        again = range(begin, begin + apart - 1) if begin < last else range(0)
        stages += [passed("forward", index, 1) for index in again]
        back = reversed(range(begin, min(begin + apart, blocks)))
        stages += [passed("back", index, 3 if index in again else 4) for index in back]
    return stages


def _verification(
    adapter: Adapter, blocks: tuple[BlockWork, ...], whole: Work, tokens: int, rates: Rates
) -> list[Expected]:
    """Splits `whole` into the blocks and the head. Bytes are split in proportion to the blocks' parameters."""
    parameters = sum(block.parameters for block in blocks)
    parts = [
        Work(
            forward_flops=whole.forward_flops * _share(blocks, index),
            read_bytes=whole.read_bytes * block.parameters // parameters,
        )
        for index, block in enumerate(blocks)
    ]
    rest = whole.read_bytes - sum(part.read_bytes for part in parts)
    head = Work(head_flops=whole.head_flops, read_bytes=rest).seconds(rates)
    return [
        _single("verify: embed", Work(), rates),
        *(
            Expected(
                name=f"verify block {index + 1}",
                kind=f"verify {_kind(adapter, index)}",
                weight=part.seconds(rates),
                tasks=VERIFYING,
                block=index,
                tokens=2 * tokens,
            )
            for index, part in enumerate(parts)
        ),
        Expected("verify head", "verify head", head, ("verify: head",), None, tokens),
        _single("verify: figures", Work(), rates),
        _single("finish", Work(), rates),
    ]


def _counting(work: RunWork, index: int, tokens: int, rates: Rates) -> Expected:
    """One pass of the pool's rows through one block."""
    seconds = Work(forward_flops=tokens * work.blocks[index].pass_flops).seconds(rates)
    return Expected(f"count block {index + 1}", "count", seconds, ("coverage: count",), index, tokens)


def _single(task: str, work: Work, rates: Rates) -> Expected:
    """A stage of one task, outside the blocks."""
    return Expected(task, task, work.seconds(rates), (task,))


def _share(blocks: tuple[BlockWork, ...], index: int) -> float:
    """One block's share of the operations of a pass through all blocks."""
    return blocks[index].pass_flops / sum(block.pass_flops for block in blocks)


def _kind(adapter: Adapter, index: int) -> str:
    return "experts" if adapter.is_moe(index) else "dense"


def _without_tokens(stages: list[Expected]) -> tuple[Expected, ...]:
    """Drops the token counts of the verification stages: with questions, more tokens pass than the texts have."""
    return tuple(replace(stage, tokens=0) if stage.kind.startswith("verify") else stage for stage in stages)
