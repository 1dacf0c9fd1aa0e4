"""Stand-ins for threads and for a card's streams: each has a clock of its own.

What a thread is given to do is done at once, so that a count comes out alike whatever else the machine does. It takes
that thread's time, which begins when the thread is free. Whoever asks for its result goes on when it is there.
Copies on a stream of their own take that stream's time; an event says who waits for whom.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .ledger import Ledger, Worker


@dataclass
class _Event:
    ledger: Ledger
    time: float = 0.0

    def synchronize(self) -> None:
        self.ledger.wait_until(self.time)

    def wait(self, stream: Any = None) -> None:
        _Stream.computing(self.ledger).wait_event(self)


class _Stream:
    """A stream beside the card's own, whose clock is the ledger's."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.clock = ledger, 0.0

    @classmethod
    def computing(cls, ledger: Ledger) -> "_Computing":
        return _Computing(ledger)

    def wait_stream(self, other: "_Stream") -> None:
        self.clock = max(self.clock, other.clock)

    def wait_event(self, event: _Event) -> None:
        self.clock = max(self.clock, event.time)

    def record_event(self, event: _Event | None = None) -> _Event:
        found = event or _Event(self.ledger)
        found.time = max(self.clock, self.ledger.clock)
        return found

    def synchronize(self) -> None:
        self.ledger.wait_until(self.clock)


class _Computing(_Stream):
    """The stream on which kernels run."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @property
    def clock(self) -> float:  # type: ignore[override]
        return self.ledger.card

    @clock.setter
    def clock(self, time: float) -> None:
        self.ledger.card = time


def stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, what takes its place)."""

    @contextmanager
    def stream(used: _Stream) -> Iterator[None]:
        before, ledger.lane = ledger.lane, None if isinstance(used, _Computing) else used
        try:
            yield
        finally:
            ledger.lane = before

    workers: WeakKeyDictionary[ThreadPoolExecutor, Worker] = WeakKeyDictionary()
    running: list[threading.Thread] = []
    current_thread, result = threading.current_thread, Future.result

    @contextmanager
    def of(worker: Worker) -> Iterator[None]:
        worker.clock, before = max(worker.clock, ledger.clock), ledger.worker
        ledger.worker = worker
        try:
            yield
        finally:
            ledger.worker = before

    def start(thread: threading.Thread) -> None:
        running.append(thread)
        try:
            with of(Worker()):
                thread.run()
        finally:
            running.pop()

    def submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        worker, future = workers.setdefault(pool, Worker()), Future[Any]()
        with of(worker):
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
        future.done_at = worker.clock  # type: ignore[attr-defined]
        return future

    def waited_result(future: Any, timeout: float | None = None) -> Any:
        found = result(future, timeout)
        ledger.wait_until(getattr(future, "done_at", 0.0))
        return found

    return [
        (torch.cuda, "Stream", lambda *_, **__: _Stream(ledger)),
        (torch.cuda, "Event", lambda *_, **__: _Event(ledger)),
        (torch.cuda, "stream", stream),
        (torch.cuda, "current_stream", lambda *_: _Computing(ledger)),
        (threading.Thread, "start", start),
        (threading, "current_thread", lambda: running[-1] if running else current_thread()),
        (ThreadPoolExecutor, "submit", submit),
        (Future, "result", waited_result),
    ]
