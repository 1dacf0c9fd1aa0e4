"""What all parts of gpu.py share: what was asked, processes of their own with a time limit, and tables.

Each run of onecard has a process of its own, so that peaks of memory are its own and it can be killed. On a card it
starts anew; on a CPU, where the tests go this way, it is a fork of this process, which has imported everything.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a fork finds imported.
import transformers.models.llama4.modeling_llama4  # noqa: F401

import onecard.pipeline  # noqa: F401
from onecard.cli import main


@dataclass(frozen=True)
class Setup:
    """`until`: the moment, on time.monotonic's clock, when all work must have ended."""

    device: str
    small: bool
    folder: Path
    until: float

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def place(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass
class Checks:
    """What was checked, in order; a check is true, or false with what was seen."""

    rows: list[tuple[str, bool, str]] = field(default_factory=list)

    def add(self, name: str, held: bool, seen: str) -> None:
        self.rows.append((name, held, seen))

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(held for _, held, _ in self.rows)

    def facts(self) -> list[dict[str, Any]]:
        return [{"check": name, "ok": held, "seen": seen} for name, held, seen in self.rows]

    def table(self) -> str:
        rows = [(name, "yes" if held else "**NO**", seen) for name, held, seen in self.rows]
        return table(("check", "holds", "seen"), rows)


class TimeUpError(Exception):
    """A part took longer than it may."""


def in_child(setup: Setup, work: Callable[..., None], *given: Any, seconds: float | None = None) -> tuple[int, float]:
    """Runs `work(*given)` in a process of its own. Returns its exit status, and the seconds it ran; -9 if it was killed
    after `seconds`. Raises TimeUpError, and kills it, when the time of the whole part is over."""
    context = multiprocessing.get_context("fork" if setup.on_cpu else "spawn")
    process = context.Process(target=work, args=given)
    began = time.monotonic()
    process.start()  # type: ignore[attr-defined]
    process.join(setup.left() if seconds is None else min(seconds, setup.left()))  # type: ignore[attr-defined]
    if process.exitcode is None:  # type: ignore[attr-defined]
        process.kill()  # type: ignore[attr-defined]
        process.join()  # type: ignore[attr-defined]
        if not setup.left():
            raise TimeUpError
    return process.exitcode, time.monotonic() - began  # type: ignore[attr-defined]


def command(args: list[str], log: Path) -> None:
    """`onecard ARGS` in this process, which ends with it. What it says goes behind `log`."""
    said = log.open("a")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(said.fileno(), stream.fileno())
    sys.argv = ["onecard", *args]
    main()


def run(setup: Setup, args: list[str], log: Path, seconds: float | None = None) -> tuple[int, float]:
    """`onecard ARGS --device ...` in a process of its own, as `in_child` does it."""
    return in_child(setup, command, [*args, "--device", setup.device], log, seconds=seconds)


def needed(setup: Setup, args: list[str], log: Path) -> float:
    """The seconds of a run that must end well. Raises RuntimeError with the end of what it said."""
    status, seconds = run(setup, args, log)
    if status:
        raise RuntimeError(f"onecard {' '.join(args)} ended with {status}:\n{log.read_text()[-2000:]}")
    return seconds


def read_record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "onecard.json").read_text())
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """As docs/benchmarks.md has them."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
