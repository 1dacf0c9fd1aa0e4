"""Where documents come from: JSONL, Parquet and plain text, a file or a folder of them, or a Hugging Face data set.

Files are the user's own: JSONL is read whole and every bad line is named. Parquet and data sets are often other
people's: a row that cannot be used is left out and counted, and no more is read than is wanted. A plain text is one
document; a folder holds as many as it has files. Nothing that is read is ever executed.
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
# Rows of a data set that are held back to be drawn from: enough to mix what is sorted, little to download.
SHUFFLE_ROWS = 1000
# So many bad rows in a row, and the mapping is wrong, not the data.
GIVE_UP_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """`path`, or else the data set `name`. `label` is what messages and the record call it. `kind` None: the rows'."""

    label: str
    path: Path | None = None
    name: str = ""
    config: str | None = None
    split: str = "train"
    columns: Columns = field(default_factory=Columns)
    kind: str | None = None
    weight: float = 1.0

    @property
    def place(self) -> tuple[str, ...]:
        """Two sources of one place give the same documents."""
        return (str(self.path.resolve()),) if self.path else (self.name, self.config or "", self.split)

    @property
    def lenient(self) -> bool:
        """Whether rows that the model cannot take are left out, not refused."""
        return self.path is None or self.path.is_dir() or self.path.suffix.lower() in PARQUET


@dataclass(frozen=True)
class Limit:
    """Read no more than this of Parquet and data sets; JSONL and texts are read whole. Of a text of a data set no more
    than `longest_characters` are taken, so that ten books give ten long rows, not one the ten."""

    documents: int | None = None
    characters: int | None = None
    picture_characters: int = 0  # what a picture counts as
    longest_characters: int | None = None

    def take(self, documents: Iterable[Document]) -> Iterator[Document]:
        characters = 0
        for count, document in enumerate(documents, 1):
            if document.text is not None and self.longest_characters:
                document = replace(document, text=document.text[: self.longest_characters])
            yield document
            characters += _length(document) + self.picture_characters * len(document.images)
            if (self.documents and count >= self.documents) or (self.characters and characters >= self.characters):
                return


def _length(document: Document) -> int:
    """Characters of words."""
    words = len(document.text or "")
    for message in document.messages or []:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        words += sum(len(part) for part in parts)
    return words


@dataclass(frozen=True)
class Found:
    """The documents of a source, and how many of its rows were left out, with the first one's reason."""

    documents: list[Document]
    left_out: int = 0
    reason: str = ""


def read_source(source: Source, limit: Limit, seed: int | None) -> Found:
    """Every document of a source within the limit. `seed` mixes a data set's rows. Raises InputError, ResourceError."""
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
    return Found([d for part in found for d in part.documents], sum(part.left_out for part in found), reason)


def _read_file(path: Path, source: Source, limit: Limit) -> Found:
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"the texts {path} do not exist")
    if suffix in PARQUET:
        return _read_parquet(path, source, limit)
    if suffix in PLAIN:
        return Found([_read_plain(path, source)])
    if suffix in JSON_LINES:
        return Found(read_jsonl(path, source))
    raise InputError(f"the texts {path} are of no known kind: name a file that ends in {', '.join(SUFFIXES)}")


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
        raise InputError(f"the texts {path} hold NUL characters: this is no text")
    return text


def _read_plain(path: Path, source: Source) -> Document:
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"the texts {path} are empty")
    return Document(path.name, source.kind or "text", text, None, source=source.label)


def read_jsonl(path: Path, source: Source | None = None) -> list[Document]:
    """Every document of a JSONL file. Raises InputError listing the bad lines."""
    source = source or Source(path.name, path)
    # Not splitlines: JSON may hold the characters that Unicode counts as line ends.
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


def _read_parquet(path: Path, source: Source, limit: Limit) -> Found:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            return _documents(rows, set(file.schema_arrow.names), source, limit, path.stem, path.parent)
    except (ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"the texts {path} cannot be read as Parquet ({first}): fetch them again") from None


def _read_dataset(source: Source, limit: Limit, seed: int | None) -> Found:
    """Streamed. The library runs no code of a data set's since its version 4."""
    from datasets import load_dataset

    try:
        stream = load_dataset(source.name, source.config, split=source.split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        rows = iter(stream)
        first = next(rows, None)
    except Exception as error:  # the library raises whatever its file systems and hub client raise
        raise _not_fetched(source, error) from error
    if first is None:
        raise InputError(f"the data set {source.label} ({source.split}) is empty: name another split")
    try:
        chained = (row for part in ([first], rows) for row in part)
        return _documents(chained, set(first), source, limit, f"{source.name}:{source.split}", None)
    except InputError:
        raise
    except Exception as error:  # the network goes away in the middle, too
        raise _not_fetched(source, error) from error


def _not_fetched(source: Source, error: Exception) -> ResourceError:
    return ResourceError(
        f"the data set {source.label} ({source.split}) cannot be fetched ({type(error).__name__}: {error}). On a "
        "machine without the hub give your own texts: --evaluation FILE, and for quantize --calibration FILE too"
    )


def _documents(
    rows: Iterable[dict[str, Any]], present: set[str], source: Source, limit: Limit, stem: str, folder: Path | None
) -> Found:
    """The usable rows. Raises InputError when the mapping does not fit the columns, or no row is usable."""
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
    return Found(documents, len(bad), bad[0] if bad else "")


def split_by_digest(documents: list[Document], evaluated: bool) -> list[Document]:
    """One side of texts that serve for calibration and evaluation both: one document in eight is evaluated, by the
    digest that forgives case and white space, so that which one does not depend on the order or on other documents."""
    return [d for d in documents if (int(d.likeness[:8], 16) % 8 == 0) == evaluated]
