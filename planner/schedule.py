"""The stages of a run or a verification with their seconds, for the ETA: planner/work.py by stage.

The stages of a run add up to the estimate of `onecard plan`, and what that leaves out is added where it is known:
choosing rows from a pool, writing another format than that of the work directory, and the digests at the end. Stages
that nothing is counted for (embedding, figures) have no seconds.
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
    """All stages in order; their seconds are the estimate's."""
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
    return (
        _single(CHECK, work.check(), rates),
        _single("embed", Work(), rates),
        *_sensitivities(work, rates),
        *blocks,
        _single(COPY, Work(), rates),
        _single(MOVE, Work(), rates),
        *_verification(work.adapter, work.blocks, work.verification(), work.tokens.evaluation, rates),
    )


def run_schedule(
    work: RunWork, rates: Rates, *, pool_tokens: int = 0, written_again: int = 0, with_tasks: bool = False
) -> Schedule:
    """`pool_tokens`: of a pool whose rows are counted first; `written_again`: bytes of another format than the work
    directory's; `with_tasks`: questions are verified beside the texts."""
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
    adapter: Adapter, source_bytes: int, emitted_bytes: int, tokens: int, rates: Rates, *, with_tasks: bool
) -> Schedule:
    """For `onecard verify` and `flips`: both folders are looked through, then walked."""
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
    return Schedule(_without_tokens(stages) if with_tasks else tuple(stages))


def _sensitivities(work: RunWork, rates: Rates) -> list[Expected]:
    """The walk as calibration/sensitivity.py does it: forward to the head, then stretch by stretch forward again (not
    in the last one) and back. Back counts three passes, or four where the count's third forward pass is not made."""
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
    """`whole` by block, and the head. Bytes go with the parameters of the blocks."""
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
    """The pool's rows go through a block once."""
    seconds = Work(forward_flops=tokens * work.blocks[index].pass_flops).seconds(rates)
    return Expected(f"count block {index + 1}", "count", seconds, ("coverage: count",), index, tokens)


def _single(task: str, work: Work, rates: Rates) -> Expected:
    """A stage of one task, outside the blocks."""
    return Expected(task, task, work.seconds(rates), (task,))


def _share(blocks: tuple[BlockWork, ...], index: int) -> float:
    """One block's share of a pass through all."""
    return blocks[index].pass_flops / sum(block.pass_flops for block in blocks)


def _kind(adapter: Adapter, index: int) -> str:
    return "experts" if adapter.is_moe(index) else "dense"


def _without_tokens(stages: list[Expected]) -> tuple[Expected, ...]:
    """Questions take more tokens through the verification than the texts have."""
    return tuple(replace(stage, tokens=0) if stage.kind.startswith("verify") else stage for stage in stages)
