"""Reads documents from JSONL, Parquet or plain text, from a folder of such files, or from a Hugging Face data set.

JSONL is usually the user's own, so it is read whole and every bad line is named. Parquet files and data sets are often
other people's, so a row that cannot be used is left out and counted, and reading stops when there is enough. A plain
text file is one document. Nothing that is read is ever executed.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import InputError, ResourceError, input_error
from .columns import Columns, document_from
from .documents import Document, document_of

JSON_LINES, PARQUET, PLAIN = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt", ".md")
SUFFIXES = (*JSON_LINES, *PARQUET, *PLAIN)
# The shuffle buffer for a data set, in rows: enough to mix sorted data, and little to download.
SHUFFLE_ROWS = 1000
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

    @property
    def place(self) -> tuple[str, ...]:
        """Sources with the same place give the same documents."""
        return (str(self.path.resolve()),) if self.path else (self.name, self.config or "", self.split)

    @property
    def lenient(self) -> bool:
        """Whether rows that the model cannot take are left out instead of refused."""
        return self.path is None or self.path.is_dir() or self.path.suffix.lower() in PARQUET


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
            characters += _length(document) + self.picture_characters * len(document.images)
            if (self.documents and count >= self.documents) or (self.characters and characters >= self.characters):
                return


def _length(document: Document) -> int:
    """The document's characters, pictures aside."""
    words = len(document.text or "")
    for message in document.messages or []:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        words += sum(len(part) for part in parts)
    return words


@dataclass(frozen=True)
class SourceDocuments:
    """The documents that a source gave; how many of its rows were left out, and why the first one was."""

    documents: list[Document]
    left_out: int = 0
    reason: str = ""


def read_source(source: Source, limit: ReadLimit, seed: int | None) -> SourceDocuments:
    """The documents of a source, up to the limit. `seed` shuffles a data set; None keeps its order.

    Raises InputError for unusable texts, ResourceError when a data set cannot be fetched.
    """
    if source.path is None:
        return _read_dataset(source, limit, seed)
    if source.path.is_dir():
        files = sorted(
            path
            for path in source.path.rglob("*")
            if path.is_file()
            and path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(source.path).parts)
        )
        if not files:
            raise InputError(f"the folder {source.path} holds no texts: name one with {', '.join(SUFFIXES)} files")
    else:
        files = [source.path]
    found = [_read_file(path, source, limit) for path in files]
    reason = next((part.reason for part in found if part.reason), "")
    return SourceDocuments([d for part in found for d in part.documents], sum(part.left_out for part in found), reason)


def _read_file(path: Path, source: Source, limit: ReadLimit) -> SourceDocuments:
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"the texts {path} do not exist")
    if suffix in PARQUET:
        return _read_parquet(path, source, limit)
    if suffix in PLAIN:
        return SourceDocuments([_read_plain(path, source)])
    if suffix in JSON_LINES:
        return SourceDocuments(read_jsonl(path, source))
    raise InputError(f"the texts {path} are of no known kind: give a file that ends in {', '.join(SUFFIXES)}")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"the texts {path} do not exist") from None
    except OSError as error:
        raise InputError(f"the texts {path} cannot be read ({error.strerror}): name a JSONL file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the texts {path} are not UTF-8 ({error}): convert them") from None
    if "\0" in text:
        raise InputError(f"the texts {path} hold NUL characters: this is not a text file")
    return text


def _read_plain(path: Path, source: Source) -> Document:
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"the texts {path} are empty")
    return Document(path.name, source.kind or "text", text, None, source=source.label)


def read_jsonl(path: Path, source: Source | None = None) -> list[Document]:
    """The documents of a JSONL file, one a line. Raises InputError listing the bad lines."""
    source = source or Source(path.name, path)
    # Not splitlines: JSON strings may hold characters that Unicode counts as line ends.
    lines = _read_text(path).split("\n")
    documents, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row, name = json.loads(line), f"{path.stem}:{number}"
            if isinstance(row, dict) and (source.columns != Columns() or not row.keys() & {"text", "messages"}):
                lacking = source.columns.missing(set(row))
                if lacking:
                    raise ValueError(f"lacks {', '.join(lacking)}; it has {', '.join(sorted(row)) or 'nothing'}")
                documents.append(document_from(row, source.columns, name, path.parent, source.label, source.kind))
            else:
                documents.append(document_of(row, name, path.parent, source.label, source.kind))
        except json.JSONDecodeError as error:
            problems.append(f"line {number} is not JSON ({error})")
        except RecursionError:
            problems.append(f"line {number} is nested too deeply")
        except ValueError as error:
            problems.append(f"line {number} {error}")
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise input_error(
            f"the texts {path} cannot be used:", shown, 'A line is {"text": "..."} or {"messages": [...]}.'
        )
    if not documents:
        raise InputError(f"the texts {path} are empty")
    return documents


def _read_parquet(path: Path, source: Source, limit: ReadLimit) -> SourceDocuments:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            return _documents(rows, set(file.schema_arrow.names), source, limit, path.stem, path.parent)
    except (ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"the texts {path} cannot be read as Parquet ({first}): fetch them again") from None


def _read_dataset(source: Source, limit: ReadLimit, seed: int | None) -> SourceDocuments:
    """Streams the data set. `datasets` 4 and later never run a data set's code."""
    from datasets import load_dataset

    try:
        stream = load_dataset(source.name, source.config, split=source.split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        rows = iter(stream)
        first = next(rows, None)
    except Exception as error:  # `datasets` passes on what its file systems and the hub client raise
        raise _not_fetched(source, error) from error
    if first is None:
        raise InputError(f"the data set {source.label} ({source.split}) is empty: name another split")
    try:
        chained = (row for part in ([first], rows) for row in part)
        return _documents(chained, set(first), source, limit, f"{source.name}:{source.split}", None)
    except InputError:
        raise
    except Exception as error:  # the network may fail in the middle
        raise _not_fetched(source, error) from error


def _not_fetched(source: Source, error: Exception) -> ResourceError:
    return ResourceError(
        f"the data set {source.label} ({source.split}) cannot be fetched ({type(error).__name__}: {error}). On a "
        "machine without network give your own texts: --evaluation FILE, and for quantize --calibration FILE too"
    )


def _documents(
    rows: Iterable[dict[str, Any]], present: set[str], source: Source, limit: ReadLimit, stem: str, folder: Path | None
) -> SourceDocuments:
    """Documents of the usable rows. Raises InputError when a named column is missing or no row is usable."""
    lacking = source.columns.missing(present)
    if lacking:
        raise InputError(
            f"{source.label} has no column {', '.join(lacking)}; it has {', '.join(sorted(present))}: name its "
            "columns in the recipe (column, prompt_column and response_column, image_column)"
        )
    bad: list[str] = []

    def usable() -> Iterator[Document]:
        none_yet = True
        for number, row in enumerate(rows):
            try:
                document = document_from(row, source.columns, f"{stem}:{number}", folder, source.label, source.kind)
            except ValueError as error:
                bad.append(f"row {number} {error}")
                if none_yet and len(bad) >= GIVE_UP_ROWS:
                    return
                continue
            none_yet = False
            yield document

    documents = list(limit.take(usable()))
    if not documents:
        raise input_error(
            f"no row of {source.label} can be used:",
            bad[:3] or ["it is empty"],
            "Name its columns in the recipe (column, role_key and content_key, prompt_column and response_column).",
        )
    return SourceDocuments(documents, len(bad), bad[0] if bad else "")


def split_by_digest(documents: list[Document], evaluated: bool) -> list[Document]:
    """The evaluated or the calibrating part of texts that serve as both: one document in eight is evaluated.

    The digest decides, with case and white space ignored, so the choice depends neither on the order nor on the other
    documents.
    """
    return [d for d in documents if (int(d.likeness[:8], 16) % 8 == 0) == evaluated]
