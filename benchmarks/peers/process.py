"""Measure a program as a whole process: wall and CPU time, and the largest resident set of it or of a child."""

import os
import re
import resource
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1
# Every tool here is faster on one thread with matrices this small, and other machines give comparable figures.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Measured:
    code: int
    seconds: float
    # Of the program and of its children.
    cpu_seconds: float
    peak_rss_bytes: int


def environment(threads: int, ours: bool) -> dict[str, str]:
    """This process's environment with the number of threads set, and for a peer without our PYTHONPATH."""
    env = (
        os.environ
        | dict.fromkeys(THREAD_VARIABLES, str(threads))
        | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )
    if not ours:
        env.pop("PYTHONPATH", None)
    return env


def _tree(pid: int) -> list[int]:
    """A process and its descendants that still run."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [p for child in (thread / "children").read_text().split() for p in _tree(int(child))]
        except OSError:
            continue
    return found


def high_water(pid: int | str) -> int:
    """VmHWM in bytes; 0 when the process is gone. On Linux ru_maxrss would include the parent's peak."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(command: list[str], env: dict[str, str], log: Path, timeout_seconds: float) -> Measured:
    """Run a command. VmHWM only grows, so polling misses only what the last POLL_SECONDS add.

    A peer's script also writes its own VmHWM at its end. ru_maxrss would include this process's own peak."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    over = threading.Event()
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

        def watch() -> None:
            nonlocal peak
            while not over.wait(POLL_SECONDS):
                peak = max([peak, *map(high_water, _tree(process.pid))])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            for pid in reversed(_tree(process.pid)):
                os.kill(pid, 9)
            code = process.wait()
        seconds = time.monotonic() - began
        over.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(code, seconds, cpu_seconds, peak)
