"""StageTimes: what each stage of a run takes, in seconds; and how the rates of a CPU give it.

planner/schedule.py lists the stages of a run with it, and planner/cost.py adds them up. card_times.py makes it for a
GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..core.rates import Rates
from ..core.rows import spacing
from .work import BlockWork, RunWork, Work

# Seconds by kind of work.
Parts = dict[str, float]


@dataclass(frozen=True)
class WalkTimes:
    """The walk forward and back for sensitivities; an entry for each block. `forward` is walked once or twice
    (`walked_again`)."""

    forward: tuple[Parts, ...]
    head: Parts
    back: tuple[Parts, ...]

    def all(self) -> Iterable[Parts]:
        again = walked_again(len(self.forward))
        return (*self.forward, self.head, *self.back, *(self.forward[index] for index in sorted(again)))


@dataclass(frozen=True)
class StageTimes:
    """Every stage of a run."""

    check: Parts
    # What lies outside the blocks is copied.
    copy: Parts
    embed: Parts
    # None where the method does not walk back.
    walk: WalkTimes | None
    # Each block's own way, and its verification.
    blocks: tuple[Parts, ...]
    verified: tuple[Parts, ...]
    head: Parts

    def by_kind(self) -> Parts:
        """Seconds of the whole run by kind of work."""
        found: Parts = {}
        walked = () if self.walk is None else self.walk.all()
        for part in (self.check, self.copy, self.embed, *walked, *self.blocks, *self.verified, self.head):
            for kind, seconds in part.items():
                found[kind] = found.get(kind, 0.0) + seconds
        return found

    @property
    def block_seconds(self) -> float:
        """The longest stage of a block."""
        return max(map(seconds_of, self.blocks)) + max(map(seconds_of, self.verified))


def seconds_of(parts: Parts) -> float:
    return sum(parts.values())


def walked_again(blocks: int) -> set[int]:
    """The blocks that the walk of calibration/sensitivity.py computes a second time, before it goes back through
    them."""
    apart = spacing(blocks)
    last = (blocks - 1) // apart * apart
    return {index for begin in range(0, last, apart) for index in range(begin, begin + apart - 1)}


def cpu_times(work: RunWork, rates: Rates) -> StageTimes:
    """The counted work of each stage, divided by the rates of its kinds."""
    verification = verified_parts(work.blocks, work.verification(), rates)
    return StageTimes(
        check=work.check().seconds_by(rates),
        copy={},
        embed={},
        walk=_cpu_walk(work, rates),
        blocks=tuple(work.quantizing((block,)).seconds_by(rates) for block in work.blocks),
        verified=verification[:-1],
        head=verification[-1],
    )


def verified_parts(blocks: tuple[BlockWork, ...], whole: Work, rates: Rates) -> tuple[Parts, ...]:
    """Splits a verification into its blocks and, last, its head. Bytes are split by the blocks' parameters."""
    parameters = sum(block.parameters for block in blocks)
    parts = [
        Work(
            forward_flops=whole.forward_flops * _share(blocks, index),
            read_bytes=whole.read_bytes * block.parameters // parameters,
        )
        for index, block in enumerate(blocks)
    ]
    rest = whole.read_bytes - sum(part.read_bytes for part in parts)
    parts.append(Work(head_flops=whole.head_flops, read_bytes=rest))
    return tuple(part.seconds_by(rates) for part in parts)


def _cpu_walk(work: RunWork, rates: Rates) -> WalkTimes | None:
    """RunWork.sensitivity counts five passes a block: one forward, one forward again, three back. Where the second
    forward pass is not made, its share goes to the way back, which then counts four."""
    whole = work.sensitivity()
    if not whole.flops:
        return None
    again = walked_again(work.adapter.n_blocks)

    def passed(index: int, times: int) -> Parts:
        return Work(forward_flops=whole.forward_flops * _share(work.blocks, index) * times / 5).seconds_by(rates)

    blocks = range(work.adapter.n_blocks)
    return WalkTimes(
        forward=tuple(passed(index, 1) for index in blocks),
        head=Work(head_flops=whole.head_flops).seconds_by(rates),
        back=tuple(passed(index, 3 if index in again else 4) for index in blocks),
    )


def _share(blocks: tuple[BlockWork, ...], index: int) -> float:
    """One block's share of the operations of a pass through all blocks."""
    return blocks[index].pass_flops / sum(block.pass_flops for block in blocks)
