"""Documents of Parquet files: the first ones, or a draw from all of them.

Files are often sorted, by kind or by length, so calibration draws. Every row of every file has a random key by the
seed, and the documents are those with the smallest keys, as many as the limit wants. One pass holds no more than that
in memory, and makes no Python object of a row whose key is too large. Files that are read whole stay in their order.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from .columns import Columns, holds_both
from .documents import Document
from .messages import CONVERSATIONS
from .source import (
    GIVE_UP_ROWS,
    ReadLimit,
    Source,
    SourceDocuments,
    both_note,
    reader_of,
    refuse_columns,
    refuse_none,
    stem_of,
    usable_documents,
)

BATCH_ROWS = 256


def first_documents(path: Path, source: Source, limit: ReadLimit) -> SourceDocuments:
    """The first usable documents of a file. Raises InputError."""
    with _opened(path) as file:
        present = set(file.schema_arrow.names)
        batches = file.iter_batches(BATCH_ROWS, columns=_needed(source.columns, present))
        rows = (_row(batch, number) for batch in batches for number in range(batch.num_rows))
        return usable_documents(rows, present, source, limit, stem_of(path, source), path.parent)


def drawn_documents(paths: Sequence[Path], source: Source, limit: ReadLimit, seed: int) -> dict[Path, SourceDocuments]:
    """The documents that are drawn from all files together, by file. Raises InputError when no row is usable."""
    draw = _Draw(source, limit)
    for number, path in enumerate(paths):
        with _opened(path) as file:
            present = set(file.schema_arrow.names)
            refuse_columns(source, present)
            draw.take(number, path, file.iter_batches(BATCH_ROWS, columns=_needed(source.columns, present)), seed)
    refuse_none(source, draw.documents(), draw.reasons())
    return {path: draw.of_file(number) for number, path in enumerate(paths)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"the texts {path} cannot be read as Parquet ({first}): fetch them again") from None


def _row(batch: Any, number: int) -> dict[str, Any] | ValueError:
    """A row, or why it has none: Python's dates end with the year 9999."""
    from pyarrow import ArrowException

    try:
        row: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:  # the file is damaged
        raise
    except (ArrowException, ValueError, OverflowError) as error:
        return ValueError(f"has a value that cannot be read ({error})")
    return row


def _needed(columns: Columns, present: set[str]) -> list[str]:
    """The columns that a document is made of."""
    named = {columns.column, columns.prompt_column, columns.response_column}
    usual = {"text", *CONVERSATIONS} if named == {None} else named
    return sorted(present & {"id", "kind", "tools", columns.image_column, *usual} - {None})


class _Draw:
    """The documents with the smallest keys, as many as the limit wants."""

    def __init__(self, source: Source, limit: ReadLimit) -> None:
        self.source, self.limit = source, limit
        # (minus the key, file, row, characters, holds a text and a conversation, document): the largest key is first.
        self._kept: list[tuple[float, int, int, int, bool, Document]] = []
        self._characters = 0
        # (key, file, row, what is wrong)
        self._bad: list[tuple[float, int, int, str]] = []

    @property
    def _largest(self) -> float:
        """A row with a larger key is not wanted."""
        full = self._kept and self.limit.reached(len(self._kept), self._characters)
        return -self._kept[0][0] if full else 1.0

    def take(self, file: int, path: Path, batches: Iterator[Any], seed: int) -> None:
        """Draws from the rows of one file."""
        stem = stem_of(path, self.source)
        keys, read, begin = random.Random(f"{seed} {file}"), reader_of(self.source, path.parent), 0
        for batch in batches:
            drawn, largest = [keys.random() for _ in range(batch.num_rows)], self._largest
            for row in (row for row, key in enumerate(drawn) if key < largest):
                values = _row(batch, row)
                try:
                    document = read(values, f"{stem}:{begin + row}")
                except ValueError as error:
                    self._bad.append((drawn[row], file, begin + row, str(error)))
                    continue
                self._put(drawn[row], file, begin + row, holds_both(values, self.source.columns), document)
            begin += batch.num_rows
            if not self._kept and len(self._bad) >= GIVE_UP_ROWS:
                return

    def _put(self, key: float, file: int, row: int, both: bool, document: Document) -> None:
        length = self.limit.length(document)
        heapq.heappush(self._kept, (-key, file, row, length, both, document))
        self._characters += length
        while self.limit.reached(len(self._kept) - 1, self._characters - self._kept[0][3]):
            self._characters -= heapq.heappop(self._kept)[3]

    def documents(self, file: int | None = None) -> list[Document]:
        """What was drawn, of one file or of all, in the order of the files."""
        kept = sorted(self._kept, key=lambda entry: entry[1:3])
        return [entry[5] for entry in kept if file in (None, entry[1])]

    def reasons(self, file: int | None = None) -> list[str]:
        """What is wrong with the rows that were drawn and left out."""
        bad = sorted(entry[1:] for entry in self._bad if entry[0] <= self._largest)
        return [f"row {row} {reason}" for number, row, reason in bad if file in (None, number)]

    def of_file(self, file: int) -> SourceDocuments:
        reasons = self.reasons(file)
        note = both_note(self.source, sum(entry[4] for entry in self._kept if entry[1] == file))
        return SourceDocuments(self.documents(file), len(reasons), reasons[0] if reasons else "", note)
