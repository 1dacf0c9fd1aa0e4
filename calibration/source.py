"""Source: where texts come from; how much of it is read, and what it gave."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import input_error
from .columns import Columns, document_from, holds_both
from .documents import Document
from .folders import WANTED, TextFolder, shortened
from .read_text import text_stem

# After this many bad rows at the start, the mapping of columns is wrong, not the data.
GIVE_UP_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """A file or folder, or a data set of the hub."""

    # What messages and the record call it.
    label: str
    # None: the data set `name`.
    path: Path | None = None
    name: str = ""
    config: str | None = None
    split: str = "train"
    columns: Columns = field(default_factory=Columns)
    # What the record calls its texts. None: each row's own kind.
    kind: str | None = None
    # Its share of a mixture's tokens, relative to the other sources.
    weight: float = 1.0
    # Of a folder: the splits that are wanted, the first that there is.
    splits: tuple[str, ...] = WANTED["calibration"]

    @cached_property
    def folder(self) -> TextFolder | None:
        """The folder of texts that `path` is, if it is one. It looks into its files once."""
        return TextFolder(self.path, self.splits) if self.path is not None and self.path.is_dir() else None

    @property
    def place(self) -> tuple[str, ...]:
        """Sources with the same place give the same documents."""
        if self.path is None:
            return (self.name, self.config or "", self.split)
        split = None if self.folder is None else self.folder.split
        return (str(self.path.resolve()), split or "")


@dataclass(frozen=True)
class ReadLimit:
    """How much of Parquet files and data sets is read. None: no limit. JSONL and plain texts are read whole."""

    documents: int | None = None
    characters: int | None = None
    # A picture counts as this many characters.
    picture_characters: int = 0
    # A text is cut here, so that ten books give a long row each and one book does not give all ten.
    longest_characters: int | None = None

    def take(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents until the limit is reached; the one that reaches it is the last."""
        characters = 0
        for count, document in enumerate(documents, 1):
            if document.text is not None and self.longest_characters:
                document = replace(document, text=document.text[: self.longest_characters])
            yield document
            characters += self.length(document)
            if self.reached(count, characters):
                return

    def length(self, document: Document) -> int:
        """The characters that a document counts as."""
        words = len(document.text or "")
        for message in document.messages or []:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            words += sum(len(part) for part in parts)
        return words + self.picture_characters * len(document.images)

    def reached(self, documents: int, characters: int) -> bool:
        """Whether so much is enough."""
        return bool(self.documents and documents >= self.documents) or bool(
            self.characters and characters >= self.characters
        )


@dataclass(frozen=True)
class SourceDocuments:
    """The documents that a source gave; how many of its rows were left out, and why the first one was."""

    documents: list[Document]
    left_out: int = 0
    reason: str = ""
    # What the user is told about the reading.
    notes: tuple[str, ...] = ()
    # Of a folder: the files that were read, and what was passed over.
    read: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def of_folder(self, read: list[str], passed_over: list[str]) -> "SourceDocuments":
        return replace(self, read=tuple(shortened(read)), passed_over=tuple(passed_over))


def stem_of(path: Path, source: Source) -> str:
    """What the rows of a file are named after: its path in the source's folder, without suffixes."""
    stem = text_stem(path)
    if source.path in (None, path) or not path.is_relative_to(source.path):
        return stem
    return path.relative_to(source.path).with_name(stem).as_posix()


def both_note(source: Source, rows: int) -> tuple[str, ...]:
    """What is said of rows that hold a text and a conversation."""
    if not rows:
        return ()
    return (
        f"{rows:,} rows of {source.label} hold a text and a conversation: the text is read (drop it where it is not "
        "wanted, or name the other with `column` in a recipe)",
    )


def reader_of(source: Source, folder: Path | None) -> Callable[[dict[str, Any] | ValueError, str], Document]:
    """Gives the document of a row of Parquet or of a data set, by the row and its name. A row that could not be read is
    what it failed with."""

    def read(row: dict[str, Any] | ValueError, name: str) -> Document:
        if isinstance(row, ValueError):
            raise row
        document = document_from(row, source.columns, name, folder, source.label, source.kind)
        return replace(document, borrowed=True)

    return read


def refuse_columns(source: Source, present: set[str]) -> None:
    """Raises InputError when a named column is missing."""
    lacking = source.columns.missing(present)
    if lacking:
        raise input_error(
            f"{source.label} has no column {', '.join(lacking)}; it has {', '.join(sorted(present))}:",
            [],
            "Name its columns in the recipe (column, prompt_column and response_column, image_column).",
        )


def refuse_none(source: Source, documents: list[Document], bad: list[str]) -> None:
    """Raises InputError when no row is usable."""
    if not documents:
        raise input_error(
            f"no row of {source.label} can be used:",
            bad[:3] or ["it is empty"],
            "Name its columns in the recipe (column, role_key and content_key, prompt_column and response_column).",
        )


def usable_documents(
    rows: Iterable[dict[str, Any] | ValueError],
    present: set[str],
    source: Source,
    limit: ReadLimit,
    stem: str,
    folder: Path | None,
) -> SourceDocuments:
    """Documents of the usable rows, in their order. Raises InputError for missing columns and if no row is usable."""
    refuse_columns(source, present)
    read, bad, both = reader_of(source, folder), list[str](), 0

    def usable() -> Iterator[Document]:
        nonlocal both
        none_yet = True
        for number, row in enumerate(rows):
            try:
                document = read(row, f"{stem}:{number}")
            except ValueError as error:
                bad.append(f"row {number} {error}")
                if none_yet and len(bad) >= GIVE_UP_ROWS:
                    return
                continue
            none_yet = False
            both += holds_both(row, source.columns)
            yield document

    documents = list(limit.take(usable()))
    refuse_none(source, documents, bad)
    return SourceDocuments(documents, len(bad), bad[0] if bad else "", both_note(source, both))
