"""The time that is left of a whole job: its schedule, corrected by what is measured while it goes on.

A stage to come takes its expected weight times a factor: measured over expected seconds of the finished stages of its
kind, or else of all finished stages, or else 1 where weights are the plan's seconds. The running stage counts as far as
it has come, so that a first block that takes longer than planned moves the estimate before it ends. Nothing here looks
at a clock: whoever asks says what time it is.
"""

from collections import defaultdict
from dataclasses import dataclass

from ..core.schedule import Expected, Schedule

# A kind without finished stages takes the factor of all others only if these were this share of the work: a look at the
# weights on a warm disk says little about computing.
TELLING_SHARE = 0.05
# The running stage is never told to be finished: this share of it is left when it has done all that was expected, and
# this share of its time when it has taken longer than expected.
UNFINISHED = 0.02
LEAST_SECONDS = 1.0  # left, as long as anything is


@dataclass
class _Measured:
    """Finished stages."""

    seconds: float = 0.0
    weight: float = 0.0

    def add(self, seconds: float, weight: float) -> None:
        self.seconds += seconds
        self.weight += weight


@dataclass(frozen=True)
class Left:
    """What a job still takes."""

    seconds: float
    # Whether nothing of consequence is measured yet, so that this is the plan's estimate.
    planned: bool
    # Share of the whole job that is done, in time.
    share: float


class Eta:
    """Follows a job through its schedule."""

    def __init__(self) -> None:
        self._schedule = Schedule()
        self._place = -1  # of the running stage; -1 before the first
        self._began = 0.0
        self._tokens = self._begins = 0
        self._kinds: dict[str, _Measured] = defaultdict(_Measured)
        self._finished = False

    @property
    def at_most(self) -> bool:
        return self._schedule.at_most

    def expect(self, schedule: Schedule) -> None:
        """What is still to come. What was measured stays."""
        self._schedule, self._place = schedule, -1

    def begin(self, task: str, block: int | None, now: float) -> None:
        """The task belongs to the running stage, or to the next one that has it; the stages between were skipped, as
        in a resumed run. A task that no later stage has belongs to the running one."""
        stages = self._schedule.stages
        present = stages[self._place] if self._place >= 0 else None
        found = next((n for n in range(max(0, self._place), len(stages)) if _has(stages[n], task, block)), None)
        if found is not None and stages[found] is not present:
            self._close(now)
            self._place, self._began, self._tokens, self._begins = found, now, 0, 0
        self._begins += 1

    def advance(self, tokens: int) -> None:
        self._tokens += tokens

    def finish(self, now: float) -> None:
        """The job is done."""
        self._close(now)
        self._place, self._finished = len(self._schedule.stages), True

    def left(self, now: float) -> Left | None:
        """None where nothing is known."""
        if self._finished:
            return Left(0.0, False, 1.0)
        stages, place = self._schedule.stages, self._place
        if not stages:
            return None
        known = {kind: _Measured(m.seconds, m.weight) for kind, m in self._kinds.items()}
        here = _Running(0.0, 0.0, moves=False)
        if place >= 0:
            found = self._running(stages[place], self._factors(known).of(stages[place].kind), now)
            if found is None:
                return None
            here = found
            if here.moves:
                known.setdefault(stages[place].kind, _Measured()).add(here.total, stages[place].weight)
        factors = self._factors(known)
        coming = factors.seconds(stages[place + 1 :])
        behind = factors.seconds(stages[: max(0, place)])
        if coming is None or behind is None:
            return None
        seconds = max(LEAST_SECONDS, coming + here.left)
        done = behind + here.total - here.left
        return Left(seconds, not self._tells(known), done / (done + seconds))

    def _running(self, stage: Expected, factor: float | None, now: float) -> "_Running | None":
        """How far the running stage has come. None where nothing tells."""
        spent, share = now - self._began, self._share(stage)
        if share:
            total = spent / share if factor is None else (1 - share) * factor * stage.weight + spent
            return _Running(total, (1 - share) * total, moves=stage.weight > 0)
        if factor is None:
            return _Running(spent, 0.0, moves=False) if not stage.weight else None
        total = max(factor * stage.weight, spent * (1 + UNFINISHED))
        return _Running(total, total - spent, moves=stage.weight > 0 and spent > factor * stage.weight)

    def _share(self, stage: Expected) -> float:
        """Of the running stage, by its tokens or its tasks; 0 where neither tells."""
        if stage.tokens:
            return min(self._tokens / stage.tokens, 1 - UNFINISHED)
        return min((self._begins - 1) / stage.begins, 1 - UNFINISHED) if stage.begins else 0.0

    def _tells(self, known: dict[str, _Measured]) -> bool:
        """Whether what is measured tells about work of all kinds."""
        measured = sum(m.weight for m in known.values())
        coming = sum(stage.weight for stage in self._schedule.stages[self._place + 1 :])
        return measured > 0 and measured >= TELLING_SHARE * (measured + coming)

    def _factors(self, known: dict[str, _Measured]) -> "_Factors":
        common = 1.0 if self._schedule.in_seconds else None
        if self._tells(known):
            common = sum(m.seconds for m in known.values()) / sum(m.weight for m in known.values())
        return _Factors(known, common)

    def _close(self, now: float) -> None:
        if 0 <= self._place < len(self._schedule.stages):
            stage = self._schedule.stages[self._place]
            # A stage that the plan takes no time for tells nothing about others.
            if stage.weight:
                self._kinds[stage.kind].add(now - self._began, stage.weight)


@dataclass(frozen=True)
class _Running:
    """The running stage."""

    # Seconds.
    total: float
    left: float
    # Whether it tells about others of its kind.
    moves: bool


@dataclass(frozen=True)
class _Factors:
    """Measured over expected seconds, by kind."""

    known: dict[str, _Measured]
    # Of kinds that nothing is measured of. None where nothing tells.
    common: float | None

    def of(self, kind: str) -> float | None:
        own = self.known.get(kind)
        return own.seconds / own.weight if own is not None and own.weight else self.common

    def seconds(self, stages: tuple[Expected, ...]) -> float | None:
        """What these stages take. None where nothing tells."""
        total = 0.0
        for stage in stages:
            factor = self.of(stage.kind)
            if factor is None and stage.weight:
                return None
            total += (factor or 0.0) * stage.weight
        return total


def _has(stage: Expected, task: str, block: int | None) -> bool:
    return task in stage.tasks and (bool(stage.begins) or stage.block == block)
