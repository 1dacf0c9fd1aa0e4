"""When a run commits: at once where that costs nothing, every few minutes where rows are gigabytes, and never before
the rows that a commit rests on are on the disk."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.checkpoint.keeper import AT_ONCE_SECONDS, MOST_LOST_SECONDS, Keeper
from onecard.core.rates import DISK_BYTES_PER_SECOND


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Writing:
    """Stands for the future of a thread that writes: it ends when the clock says so."""

    clock: Clock
    ends: float
    commit: Callable[[], None]
    committed: bool = False

    def done(self) -> bool:
        if self.clock.now >= self.ends and not self.committed:
            self.committed = True
            now, self.clock.now = self.clock.now, self.ends  # the thread commits when it has written
            self.commit()
            self.clock.now = now
        return self.committed

    def result(self) -> None:
        self.clock.now = max(self.clock.now, self.ends)
        assert self.done()


@dataclass
class Store:
    """Stands for Activations: bytes and time, no rows."""

    clock: Clock
    nbytes: int
    on_disk: set[int] = field(default_factory=set)
    in_memory: set[int] = field(default_factory=set)
    writing: list[Writing] = field(default_factory=list)

    def bytes_entering(self, block: int) -> int:
        return self.nbytes

    def settle(self, block: int) -> None:
        assert block in self.in_memory
        self.clock.now += self.nbytes / DISK_BYTES_PER_SECOND
        self.on_disk.add(block)

    def keep(self, block: int, *, commit: Callable[[], None]) -> Writing:
        assert block in self.in_memory

        def both() -> None:
            self.on_disk.add(block)
            commit()

        self.writing.append(Writing(self.clock, self.clock.now + self.nbytes / DISK_BYTES_PER_SECOND, both))
        return self.writing[-1]

    def release(self, block: int) -> None:
        self.in_memory.discard(block)

    def drop(self, block: int) -> None:
        self.in_memory.discard(block)
        self.on_disk.discard(block)

    def remove_files(self, block: int) -> None:
        self.on_disk.discard(block)


@dataclass
class Commits:
    """Stands for WorkDir: what was committed, and when. A commit of a stage rests on the rows of `entered[stage]`."""

    clock: Clock
    store: Store
    entered: dict[int, int | None]
    at: list[tuple[float, int]] = field(default_factory=list)

    def commit(self, number: int) -> None:
        block = self.entered[number]
        assert block is None or block in self.store.on_disk, (number, block)
        self.at.append((self.clock.now, number))


def most_lost(stages: list[float], nbytes: int) -> tuple[float, Commits]:
    """(the most seconds of work that a kill loses, the commits). Stages: embed, blocks, move, verify."""
    clock = Clock()
    store = Store(clock, nbytes)
    enters = [*range(len(stages) - 2), None, None]
    workdir = Commits(clock, store, dict(enumerate(enters, 1)))
    keeper = Keeper(store, workdir, None, clock=clock)  # type: ignore[arg-type]
    ended: dict[int, float] = {0: 0.0}
    for number, (seconds, block) in enumerate(zip(stages, enters, strict=True), 1):
        clock.now += seconds
        ended[number] = clock.now
        store.in_memory |= set() if block is None else {block}
        keeper.finished(number, block)
    numbers = [number for _, number in workdir.at]
    assert numbers == sorted(numbers)
    assert numbers[-1] == len(stages)
    lost, since = 0.0, 0.0
    for when, number in workdir.at:
        lost, since = max(lost, when - since), ended[number]
    return lost, workdir


BLOCKS = st.lists(st.floats(0.1, 200.0), min_size=1, max_size=60)


@settings(max_examples=200)
@given(blocks=BLOCKS, head=st.floats(0.1, 60.0), gigabytes=st.integers(1, 40))
def test_a_kill_loses_little(blocks: list[float], head: float, gigabytes: int) -> None:
    lost, _ = most_lost([1.0, 20.0, *blocks, 1.0, head], gigabytes * 10**9)
    writing = gigabytes * 1e9 / DISK_BYTES_PER_SECOND
    # Blocks differ here at random: the next one is taken to last as long as the last one did. One that lasts longer is
    # lost too, and so is what waits for the thread.
    assert lost <= MOST_LOST_SECONDS + max(blocks) + writing


@settings(max_examples=50)
@given(block=st.floats(0.1, 140.0), count=st.integers(1, 60), gigabytes=st.integers(2, 40))
def test_like_blocks_lose_five_minutes_at_most(block: float, count: int, gigabytes: int) -> None:
    lost, workdir = most_lost([1.0, 20.0, *[block] * count, 1.0, 5.0], gigabytes * 10**9)
    writing = gigabytes * 1e9 / DISK_BYTES_PER_SECOND
    assert lost <= max(MOST_LOST_SECONDS, 2 * block + 2 * writing) + 1e-6
    if block * count > 2 * MOST_LOST_SECONDS:
        assert len(workdir.at) < count + 4 or block + writing > MOST_LOST_SECONDS / 2


@settings(max_examples=20)
@given(blocks=BLOCKS)
def test_small_rows_are_committed_with_every_stage(blocks: list[float]) -> None:
    stages = [1.0, 20.0, *blocks, 1.0, 5.0]
    lost, workdir = most_lost(stages, int(AT_ONCE_SECONDS * DISK_BYTES_PER_SECOND) // 2)
    assert [number for _, number in workdir.at] == list(range(1, len(stages) + 1))
    assert lost <= max(stages) + AT_ONCE_SECONDS + 1e-6
