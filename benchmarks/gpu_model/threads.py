"""Stand-ins for threads and for a card's streams: each has a clock of its own.

What a thread does is counted, and takes that thread's time. Whoever asks for its result goes on when it is there.
Copies on a stream of their own take that stream's time; an event says who waits for whom.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .card import Asked, Counting
from .ledger import Ledger


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

    run, submit, result = threading.Thread.run, ThreadPoolExecutor.submit, Future.result

    def counted_run(thread: threading.Thread) -> None:
        with Asked(ledger), Counting(ledger):
            run(thread)

    def counted_submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        asked, done = ledger.clock, [0.0]

        def work() -> Any:
            ledger.thread.clock = max(ledger.clock, asked)
            try:
                return function(*args, **kwargs)
            finally:
                done[0] = ledger.clock

        future = submit(pool, work)
        future.done_at = done  # type: ignore[attr-defined]
        return future

    def counted_result(future: Any, timeout: float | None = None) -> Any:
        found = result(future, timeout)
        ledger.wait_until(getattr(future, "done_at", [0.0])[0])
        return found

    return [
        (torch.cuda, "Stream", lambda *_, **__: _Stream(ledger)),
        (torch.cuda, "Event", lambda *_, **__: _Event(ledger)),
        (torch.cuda, "stream", stream),
        (torch.cuda, "current_stream", lambda *_: _Computing(ledger)),
        (threading.Thread, "run", counted_run),
        (ThreadPoolExecutor, "submit", counted_submit),
        (Future, "result", counted_result),
    ]
