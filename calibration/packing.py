"""Makes the rows of a run from encoded documents.

Calibration rows are packed: documents follow one another and are cut at a fixed length, so no row is padded. Each
source of a mixture gives its share of the tokens. A source that is too short gives all it has, and the others fill the
gap. A share of the tokens goes into long rows, which take the longest documents first, because only connected text
shows attention over a long distance. An evaluation row is one document, cut at the row length; position 0 predicts
token 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ..core.errors import InputError
from ..core.rows import Part, Row


@dataclass(frozen=True)
class RowLayout:
    """How many rows of which length are wanted."""

    # The size of the whole: this many rows of this many tokens.
    rows: int
    row_tokens: int
    # This share of those tokens goes into rows of this length instead.
    long_share: float = 0.0
    long_row_tokens: int = 0
    # Pack this many times the rows, for a balancing pass to choose from.
    pool: float = 1.0

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    def counts(self, available_tokens: int, pool: float = 1.0) -> tuple[int, int]:
        """(short rows, long rows) out of at most `available_tokens`. Short texts keep the share of long rows."""
        tokens = min(round(self.tokens * pool), available_tokens)
        long = round(self.long_share * tokens / self.long_row_tokens) if self.long_share else 0
        return round(self.rows * pool) - long * self.long_row_tokens // self.row_tokens, long


def cut(row: Row, start: int, stop: int) -> Row:
    """The tokens from `start` to `stop` of a row without pictures."""
    parts, begin = [], 0
    for part in row.parts:
        inside = min(stop, begin + part.tokens) - max(start, begin)
        if inside > 0:
            parts.append(replace(part, tokens=inside))
        begin += part.tokens
    return Row(row.document, row.kind, row.tokens[start:stop], None, tuple(parts))


def quotas(available: Sequence[int], weights: Sequence[float], wanted: int) -> list[int]:
    """How many tokens each source gives: its weight's share of `wanted`, plus its share of what short sources lack."""
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
    """Documents of every source in a seeded order, until the source's share of `wanted` tokens is full.

    The last text is cut there; a document with pictures is never cut. A single source is taken whole.
    """
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


def pack(encoded: list[Row], layout: RowLayout, seed: int) -> list[Row]:
    """The rows of both lengths, `layout.pool` times as many as wanted, long rows last.

    Raises InputError when the texts fill no row.
    """
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
    if layout.pool > 1:  # pictures are spread over the rows that the texts can fill
        short_count = max(1, min(short_count, sum(len(row.tokens) for row in rest) // layout.row_tokens))
    return pack_rows(rest, layout.row_tokens, short_count, seed) + long_rows


def _long_rows(encoded: list[Row], row_tokens: int, count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(long rows, the rest of the documents). A document gives one long row at most."""
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
    """The pieces one after another as one row."""
    pixels = [piece.pixels for piece in pieces if piece.pixels is not None]
    parts: list[Part] = []
    for part in (part for piece in pieces for part in piece.parts):
        if parts and replace(parts[-1], tokens=0) == replace(part, tokens=0):
            part = replace(part, tokens=parts.pop().tokens + part.tokens)
        parts.append(part)
    tokens = torch.cat([piece.tokens for piece in pieces])
    return Row(name, "packed", tokens, torch.cat(pixels) if pixels else None, tuple(parts))


def pack_rows(encoded: list[Row], row_tokens: int, max_rows: int, seed: int) -> list[Row]:
    """Shuffles the documents and cuts their tokens into rows of exactly `row_tokens`.

    A document with pictures is never cut: it goes whole to the start of a row, and is left out if it is longer than a
    row. A last row that is not full is dropped. Raises InputError when no row can be filled.
    """
    order = list(encoded)
    random.Random(seed).shuffle(order)
    pictures = [row for row in order if row.pixels is not None and len(row.tokens) <= row_tokens]
    texts = [row for row in order if row.pixels is None]
    stream = torch.cat([row.tokens for row in texts] or [torch.empty(0, dtype=torch.int64)])
    spans = _Spans(texts)
    rows: list[Row] = []
    offset = 0
    per_row = -(-len(pictures) // max(1, max_rows))  # spread the pictures over the wanted rows
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
    """Tells which documents the next tokens of a stream come from."""

    def __init__(self, rows: list[Row]) -> None:
        self._parts = [part for row in rows for part in row.parts]
        self._next, self._used = 0, 0

    def of(self, wanted: int) -> tuple[Part, ...]:
        """The parts that the next `wanted` tokens come from."""
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


def document_heads(encoded: list[Row], row_tokens: int) -> list[Row]:
    """The rows that documents give to an evaluation: each is one document, cut at `row_tokens`. Documents of fewer than
    two tokens are left out, and those whose pictures would be cut."""
    usable = (row for row in encoded if len(row.tokens) >= 2)
    return [
        row if row.pixels is not None else cut(row, 0, row_tokens)
        for row in usable
        if row.pixels is None or len(row.tokens) <= row_tokens
    ]


def distinct(heads: list[Row]) -> list[Row]:
    """The first of all rows in which a model sees the same. Equal rows have equal figures: they are one draw of the
    evaluation, however often it is given."""
    first: dict[str, Row] = {}
    for row in heads:
        first.setdefault(row.digest, row)
    return list(first.values())


def document_rows(encoded: list[Row], row_tokens: int, max_rows: int) -> list[Row]:
    """The distinct heads of documents, at most `max_rows`. Raises InputError when none remains."""
    rows = distinct(document_heads(encoded, row_tokens))[:max_rows]
    if not rows:
        raise InputError(
            "the evaluation texts hold no document of two tokens or more whose pictures fit into evaluation_row_tokens "
            f"({row_tokens:,})"
        )
    return rows


def repeated_share(rows: list[Row]) -> float:
    """The share of tokens that stand in a row as in another, with the same tokens before them: there both models say
    the same again. Rows with pictures share nothing."""
    total = sum(len(row.tokens) for row in rows)
    listed = sorted(row.tokens.tolist() for row in rows if row.pixels is None)
    # Sorted rows are neighbours where they share most: what each shares with the one before it is new to nobody.
    shared = sum(_common(one, other) for one, other in pairwise(listed))
    return shared / total if total else 0.0


def _common(one: list[int], other: list[int]) -> int:
    """The length of the beginning that the two share."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)
