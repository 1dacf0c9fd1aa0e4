"""Row: the token ids of one document, or of several packed ones, with its images; and protocols of a walk."""

import hashlib
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import torch

from .schedule import Schedule


@dataclass(frozen=True)
class Part:
    """A stretch of a row, taken from one document of one source."""

    document: str
    kind: str
    source: str
    tokens: int


@dataclass(frozen=True)
class Row:
    """tokens int64 [T]; pixels fp32 [images, 3, S, S] or None; `document` names the text that the row was cut from;
    `parts` are its stretches, in order."""

    document: str
    kind: str
    tokens: torch.Tensor
    pixels: torch.Tensor | None = None
    parts: tuple[Part, ...] = ()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits from all that a model sees of the row: tokens and pixels."""
        sha = hashlib.sha256(self.tokens.numpy().tobytes())
        if self.pixels is not None:
            sha.update(self.pixels.numpy().tobytes())
        return sha.hexdigest()[:16]


def batches(rows: list[Row], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers of each batch. All rows of a batch have one length, so nothing is padded.

    A batch has at most `tokens_per_batch` tokens, but one row at least. The order depends on the rows alone.
    """
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row.tokens), []).append(number)
    out = []
    for length in sorted(by_length, reverse=True):
        numbers = by_length[length]
        step = max(1, tokens_per_batch // length)
        out += [numbers[i : i + step] for i in range(0, len(numbers), step)]
    return out


class RowStore(Protocol):
    """Holds hidden rows between blocks, by (block that they enter, stream, batch). Whoever gets rows does not write to
    them. `drop`: all that enter a block, or one stream of them."""

    def put(self, block: int, stream: str, batch: int, hidden: torch.Tensor) -> None: ...

    def get(self, block: int, stream: str, batch: int) -> torch.Tensor: ...

    def drop(self, block: int, stream: str | None = None) -> None: ...

    def release(self, block: int, stream: str | None = None) -> None:
        """As `drop`, but what is on the disk stays there: a commit may rest on it."""
        ...


class Step(Protocol):
    """Is told what a long walk is doing: its present task, and the tokens that went through a block."""

    def expect(self, schedule: Schedule) -> None: ...

    def begin(self, task: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


class Unwatched:
    """A Step that tells nobody."""

    def expect(self, schedule: Schedule) -> None: ...

    def begin(self, task: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


def spacing(n_blocks: int) -> int:
    """The n of a walk forward that stores hidden rows before every n-th block: the square root of the block count."""
    return max(1, isqrt(n_blocks))


def rows_at_once(n_blocks: int) -> int:
    """The most streams, of hidden rows or gradients at one place of the model, that the store and its files hold at the
    same time."""
    return -(-n_blocks // spacing(n_blocks)) + spacing(n_blocks) + 2
