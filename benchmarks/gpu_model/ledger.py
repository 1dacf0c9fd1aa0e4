"""The ledger: what is counted, by stage and by source line; and two clocks, of the host and of the card.

A launch costs the host some microseconds, and the card begins when it is free. A synchronisation lets the host wait
for the card. So a stretch of code takes the longer of both where they overlap, and their sum where they do not.
"""

import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from onecard.core import units

from . import rates

ROOT = f"{Path(units.__file__).parent.parent}/"
# Calls of torch go through it.
SKIPPED = "models/watched.py"
# (stage, block or None)
Key = tuple[str, int | None]


def line() -> str:
    """The innermost line of the project's code that is running: `quantize/refine.py:54`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.endswith(SKIPPED) and "gpu_model" not in name:
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


class Ledger:
    """Counts into the stage that is open."""

    def __init__(self, disk: float = rates.DISK) -> None:
        self.disk = disk
        self.stages: dict[Key, Stage] = {}
        self.host = self.card = 0.0  # clocks
        self.host_busy = self.card_busy = 0.0
        self.syncs = 0
        self.live: dict[int, list[int]] = {}  # storage -> [tensors, bytes]
        self.live_bytes = self.peak = 0
        self.pinned_bytes = 0
        self.main = threading.get_ident()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.key: Key = ("start", None)
        self._since = 0.0
        self.begin("start")

    @property
    def now(self) -> float:
        return max(self.host, self.card)

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
        self.counts[what, where or line()] += amount

    def wait(self, seconds: float) -> None:
        """The host is busy."""
        self.host += seconds
        self.host_busy += seconds

    def view(self, where: str) -> None:
        self.counts["views", where] += 1
        self.counts["host seconds", where] += rates.VIEW_SECONDS
        self.wait(rates.VIEW_SECONDS)

    def launch(self, seconds: float, where: str) -> None:
        """A kernel that takes the card `seconds`."""
        self.counts["launches", where] += 1
        self.counts["host seconds", where] += rates.LAUNCH_SECONDS
        self.counts["card seconds", where] += seconds
        self.wait(rates.LAUNCH_SECONDS)
        self.card = max(self.card, self.host) + seconds
        self.card_busy += seconds

    def sync(self, kind: str, where: str) -> None:
        """The host waits for the card."""
        self.counts[f"sync {kind}", where] += 1
        self.counts["syncs", where] += 1
        self.syncs += 1
        self.host = self.card = self.now

    def copy(self, nbytes: int, way: str, pinned: bool, where: str) -> None:
        """A copy between host and card, `way`: 'to card' or 'from card'. From pageable memory the host waits."""
        self.counts[f"{way} {'pinned' if pinned else 'pageable'}", where] += nbytes
        self.counts["launches", where] += 1
        seconds = nbytes / (rates.PINNED if pinned else rates.PAGEABLE)
        self.counts["copy seconds", where] += seconds
        self.wait(rates.LAUNCH_SECONDS)
        if pinned:
            self.card = max(self.card, self.host) + seconds
            self.card_busy += seconds
        else:
            self.sync("copy", where)
            self.wait(seconds)
            self.card = self.host

    def compute(self, nbytes: int) -> None:
        """The CPU's own operation on so many bytes."""
        where = line()
        self.counts["bytes on the CPU", where] += nbytes
        self.counts["CPU seconds", where] += nbytes / rates.HOST_MEMORY  # type: ignore[assignment]
        if threading.get_ident() == self.main:
            self.wait(nbytes / rates.HOST_MEMORY)

    def file(self, nbytes: int, way: str) -> None:
        """Bytes read from a file or written to one. What another thread does takes the disk, and not the host's time:
        `whole.py` says where that is too much."""
        where, seconds = line(), nbytes / self.disk
        self.counts[way, where] += nbytes
        if threading.get_ident() == self.main:
            self.counts["disk seconds", where] += seconds  # type: ignore[assignment]
            self.wait(seconds)
        else:
            self.counts["disk seconds behind", where] += seconds  # type: ignore[assignment]

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
