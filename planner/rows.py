"""Where the rows between blocks will lie, and how often a run commits them (checkpoint/activations.py, keeper.py)."""

from dataclasses import dataclass
from math import floor

from ..checkpoint.activations import Room
from ..checkpoint.keeper import AT_ONCE_SECONDS, MOST_LOST_SECONDS
from ..core.lane import pinned_size
from ..core.rates import DISK_BYTES_PER_SECOND
from .memory import compute_bytes
from .work import RunWork

# The share of a card that a run may fill: 74 GB of the 84.9 that an H100 80 GB has for a program. The rest is for the
# CUDA context and for what the allocator cannot use.
CARD_SHARE = 0.871
# The streams of the calibration rows that lie in the store at once, each as large as the hidden rows: what enters a
# block and what leaves its attention half, of both models, and what o reads. They are let go half by half.
STREAMS = 5
# Those that a resumed run needs, which a commit writes: what enters the next block.
COMMITTED_STREAMS = 2


def rows_on_device(work: RunWork, total_bytes: int, site_budget_bytes: int) -> int:
    """Bytes of rows that may stay on a card of so many bytes, beside what the work takes there."""
    return max(0, int(total_bytes * CARD_SHARE) - compute_bytes(work, site_budget_bytes))


@dataclass(frozen=True)
class RowPlaces:
    """The most bytes of rows at once, by place; what a commit writes; and how many blocks lie between two commits."""

    device_bytes: int
    ram_bytes: int
    file_bytes: int
    commit_bytes: int
    blocks_per_commit: int
    # What the rows in RAM take there: pinned memory comes in powers of two.
    ram_taken_bytes: int

    @classmethod
    def of(cls, work: RunWork, room: Room, batch_tokens: int, block_seconds: float = 0.0) -> "RowPlaces":
        """`batch_tokens`: of a batch whose rows lie in pinned memory; 0 on a CPU, which pins none."""
        calibration = work.stream_bytes if work.method.statistics else 0
        # Of both models, before and after a block.
        most = STREAMS * calibration + 4 * work.evaluation_bytes
        batch = batch_tokens * work.adapter.hidden_size * work.itemsize
        taken = pinned_size(batch) / batch if batch else 1.0
        on_device = min(most, room.device_bytes)
        in_ram = min(most - on_device, int(room.ram_bytes / taken))
        commit = COMMITTED_STREAMS * (calibration + work.evaluation_bytes)
        often = _blocks_per_commit(commit, block_seconds)
        return cls(on_device, in_ram, most - on_device - in_ram, commit, often, int(in_ram * taken))

    @property
    def share_in_files(self) -> float:
        return self.file_bytes / max(1, self.device_bytes + self.ram_bytes + self.file_bytes)

    @property
    def disk_bytes(self) -> int:
        """The most bytes of rows on the disk: files that memory has no room for, the last commit, and the next. Where
        there are such files, all that entered the last commit's block stays, too."""
        kept = self.commit_bytes * (STREAMS - COMMITTED_STREAMS) // COMMITTED_STREAMS if self.file_bytes else 0
        return self.file_bytes + max(kept, self.commit_bytes) + self.commit_bytes

    def facts(self) -> dict[str, int]:
        """For scripts."""
        return {
            "rows_on_device_bytes": self.device_bytes,
            "rows_in_ram_bytes": self.ram_bytes,
            "rows_in_files_bytes": self.file_bytes,
            "commit_bytes": self.commit_bytes,
            "blocks_per_commit": self.blocks_per_commit,
        }


def _blocks_per_commit(commit_bytes: int, block_seconds: float) -> int:
    """As Keeper.finished decides: after a block from which the next one, and the writing, could take a kill's loss
    beyond the limit."""
    writing = commit_bytes / DISK_BYTES_PER_SECOND
    if writing <= AT_ONCE_SECONDS or block_seconds <= 0:
        return 1
    return max(1, floor((MOST_LOST_SECONDS - writing) / block_seconds - 1) + 1)
