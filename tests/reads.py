"""What is read from a checkpoint's files: every stretch of bytes, in order."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from onecard.checkpoint import source
from onecard.checkpoint.source import Folder


@dataclass
class Reads:
    """The stretches that were read: (file, first byte, bytes)."""

    stretches: list[tuple[Path, int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self.stretches)

    def times(self, folder: Folder) -> dict[str, float]:
        """Stored tensor -> how often its bytes were read, on the mean; tensors of which none was are left out."""
        found: Counter[str] = Counter()
        for name, (file, begin) in folder.offsets.items():
            end = begin + folder.infos[name].nbytes
            for path, at, size in self.stretches:
                found[name] += max(0, min(at + size, end) - max(at, begin)) if path == file else 0
        return {name: count / folder.infos[name].nbytes for name, count in found.items() if count}


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """From now on, every read of a Folder is noted."""
    reads, read_into = Reads(), source.read_into

    def noted(file: Path, offset: int, buffer: torch.Tensor) -> None:
        reads.stretches.append((file, offset, len(buffer)))
        read_into(file, offset, buffer)

    monkeypatch.setattr(source, "read_into", noted)
    return reads
