"""The display of a run where stderr is no terminal, on a clock of our own."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from onecard.report import progress
from onecard.report.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_block_that_takes_hours_is_not_silent(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress("job", 2, console) as shown:
        shown.begin("statistics", 0)
        for _ in range(7200):
            clock.now += 1.0
            shown.advance(50)
    told = lines(console)
    assert "50 tokens/s" in told[1]
    assert "block 1 of 2 · statistics" in told[1]
    assert "elapsed 0:00:10" in told[1]
    # Every ten seconds at first, every 1 % of the run later: some 100 + ln(7.2) / ln(1.01) lines.
    assert 250 < len(told) < 350
    assert "elapsed 1:5" in told[-1]


def test_eta_is_of_whole_blocks(clock: Clock) -> None:
    """Ten seconds a block in unequal parts: at any moment the time left follows from the blocks done so far."""
    with Progress("job", 5, Console(file=io.StringIO())) as shown:
        shown.begin("embed")
        clock.now += 100.0
        for block in range(5):
            for stage, seconds in (("statistics", 6), ("quantize", 1), ("statistics", 3)):
                shown.begin(stage, block)
                for _ in range(seconds):
                    spent = clock.now - 1100.0
                    assert shown.eta_seconds() == (None if block == 0 else pytest.approx(50.0 - spent))
                    clock.now += 1.0
        shown.begin("copy the rest")
        assert shown.eta_seconds() is None
    assert shown.seconds["statistics"] == pytest.approx(45.0)
    assert shown.seconds["quantize"] == pytest.approx(5.0)
    assert shown.seconds["embed"] == pytest.approx(100.0)


def test_a_resumed_run_counts_its_own_blocks(clock: Clock) -> None:
    with Progress("job", 8, Console(file=io.StringIO())) as shown:
        shown.begin("statistics", 5)
        clock.now += 7.0
        assert shown.eta_seconds() is None
        shown.begin("statistics", 6)
        assert shown.eta_seconds() == pytest.approx(14.0)
        clock.now += 70.0
        shown.begin("quantize", 6)
        assert shown.eta_seconds() == 0.0


def test_quiet_prints_nothing(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("job", 1, console, quiet=True) as shown:
        shown.begin("statistics", 0)
        clock.now += 100.0
        shown.advance(1)
        shown.warn("something")
    assert lines(console) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way to count")
def test_peak_memory_is_not_a_parents() -> None:
    child = "from onecard.report.resources import peak_rss_bytes; print(peak_rss_bytes())"
    parent = f"import subprocess, sys; x = b'1' * 10**9; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 5e6 < int(told.stdout) < 5e8
