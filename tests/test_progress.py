"""What a run shows while it goes on, on a clock of our own: its ETA, its bar, and its plain lines."""

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from onecard import pipeline
from onecard.core.schedule import Expected, Schedule
from onecard.report import progress
from onecard.report.eta import Eta, Left
from onecard.report.progress import Progress
from pipelines import make_recipe, run_pipeline


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


def blocks(count: int, weight: float = 1.0, kind: str = "quantize") -> tuple[Expected, ...]:
    tasks = ("statistics", "quantize") if kind == "quantize" else (f"{kind}: reference", f"{kind}: quantized")
    return tuple(Expected(f"{kind} {index}", kind, weight, tasks, index) for index in range(count))


# --- plain lines


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
    assert not any("ETA" in line for line in told), "nothing is known of what is to come"
    # Every ten seconds at first, every 1 % of the run later: some 100 + ln(7.2) / ln(1.01) lines.
    assert 250 < len(told) < 350
    assert "elapsed 1:5" in told[-1]


def test_a_plain_log_says_whose_estimate_it_is(clock: Clock) -> None:
    """The plan's before anything is measured; then the measured one."""
    console = Console(file=io.StringIO(), width=200)
    with Progress("job", 4, console) as shown:
        shown.expect(Schedule(blocks(4, 60.0)))
        shown.begin("statistics", 0)
        clock.now += 30.0
        shown.advance(50)
        clock.now += 90.0
        shown.begin("statistics", 1)
    told = lines(console)
    assert told[0].startswith("job · block 1 of 4 · statistics · elapsed 0:00:00 · ETA about 0:04:00 · RAM peak ")
    assert "block 1 of 4 · statistics · 2 tokens/s · elapsed 0:00:30 · ETA about 0:03:30 · RAM peak " in told[1]
    assert "block 2 of 4 · statistics · elapsed 0:02:00 · ETA 0:06:00 · RAM peak " in told[2]


def test_an_upper_bound_is_said_to_be_one(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress("job", 3, console) as shown:
        shown.expect(Schedule((Expected("write", "write", 1.0, ("walk",), begins=12),), False, at_most=True))
        shown.begin("walk", 0)
        assert shown.eta_seconds() is None
        for block in (1, 2, 0):
            clock.now += 10.0
            shown.begin("walk", block)
        assert shown.eta_seconds() == pytest.approx(90.0)
    assert "ETA at most 0:01:30" in lines(console)[-1]


def test_quiet_prints_nothing(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("job", 1, console, quiet=True) as shown:
        shown.begin("statistics", 0)
        clock.now += 100.0
        shown.advance(1)
        shown.warn("something")
    assert lines(console) == []


# --- the live lines


@pytest.mark.parametrize("scheduled", [True, False])
def test_the_live_display_is_two_lines_in_80_columns(clock: Clock, scheduled: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with suppress(KeyboardInterrupt), Progress("onecard quantize " + "x" * 80, 48, console) as shown:
        if scheduled:
            shown.expect(Schedule(blocks(48, 3600.0) + blocks(48, 3600.0, "verify")))
        shown.begin("verify: quantized", 23)
        clock.now += 100.0
        shown.advance(123_456_789)
        raise KeyboardInterrupt  # so that the last frame is not that of a finished job
    assert isinstance(console.file, io.StringIO)
    frame = [line for line in Text.from_ansi(console.file.getvalue()).plain.splitlines() if line.strip()][-2:]
    assert all(cell_len(line) <= 80 for line in frame)
    assert "block 24 of 48 · verify: quantized" in frame[0]
    assert "━━━━" in frame[0]
    assert ("ETA about 24:58:20" in frame[0], " 74% " in frame[0]) == (scheduled, scheduled)
    assert "elapsed 0:01:40 · 1,234,568 tokens/s · RAM peak" in frame[1]


# --- the ETA


def test_eta_is_of_whole_blocks(clock: Clock) -> None:
    """Ten seconds a block in unequal parts: at any moment the time left follows from the blocks done so far."""
    with Progress("job", 5, Console(file=io.StringIO())) as shown:
        shown.expect(Schedule(blocks(5), in_seconds=False))
        shown.begin("embed")
        clock.now += 100.0
        for block in range(5):
            for task, seconds in (("statistics", 6), ("quantize", 1), ("statistics", 3)):
                shown.begin(task, block)
                for _ in range(seconds):
                    spent = clock.now - 1100.0
                    assert shown.eta_seconds() == (None if block == 0 else pytest.approx(50.0 - spent))
                    clock.now += 1.0
        shown.begin("copy the rest")
        assert shown.eta_seconds() == 1.0, "it is not over"
    assert shown.eta_seconds() == 0.0
    assert shown.seconds["statistics"] == pytest.approx(45.0)
    assert shown.seconds["quantize"] == pytest.approx(5.0)
    assert shown.seconds["embed"] == pytest.approx(100.0)


def test_verification_is_in_the_eta_when_quantizing_ends(clock: Clock) -> None:
    """An hour of verification is left in the last second of quantizing. The walk's own ETA was 0:00:00 there."""
    with Progress("job", 6, Console(file=io.StringIO())) as shown:
        shown.expect(Schedule(blocks(6, 200.0) + blocks(6, 200.0, "verify")))
        for block in range(6):
            shown.begin("statistics", block)
            clock.now += 300.0
            shown.begin("quantize", block)
            clock.now += 299.0
            if block == 5:
                assert shown.eta_seconds() == pytest.approx(3601.0, rel=0.01)
            clock.now += 1.0
        shown.begin("verify: reference", 0)
        assert shown.eta_seconds() == pytest.approx(3600.0)


def test_a_resumed_run_begins_at_its_place(clock: Clock) -> None:
    with Progress("job", 8, Console(file=io.StringIO())) as shown:
        shown.expect(Schedule(blocks(8), in_seconds=False))
        shown.begin("statistics", 5)
        clock.now += 7.0
        assert shown.eta_seconds() is None
        shown.begin("statistics", 6)
        assert shown.eta_seconds() == pytest.approx(14.0)
        clock.now += 70.0
        shown.begin("quantize", 6)
        left = shown.eta_seconds()
        assert left is not None
        assert 30.0 < left < 50.0, "this block took 70 seconds and the one before 7: the last takes their mean"


def test_a_first_block_that_takes_longer_than_planned_moves_the_eta_before_it_ends(clock: Clock) -> None:
    with Progress("job", 10, Console(file=io.StringIO())) as shown:
        shown.expect(Schedule(blocks(10, 60.0)))
        shown.begin("statistics", 0)
        assert shown.eta_seconds() == pytest.approx(600.0)
        clock.now += 600.0
        left = shown.eta_seconds()
        assert left is not None
        assert left > 9 * 600.0


def test_tokens_tell_how_far_a_stage_is(clock: Clock) -> None:
    stages = tuple(Expected(f"count {n}", "count", 1.0, ("count",), n, tokens=1000) for n in range(4))
    with Progress("job", 4, Console(file=io.StringIO())) as shown:
        shown.expect(Schedule(stages, in_seconds=False))
        shown.begin("count", 0)
        assert shown.eta_seconds() is None
        clock.now += 10.0
        shown.advance(250)
        assert shown.eta_seconds() == pytest.approx(150.0)
        clock.now += 100.0
        shown.advance(2000)
        assert (shown.eta_seconds() or 0) > 300.0


KINDS = ("check", "quantize", "verify")
NOISE = 1.25


@given(
    weights=st.tuples(*[st.floats(100.0, 1000.0)] * len(KINDS)),
    rates=st.tuples(*[st.floats(0.1, 10.0)] * len(KINDS)),
    counts=st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9)),
    noise=st.lists(st.floats(1 / NOISE, NOISE), min_size=19, max_size=19),
    in_seconds=st.booleans(),
    first=st.integers(0, 18),
)
def test_whatever_the_machine_does(
    weights: tuple[float, ...],
    rates: tuple[float, ...],
    counts: tuple[int, ...],
    noise: list[float],
    in_seconds: bool,
    first: int,
) -> None:
    """Kinds of stages with any true rates, stages with a quarter of noise, from the start or resumed at any stage: the
    ETA is above zero while work is left and ends at zero. In the second half of the last blocks it is off by no more
    than the finished blocks and those to come can differ, which is the noise twice."""
    stages: list[Expected] = []
    truth: list[float] = []
    for kind, weight, rate, count in zip(KINDS, weights, rates, counts, strict=True):
        stages += [Expected(f"{kind} {n}", kind, weight, (kind,), n) for n in range(count)]
        truth += [weight * rate] * count
    truth = [seconds * factor for seconds, factor in zip(truth, noise, strict=False)]
    first = min(first, len(stages) - 1)
    half = len(stages) - counts[-1] / 2
    eta, now = Eta(), 0.0
    eta.expect(Schedule(tuple(stages), in_seconds))
    for n in range(first, len(stages)):
        eta.begin(stages[n].kind, stages[n].block, now)
        for share in (0.0, 0.4, 0.999):
            left = eta.left(now + share * truth[n])
            if left is None:
                assert not in_seconds
            else:
                assert left.seconds >= 1.0
                assert 0 <= left.share < 1
        left = eta.left(now)
        if n >= half and n > first and stages[n - 1].kind == "verify":
            assert left is not None
            assert NOISE**-2.0001 <= left.seconds / sum(truth[n:]) <= NOISE**2.0001
        now += truth[n]
    eta.finish(now)
    assert eta.left(now) == Left(0.0, False, 1.0)


# --- the schedule of a run


@pytest.mark.parametrize(
    "keys",
    [{"method": "rtn"}, {"method": "fast"}, {"method": "balanced"}, {"method": "balanced", "tune_epochs": 1}],
    ids=["rtn", "fast", "balanced", "tuned"],
)
def test_a_run_does_what_its_schedule_says(
    keys: dict[str, object], baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is begun, in order and nothing in between: four blocks, so that sensitivities go over two twice."""
    begun: list[tuple[str, int | None]] = []
    schedules: list[Schedule] = []

    class Recorded(Progress):
        def expect(self, schedule: Schedule) -> None:
            schedules.append(schedule)
            super().expect(schedule)

        def begin(self, task: str, block: int | None = None) -> None:
            begun.append((task, block))
            super().begin(task, block)

    monkeypatch.setattr(pipeline, "Progress", Recorded)
    run_pipeline(baby("scout"), tmp_path / "out", make_recipe(**keys))
    (schedule,) = schedules
    place, seen = -1, set()
    for task, block in begun:
        fits = [
            n
            for n, stage in enumerate(schedule.stages)
            if n >= max(place, 0) and task in stage.tasks and block == stage.block
        ]
        assert fits, (task, block)
        assert fits[0] <= place + 1 or all(not stage.weight for stage in schedule.stages[place + 1 : fits[0]])
        place = fits[0]
        seen.add(place)
    assert {n for n, stage in enumerate(schedule.stages) if stage.weight} <= seen
    assert place == len(schedule.stages) - 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way to count")
def test_peak_memory_is_not_a_parents() -> None:
    child = "from onecard.report.resources import peak_rss_bytes; print(peak_rss_bytes())"
    parent = f"import subprocess, sys; x = b'1' * 10**9; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 5e6 < int(told.stdout) < 5e8
