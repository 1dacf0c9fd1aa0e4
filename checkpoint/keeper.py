"""Keeper: commits the stages of a run, so that a kill loses little and commits cost little.

A commit rests on the rows that enter the next block, and those lie in memory. Where they are written in an instant,
every stage is committed when it ends. Where they are gigabytes, the thread that writes them (activations.py) commits
every few minutes, while the next blocks compute. A resumed run goes on from the last commit and ends in the same bytes.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ..core.rates import DISK_BYTES_PER_SECOND
from .activations import Activations
from .workdir import WorkDir

# The most work that a kill may lose, if a block and the writing of its rows take less.
MOST_LOST_SECONDS = 300.0
# Rows that are written in less than this are written at every commit.
AT_ONCE_SECONDS = 1.0


class Keeper:
    """Commits to `workdir` with the rows of `store`. `resting_on`: the block whose rows the state of a resumed run
    rests on. `written` returns when all else that the finished stages have to write is on the disk. `clock`: seconds.
    """

    def __init__(
        self,
        store: Activations,
        workdir: WorkDir,
        resting_on: int | None,
        written: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.workdir, self.written, self.clock = store, workdir, written, clock
        # The block whose rows lie in files that the state rests on, and the one whose rows are being written.
        self._durable = resting_on
        self._pending: tuple[int, Future[None]] | None = None
        # The last finished stage that is neither committed nor about to be, and the block that its rows enter.
        self._waiting: tuple[int, int] | None = None
        self._last = self._stage_began = clock()

    def finished(self, number: int, block: int | None) -> None:
        """Stage `number` has ended, and the rows that enter `block` lie in the store; None where it leaves no rows.
        Raises what a commit in the thread raised."""
        now = self.clock()
        seconds, self._stage_began = now - self._stage_began, now
        if self._pending is not None and self._pending[1].done():
            self._wait()
        if block is None:
            self._settle_waiting()
            self.written()
            self.workdir.commit(number)
            self._last = now
            return
        if block:
            self._let_go(block - 1)
        self._waiting = (number, block)
        writing = self.store.bytes_entering(block) / DISK_BYTES_PER_SECOND
        if writing <= AT_ONCE_SECONDS:
            self._settle_waiting()
            self._last = now
        elif now - self._last + seconds + writing > MOST_LOST_SECONDS:
            self._wait()
            self._waiting = None
            self._pending = (block, self.store.keep(block, commit=partial(self._commit, number, block)))
            self._last = now

    def _let_go(self, block: int) -> None:
        """The rows that entered a finished block are not read again, except from files by a resumed run."""
        if block == self._durable or (self._pending is not None and block == self._pending[0]):
            self.store.release(block)
        else:
            self.store.drop(block)

    def _settle_waiting(self) -> None:
        self._wait()
        if self._waiting is not None:
            (number, block), self._waiting = self._waiting, None
            self.store.settle(block)
            self._commit(number, block)

    def _commit(self, number: int, block: int) -> None:
        self.written()
        self.workdir.commit(number)
        if self._durable not in (None, block):
            self.store.remove_files(self._durable)
        self._durable = block

    def _wait(self) -> None:
        if self._pending is not None:
            (_, future), self._pending = self._pending, None
            future.result()
