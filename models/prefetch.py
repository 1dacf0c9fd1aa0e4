"""Read-ahead: threads read what a walk will need next, while it computes.

A thread only reads, into memory that a GPU can copy from by itself (pinned). The walk's own thread sends the bytes to
the device when it takes them, on the stream on which it computes: a block of 4.4 GB is there in a tenth of a second,
so a stream for copies would hide little, and the device need not hold a block more. torch keeps and reuses pinned
memory, and waits for copies out of it before it gives it away again.

At most one block that is not taken yet is in memory. Threads begin when there is something to read and end when there
is not; none outlives its ReadAhead by more than one read, and none keeps the process alive.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence

import torch

from ..core.lane import pinned_size
from ..core.tensors import Allocate, Stored, TensorSource, pageable
from .slabs import Key

# A second thread reads while the first waits for its disk, or copies. More threads, or advice to the system's cache,
# gave nothing more.
THREADS = 2
# How often a walk that waits for a read looks about: a Ctrl-C whose signal went to another thread does not wake it.
LOOK_SECONDS = 1.0
# At the end, how long a thread may take for its last read.
PATIENCE_SECONDS = 5.0


def pinned(nbytes: int) -> torch.Tensor:
    """Memory that a GPU copies from by itself, uint8. torch rounds its size up to a power of two."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def pinned_bytes(slabs: Iterable[int], threads: int = THREADS) -> int:
    """The most pinned memory that reading ahead takes, given the bytes of the slabs of the largest block."""
    rounded = [pinned_size(size) for size in slabs]
    return sum(rounded) + threads * max(rounded, default=0)


class ReadAhead:
    """What is read ahead of one walk, in the order in which it is expected."""

    def __init__(self, source: TensorSource, allocate: Allocate = pageable, threads: int = THREADS) -> None:
        self._state = _State(source, allocate, threads)
        weakref.finalize(self, self._state.stop)  # at the exit of the process, too

    def expect(self, block: int, keys: Sequence[Key], most_bytes: int) -> None:
        """Begin to read a block's slabs, behind those of the block that was expected last. Blocks before that are given
        up: a walk goes from one to the next. `most_bytes`: no further slab is begun while so many bytes wait."""
        self._state.expect(block, keys, most_bytes)

    def take(self, key: Key) -> Stored:
        """The slab. A read that has begun is waited for; what no thread has begun is read here. So nothing waits for a
        thread that waits. Raises what the reading raised."""
        state = self._state
        return state.take(key) or state.source.stored(*key, state.allocate)


class _State:
    """All that the threads share. It doesn't know its ReadAhead, so that can be freed while a thread reads."""

    def __init__(self, source: TensorSource, allocate: Allocate, threads: int) -> None:
        self.source, self.allocate, self.threads = source, allocate, threads
        self.changed = threading.Condition()
        # By block, what no thread has begun, in order; an entry stays until all of the block was taken.
        self.waiting: dict[int, list[Key]] = {}
        self.left: dict[int, int] = {}  # by block, how many were not taken
        self.begun: dict[Key, int] = {}  # what a thread reads now, and its block
        self.done: dict[Key, tuple[int, Stored | BaseException]] = {}
        self.most_bytes = self.held_bytes = 0
        self.running: set[threading.Thread] = set()

    def expect(self, block: int, keys: Sequence[Key], most_bytes: int) -> None:
        with self.changed:
            if block in self.waiting:
                return
            for old in list(self.waiting)[:-1]:
                self._give_up(old)
            # What a thread still reads for this block, given up meanwhile, is not read again.
            self.waiting[block] = [key for key in keys if key not in self.begun]
            self.left[block] = len(keys)
            self.most_bytes = most_bytes
            self._begin()

    def take(self, key: Key) -> Stored | None:
        with self.changed:
            for block, keys in self.waiting.items():
                if key in keys:
                    keys.remove(key)
                    self._taken(block)
                    return None
            while not self.changed.wait_for(lambda: key not in self.begun, LOOK_SECONDS):
                pass
            if key not in self.done:
                return None
            block, found = self.done.pop(key)
            self._taken(block)
            if isinstance(found, BaseException):
                raise found
            self.held_bytes -= found.nbytes
            self._begin()
            return found

    def stop(self) -> None:
        """Nothing further is read. A signal may have struck the walk's thread while it took the lock: then there is
        nothing to wait for."""
        if not self.changed.acquire(timeout=PATIENCE_SECONDS):
            return
        try:
            for block in list(self.waiting):
                self._give_up(block)
            last = self.running - {threading.current_thread()}
        finally:
            self.changed.release()
        for thread in last:
            thread.join(PATIENCE_SECONDS)

    def _taken(self, block: int) -> None:
        self.left[block] -= 1
        if not self.left[block]:
            del self.waiting[block], self.left[block]

    def _give_up(self, block: int) -> None:
        del self.waiting[block], self.left[block]
        for key in [key for key, (of, _) in self.done.items() if of == block]:
            _, found = self.done.pop(key)
            self.held_bytes -= 0 if isinstance(found, BaseException) else found.nbytes

    def _begin(self) -> None:
        """As many threads as there is work for."""
        left = sum(map(len, self.waiting.values()))
        while left and len(self.running) < self.threads and self.held_bytes < self.most_bytes:
            thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
            self.running.add(thread)
            left -= 1
            thread.start()

    def _next(self) -> Key | None:
        if self.held_bytes >= self.most_bytes:
            return None
        for block, keys in self.waiting.items():
            if keys:
                self.begun[keys[0]] = block
                return keys.pop(0)
        return None

    def _work(self) -> None:
        while True:
            with self.changed:
                key = self._next()
                if key is None:
                    self.running.discard(threading.current_thread())
                    return
            found: Stored | BaseException
            try:
                found = self.source.stored(*key, self.allocate)
            except BaseException as error:
                found = error
            with self.changed:
                block = self.begun.pop(key)
                if block in self.waiting:  # it may have been given up meanwhile
                    self.done[key] = block, found
                    self.held_bytes += 0 if isinstance(found, BaseException) else found.nbytes
                del found
                self.changed.notify_all()
