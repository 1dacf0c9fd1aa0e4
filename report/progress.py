"""What a long run is doing: two live lines with a bar on a terminal, plain lines elsewhere, and the seconds by task.

The bar and the ETA are of the whole run (eta.py). Without a schedule neither is shown.
"""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..core.schedule import Schedule
from ..core.units import clock, gigabytes
from .eta import Eta, Left
from .resources import peak_device_bytes, peak_rss_bytes

# On a pipe or in a log, a line is due after this many seconds or this share of the time so far, whichever is more: a
# night's log stays short. Tasks outside the blocks get a line each.
PLAIN_SECONDS, PLAIN_SHARE = 10.0, 0.01
# Columns of the bar, so that the longest task of a run fits beside it in 80.
BAR_COLUMNS = 16


class Progress:
    """A Step that keeps the seconds of each task (`seconds`) and draws. Used as a context manager around a run."""

    def __init__(self, title: str, blocks: int, console: Console | None = None, quiet: bool = False) -> None:
        self.title, self.blocks, self.quiet = title, blocks, quiet
        self.console = console or Console(file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self.task = "starting"
        self.block: int | None = None
        self._began = self._task_began = time.monotonic()
        self._tokens = 0
        self._eta = Eta()
        self._last_plain: float | None = None
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._eta.finish(time.monotonic())
        if self._live is not None:
            self._live.stop()
        self._close_task()

    def _close_task(self) -> None:
        now = time.monotonic()
        self.seconds[self.task] = self.seconds.get(self.task, 0.0) + now - self._task_began
        self._task_began = now

    def expect(self, schedule: Schedule) -> None:
        """What the run will do from now on. The ETA and the bar follow from it."""
        self._eta.expect(schedule)

    def begin(self, task: str, block: int | None = None) -> None:
        """A new task; `block` when it is one of a walk over the blocks."""
        self._close_task()
        self._eta.begin(task, block, self._task_began)
        changed = task != self.task
        self.task, self.block, self._tokens = task, block, 0
        self._plain(block is None and changed)

    def _plain(self, at_once: bool = False) -> None:
        """A line where there is no terminal, when one is due."""
        if self._live is not None or self.quiet:
            return
        now = time.monotonic()
        due = max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._began))
        if at_once or self._last_plain is None or now - self._last_plain >= due:
            self._last_plain = now
            self.console.print(Text(self._line()), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Shown at once; the card shows it again."""
        if not self.quiet:
            self.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def advance(self, tokens: int) -> None:
        """The present task has done this many more tokens."""
        self._tokens += tokens
        self._eta.advance(tokens)
        self._plain()

    def eta_seconds(self) -> float | None:
        """Left of the whole run; 0 only when it is over. None where nothing is known."""
        left = self._eta.left(time.monotonic())
        return None if left is None else left.seconds

    def _what(self) -> list[str]:
        block = [] if self.block is None else [f"block {self.block + 1} of {self.blocks}"]
        return [*block, self.task]

    def _time_left(self, left: Left | None) -> list[str]:
        if left is None:
            return []
        said = "at most " if self._eta.at_most else "about " if left.planned else ""
        return [f"ETA {said}{clock(math.ceil(left.seconds))}"]

    def _speed(self) -> list[str]:
        spent = time.monotonic() - self._task_began
        return [f"{self._tokens / spent:,.0f} tokens/s"] if self._tokens and spent > 0 else []

    def _elapsed(self) -> str:
        return f"elapsed {clock(time.monotonic() - self._began)}"

    def _memory(self) -> list[str]:
        device = [f"GPU peak {gigabytes(peak_device_bytes())}"] if peak_device_bytes() else []
        return [f"RAM peak {gigabytes(peak_rss_bytes())}", *device]

    def _line(self) -> str:
        left = self._time_left(self._eta.left(time.monotonic()))
        return " · ".join([self.title, *self._what(), *self._speed(), self._elapsed(), *left, *self._memory()])

    def _draw(self) -> Table:
        """Two lines that 80 columns hold, except for a long path."""
        left = self._eta.left(time.monotonic())
        above, grid = Table.grid(padding=(0, 1)), Table.grid()
        what = Text(" · ".join([*self._time_left(left), *self._what()]), no_wrap=True, overflow="ellipsis")
        if left is None:
            above.add_row(ProgressBar(total=None, pulse=True, width=BAR_COLUMNS), what)
        else:
            share = Text(f"{left.share:4.0%}")
            above.add_row(ProgressBar(total=1.0, completed=left.share, width=BAR_COLUMNS), share, what)
        grid.add_row(above)
        below = " · ".join([self._elapsed(), *self._speed(), *self._memory()])
        grid.add_row(Text(below, no_wrap=True, overflow="ellipsis"))
        return grid
