"""What a long run is doing: a live line on a terminal, plain lines elsewhere, and the seconds of every stage."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..core.units import clock, gigabytes
from .resources import peak_device_bytes, peak_rss_bytes

# On a pipe or in a log: a line when this many seconds have gone by, or this share of the run if that is more, so that a
# night's log stays short. Stages outside the blocks get one each.
PLAIN_SECONDS, PLAIN_SHARE = 10.0, 0.01


class Progress:
    """Keeps the seconds by stage (`seconds`), and draws. Used as a context manager around a run."""

    def __init__(self, title: str, blocks: int, console: Console | None = None, quiet: bool = False) -> None:
        self.title, self.blocks, self.quiet = title, blocks, quiet
        self.console = console or Console(file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self.stage = "starting"
        self.block: int | None = None
        self._began = self._stage_began = time.monotonic()
        self._tokens = 0
        self._phase_began, self._phase_first, self._phase = self._began, 0, ""
        self._block_began = self._began
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
        self._close_stage()
        if self._live is not None:
            self._live.stop()

    def _close_stage(self) -> None:
        now = time.monotonic()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._stage_began
        self._stage_began = now

    def begin(self, stage: str, block: int | None = None) -> None:
        """A new stage; `block` when it is one of a walk over the blocks."""
        self._close_stage()
        # A walk over the blocks has several stages a block; the ETA is that of the walk.
        phase = stage.partition(":")[0] if ":" in stage else "quantize"
        if block is not None and phase != self._phase:
            self._phase, self._phase_began, self._phase_first = phase, time.monotonic(), block
        if block != self.block:
            self._block_began = time.monotonic()
        changed = stage != self.stage
        self.stage, self.block, self._tokens = stage, block, 0
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
        """Said at once, and again on the card."""
        if not self.quiet:
            self.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def advance(self, tokens: int) -> None:
        """Work went on in this stage, on so many tokens."""
        self._tokens += tokens
        self._plain()

    def eta_seconds(self) -> float | None:
        """Left in the present walk over the blocks, from the mean of the blocks it has finished."""
        if self.block is None or self.block <= self._phase_first:
            return None
        each = (self._block_began - self._phase_began) / (self.block - self._phase_first)
        return max(0.0, each * (self.blocks - self.block) - (time.monotonic() - self._block_began))

    def _what(self) -> list[str]:
        block = [] if self.block is None else [f"block {self.block + 1} of {self.blocks}"]
        return [self.title, *block, self.stage]

    def _figures(self) -> list[str]:
        parts = []
        spent = time.monotonic() - self._stage_began
        if self._tokens and spent > 0:
            parts.append(f"{self._tokens / spent:,.0f} tokens/s")
        parts.append(f"elapsed {clock(time.monotonic() - self._began)}")
        eta = self.eta_seconds()
        if eta is not None:
            parts.append(f"ETA {clock(eta)}")
        parts.append(f"RAM peak {gigabytes(peak_rss_bytes())}")
        if peak_device_bytes():
            parts.append(f"GPU peak {gigabytes(peak_device_bytes())}")
        return parts

    def _line(self) -> str:
        return " · ".join(self._what() + self._figures())

    def _draw(self) -> Table:
        grid = Table.grid()
        done = 0 if self.block is None else self.block
        width = 32
        filled = width * done // max(1, self.blocks)
        grid.add_row(Text("█" * filled, style="green") + Text("░" * (width - filled), style="dim"))
        # Two lines: 80 columns hold either, but for a long path.
        grid.add_row(Text(" · ".join(self._what())))
        grid.add_row(Text(" · ".join(self._figures())))
        return grid
