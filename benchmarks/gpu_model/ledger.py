"""The ledger: what is counted, by stage and by source line; and two clocks, of the host and of the card.

A launch costs the host some microseconds, and the card begins when it is free. A synchronisation lets the host wait
for the card. So a stretch of code takes the longer of both where they overlap, and their sum where they do not.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.core import units

from . import rates

ROOT = f"{Path(units.__file__).parent.parent}/"
# Calls of torch go through the first. A virtual environment may lie in the project's folder.
SKIPPED = ("models/watched.py", "/gpu_model/", "/site-packages/")
# Seconds in which a thread has nothing to do until another has.
WAITS = "waits"
# (stage, block or None)
Key = tuple[str, int | None]


def line() -> str:
    """The innermost line of the project's code that is running: `quantize/refine.py:54`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not any(part in name for part in SKIPPED):
            return f"{name[len(ROOT) :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@dataclass
class Stage:
    """What one stage has cost. `counts`: (what, line) -> amount."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: float = 0.0
    peak_bytes: int = 0

    def total(self, what: str) -> float:
        return sum(amount for (kind, _), amount in self.counts.items() if kind == what)


@dataclass
class Worker:
    """A thread beside the main one."""

    clock: float = 0.0


class Ledger:
    """Counts into the stage that is open. The host's clock is that of the main thread; other threads have their own,
    and what they do costs the main thread nothing until it asks for it (threads.py)."""

    def __init__(self, disk: float = rates.DISK) -> None:
        self.disk = disk
        self.stages: dict[Key, Stage] = {}
        self.host = self.card = 0.0  # clocks
        self.host_busy = self.card_busy = 0.0
        self.syncs = 0
        self.live: dict[int, list[int]] = {}  # storage -> [tensors, bytes]
        self.live_bytes = self.peak = 0
        self.worker: Worker | None = None  # the thread whose work is being done; None: the main thread's own
        self.lane: Any = None  # the stream of streams.py that copies go to, if it is not the card's own
        self.counts: Counter[tuple[str, str]] = Counter()
        self.key: Key = ("start", None)
        self._since = 0.0
        self.begin("start")

    @property
    def is_main(self) -> bool:
        return self.worker is None

    @property
    def now(self) -> float:
        return max(self.host, self.card)

    @property
    def clock(self) -> float:
        """Of the thread that asks."""
        return self.host if self.worker is None else self.worker.clock

    def begin(self, name: str, block: int | None = None) -> None:
        """Close the stage that is open, and open another; a stage may be opened again."""
        self._close()
        self.key = (name, block)
        stage = self.stages.setdefault(self.key, Stage())
        self.counts, self.peak, self._since = stage.counts, self.live_bytes, self.now

    def _close(self) -> None:
        stage = self.stages.get(self.key)
        if stage is not None:
            stage.seconds += self.now - self._since
            stage.peak_bytes = max(stage.peak_bytes, self.peak)

    def finish(self) -> dict[Key, Stage]:
        self.begin("end")
        return {key: stage for key, stage in self.stages.items() if stage.counts}

    def add(self, what: str, amount: float = 1.0, where: str | None = None) -> None:
        # What is remembered of a call (memory.py) must not hold what other threads did meanwhile.
        counts = self.counts if self.is_main else self.stages[self.key].counts
        counts[what, where or line()] += amount  # type: ignore[assignment]

    def wait(self, seconds: float) -> None:
        """The thread is busy."""
        if self.worker is None:
            self.host += seconds
            self.host_busy += seconds
        else:
            self.worker.clock += seconds

    def wait_until(self, time: float) -> None:
        """The thread needs what is there from then on."""
        if time > self.clock:
            if self.is_main:
                self.add(WAITS, time - self.host)
            self.wait(time - self.clock)

    def view(self, where: str) -> None:
        self.add("views", 1, where)
        self.add("host seconds", rates.VIEW_SECONDS, where)
        self.wait(rates.VIEW_SECONDS)

    def launch(self, seconds: float, where: str) -> None:
        """A kernel that takes the card `seconds`."""
        self.add("launches", 1, where)
        self.add("host seconds", rates.LAUNCH_SECONDS, where)
        self.add("card seconds", seconds, where)
        self.wait(rates.LAUNCH_SECONDS)
        self.card = max(self.card, self.clock) + seconds
        self.card_busy += seconds

    def sync(self, kind: str, where: str) -> None:
        """The thread waits for the card."""
        self.add(f"sync {kind}", 1, where)
        self.add("syncs", 1, where)
        if self.is_main:
            self.syncs += 1
            self.host = self.card = self.now

    def copy(self, nbytes: int, way: str, pinned: bool, where: str) -> None:
        """A copy between host and card, `way`: 'to card' or 'from card'. From pageable memory the host waits."""
        self.add(f"{way} {'pinned' if pinned else 'pageable'}", nbytes, where)
        self.add("launches", 1, where)
        seconds = nbytes / (rates.PINNED if pinned else rates.PAGEABLE)
        self.add("copy seconds" if self.lane is None else "copy seconds beside", seconds, where)
        self.wait(rates.LAUNCH_SECONDS)
        if pinned and self.lane is not None:
            self.lane.clock = max(self.lane.clock, self.clock) + seconds
        elif pinned:
            self.card = max(self.card, self.clock) + seconds
            self.card_busy += seconds
        else:
            self.sync("copy", where)
            self.wait(seconds)
            if self.is_main:
                self.card = self.host

    def compute(self, nbytes: int) -> None:
        """The CPU's own operation on so many bytes."""
        self.add("bytes on the CPU", nbytes)
        self.add("CPU seconds" if self.is_main else "CPU seconds behind", nbytes / rates.HOST_MEMORY)
        self.wait(nbytes / rates.HOST_MEMORY)

    def file(self, nbytes: int, way: str) -> None:
        """Bytes read from a file or written to one. What another thread does takes the disk, and not the host's time:
        `whole.py` says where that is too much."""
        self.add(way, nbytes)
        self.add("disk seconds" if self.is_main else "disk seconds behind", nbytes / self.disk)
        self.wait(nbytes / self.disk)

    # --- device memory

    def hold(self, storage: int, nbytes: int) -> None:
        entry = self.live.setdefault(storage, [0, nbytes])
        if not entry[0]:
            self.live_bytes += nbytes
            self.peak = max(self.peak, self.live_bytes)
        entry[0] += 1

    def release(self, storage: int) -> None:
        entry = self.live.get(storage)
        if entry is not None:
            entry[0] -= 1
            if not entry[0]:
                self.live_bytes -= entry[1]
                del self.live[storage]
