"""Encoded documents -> the rows of a run.

Calibration rows are packed: documents follow each other and are cut at a fixed length, so that no row is padded. Of a
mixture each source gives its share of the tokens; a source that has less gives all it has, and the others fill up. A
share of the tokens goes into long rows, filled with the longest documents first, for attention that reaches far is
only seen in text that hangs together. Evaluation rows are one document each, cut at the length; position 0 predicts
token 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..core.errors import InputError
from ..core.rows import Part, Row


@dataclass(frozen=True)
class Layout:
    """What is wanted: `rows` rows of `row_tokens` tokens, but `long_share` of those tokens in rows of
    `long_row_tokens`. `pool` times as many rows are packed, for a balancing pass to choose from."""

    rows: int
    row_tokens: int
    long_share: float = 0.0
    long_row_tokens: int = 0
    pool: float = 1.0

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    def counts(self, available_tokens: int, pool: float = 1.0) -> tuple[int, int]:
        """(short rows, long rows) of so many tokens at most. Texts that are too few keep the share of long rows."""
        tokens = min(round(self.tokens * pool), available_tokens)
        long = round(self.long_share * tokens / self.long_row_tokens) if self.long_share else 0
        return round(self.rows * pool) - long * self.long_row_tokens // self.row_tokens, long


def cut(row: Row, start: int, stop: int) -> Row:
    """Tokens start to stop of a row without pixels."""
    parts, begin = [], 0
    for part in row.parts:
        inside = min(stop, begin + part.tokens) - max(start, begin)
        if inside > 0:
            parts.append(replace(part, tokens=inside))
        begin += part.tokens
    return Row(row.document, row.kind, row.tokens[start:stop], None, tuple(parts))


def quotas(available: Sequence[int], weights: Sequence[float], wanted: int) -> list[int]:
    """Tokens that each source gives: its weight's share of `wanted`, and what others lack in proportion."""
    given = [0] * len(available)
    open_ = [i for i in range(len(available)) if available[i]]
    left = min(wanted, sum(available))
    while open_ and left:
        total = sum(weights[i] for i in open_)
        fair = {i: left * weights[i] / total for i in open_}
        short = [i for i in open_ if available[i] <= fair[i]]
        if not short:
            for i in open_:
                given[i] = round(fair[i])
            break
        for i in short:
            given[i] = available[i]
        left -= sum(available[i] for i in short)
        open_ = [i for i in open_ if i not in short]
    return given


def mixed(encoded: Sequence[Sequence[Row]], weights: Sequence[float], wanted: int, seed: int) -> list[Row]:
    """Documents of every source, drawn in a seeded order until its share of `wanted` tokens is full. The last text is
    cut there; documents with pictures are taken whole. A single source is taken whole."""
    if len(encoded) == 1:
        return list(encoded[0])
    shares = quotas([sum(len(row.tokens) for row in rows) for rows in encoded], weights, wanted)
    out: list[Row] = []
    for number, (rows, share) in enumerate(zip(encoded, shares, strict=True)):
        order = list(rows)
        random.Random(f"{seed} {number}").shuffle(order)
        for row in order:
            if share <= 0:
                break
            out.append(row if row.pixels is not None or len(row.tokens) <= share else cut(row, 0, share))
            share -= len(row.tokens)
    return out


def pack(encoded: list[Row], layout: Layout, seed: int) -> list[Row]:
    """Rows of both lengths, the pool's number of them, long ones last. Raises InputError when none can be filled."""
    available = sum(len(row.tokens) for row in encoded)
    short_count, long_count = layout.counts(available, layout.pool)
    rest, long_rows = encoded, list[Row]()
    if long_count:
        long_rows, rest = _long_rows(encoded, layout.long_row_tokens, long_count, seed)
        if not long_rows:
            raise InputError(
                f"the calibration texts hold {available:,} tokens and fill no long row of "
                f"{layout.long_row_tokens:,}: give more text, or lower calibration_long_share or "
                "calibration_long_row_tokens in the recipe"
            )
    if short_count < 1:
        return long_rows
    if layout.pool > 1:  # a pool that the texts do not fill has its pictures in all rows, too
        short_count = max(1, min(short_count, sum(len(row.tokens) for row in rest) // layout.row_tokens))
    return pack_rows(rest, layout.row_tokens, short_count, seed) + long_rows


def _long_rows(encoded: list[Row], row_tokens: int, count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(long rows, what is left of the documents). A document gives one long row at most; its rest is left."""
    order = list(encoded)
    random.Random(seed).shuffle(order)
    rest = [row for row in order if row.pixels is not None]
    pool = sorted((row for row in order if row.pixels is None), key=lambda row: len(row.tokens))
    rows: list[Row] = []
    while len(rows) < count and sum(len(row.tokens) for row in pool) >= row_tokens:
        pieces: list[Row] = []
        room = row_tokens
        while room:
            longest = pool.pop()
            pieces.append(cut(longest, 0, room))
            if len(longest.tokens) > room:
                rest.append(cut(longest, room, len(longest.tokens)))
            room -= len(pieces[-1].tokens)
        rows.append(_joined(f"long-{len(rows):05d}", pieces))
    return rows, rest + pool


def _joined(name: str, pieces: list[Row]) -> Row:
    pixels = [piece.pixels for piece in pieces if piece.pixels is not None]
    parts: list[Part] = []
    for part in (part for piece in pieces for part in piece.parts):
        if parts and replace(parts[-1], tokens=0) == replace(part, tokens=0):
            part = replace(part, tokens=parts.pop().tokens + part.tokens)
        parts.append(part)
    tokens = torch.cat([piece.tokens for piece in pieces])
    return Row(name, "packed", tokens, torch.cat(pixels) if pixels else None, tuple(parts))


def pack_rows(encoded: list[Row], row_tokens: int, max_rows: int, seed: int) -> list[Row]:
    """Shuffle documents and cut their tokens into rows of exactly `row_tokens`.

    A document with images is never cut: it is put whole at the start of a later row (one longer than a row is left
    out). What does not fill a last row is dropped. Raises InputError when not one row can be filled.
    """
    order = list(encoded)
    random.Random(seed).shuffle(order)
    pictures = [row for row in order if row.pixels is not None and len(row.tokens) <= row_tokens]
    texts = [row for row in order if row.pixels is None]
    stream = torch.cat([row.tokens for row in texts] or [torch.empty(0, dtype=torch.int64)])
    spans = _Spans(texts)
    rows: list[Row] = []
    offset = 0
    per_row = -(-len(pictures) // max(1, max_rows))  # spread the pictures over the rows that are wanted
    while len(rows) < max_rows:
        pieces: list[Row] = []
        room = row_tokens
        for _ in range(per_row):
            if pictures and len(pictures[0].tokens) <= room:
                pieces.append(pictures.pop(0))
                room -= len(pieces[-1].tokens)
        if len(stream) - offset < room:
            break
        pieces.append(Row("", "", stream[offset : offset + room], None, spans.of(room)))
        offset += room
        rows.append(_joined(f"packed-{len(rows):05d}", pieces))
    if not rows:
        total = sum(len(row.tokens) for row in encoded)
        raise InputError(
            f"the calibration texts hold {total:,} tokens and fill no row of {row_tokens:,}: give more text, or lower "
            "calibration_row_tokens in the recipe"
        )
    return rows


class _Spans:
    """The documents of a stream, stretch after stretch."""

    def __init__(self, rows: list[Row]) -> None:
        self._parts = [part for row in rows for part in row.parts]
        self._next, self._used = 0, 0

    def of(self, wanted: int) -> tuple[Part, ...]:
        """Of the next `wanted` tokens."""
        out = []
        while wanted and self._next < len(self._parts):
            part = self._parts[self._next]
            taken = min(wanted, part.tokens - self._used)
            if taken:
                out.append(replace(part, tokens=taken))
            wanted, self._used = wanted - taken, self._used + taken
            if self._used == part.tokens:
                self._next, self._used = self._next + 1, 0
        return tuple(out)


def distinct(encoded: list[Row]) -> list[Row]:
    """The first of all rows with the same tokens and pictures: a text that stands there twice is one draw, not two."""
    first: dict[bytes, Row] = {}
    for row in encoded:
        pixels = b"" if row.pixels is None else row.pixels.numpy().tobytes()
        first.setdefault(row.tokens.numpy().tobytes() + pixels, row)
    return list(first.values())


def document_rows(encoded: list[Row], row_tokens: int, max_rows: int) -> list[Row]:
    """One row a document, cut at `row_tokens`; documents under two tokens, or whose images would be cut, are left out.

    Raises InputError when none is left.
    """
    rows = []
    for row in encoded:
        if len(row.tokens) < 2 or (row.pixels is not None and len(row.tokens) > row_tokens):
            continue
        rows.append(row if row.pixels is not None else cut(row, 0, row_tokens))
        if len(rows) == max_rows:
            break
    if not rows:
        raise InputError("the evaluation texts hold no document of two tokens or more")
    return rows
