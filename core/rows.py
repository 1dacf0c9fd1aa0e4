"""Row: token ids of one document (or one packed stretch of several) on the way through a model, with its images."""

from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import torch


@dataclass(frozen=True)
class Part:
    """A stretch of a row that came from one document of one source."""

    document: str
    kind: str
    source: str
    tokens: int


@dataclass(frozen=True)
class Row:
    """tokens int64 [T]; pixels fp32 [images, 3, S, S] or None; `document` names what the row was cut from, `parts`
    the stretches it is made of, in order."""

    document: str
    kind: str
    tokens: torch.Tensor
    pixels: torch.Tensor | None = None
    parts: tuple[Part, ...] = ()


def batches(rows: list[Row], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers grouped so that every batch holds rows of one length: nothing is ever padded.

    A batch has at most `tokens_per_batch` tokens (one row at least). The order is fixed by the rows alone.
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
    """Hidden rows between blocks, by (block that they enter, stream, batch)."""

    def put(self, block: int, stream: str, batch: int, hidden: torch.Tensor) -> None: ...

    def get(self, block: int, stream: str, batch: int) -> torch.Tensor: ...

    def drop(self, block: int) -> None: ...


class Step(Protocol):
    """Tells a watcher what a long walk is doing."""

    def begin(self, stage: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


def spacing(n_blocks: int) -> int:
    """Hidden rows are stored before every so-manieth block on the way forward: about as many as lie between two."""
    return max(1, isqrt(n_blocks))


def rows_at_once(n_blocks: int) -> int:
    """At how many places of the model hidden rows or gradients lie in the store at the same time, at most."""
    return -(-n_blocks // spacing(n_blocks)) + spacing(n_blocks) + 1
