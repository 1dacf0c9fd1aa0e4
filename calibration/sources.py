"""Reads documents from JSONL, Parquet or plain text, from a folder of such files, or from a Hugging Face data set.

JSONL is usually the user's own, so it is read whole and every bad line is named. Parquet files and data sets are often
other people's, so a row that cannot be used is left out and counted, and reading stops when there is enough. A plain
text file is one document. Nothing that is read is ever executed.
"""

import json
from pathlib import Path

from ..core.errors import InputError, ResourceError, input_error
from .columns import document_from, holds_both
from .documents import Document
from .folders import JSON_LINES, PARQUET, PLAIN, SUFFIXES
from .messages import conversation_in, json_in, refuse_half_characters
from .parquet import drawn_documents, first_documents
from .read_text import PACKED, read_text, text_suffix
from .source import ReadLimit, Source, SourceDocuments, both_note, stem_of, usable_documents

# The shuffle buffer for a data set, in rows: enough to mix sorted data, and little to download.
SHUFFLE_ROWS = 1000


def read_source(source: Source, limit: ReadLimit, seed: int | None) -> SourceDocuments:
    """The documents of a source, up to the limit.

    `seed` draws from Parquet files and shuffles a data set; None keeps their order. Raises InputError for unusable
    texts, ResourceError when a data set cannot be fetched.
    """
    if source.path is None:
        return _read_dataset(source, limit, seed)
    folder = source.folder
    files = [folder.path / name for name in folder.read] if folder else [source.path]
    for path in files:
        _refuse_file(path, source)
    tables = [path for path in files if text_suffix(path) in PARQUET]
    drawn = drawn_documents(tables, source, limit, seed) if tables and seed is not None else {}
    found = [drawn[path] if path in drawn else _read_file(path, source, limit) for path in files]
    whole = SourceDocuments(
        [document for part in found for document in part.documents],
        sum(part.left_out for part in found),
        next((part.reason for part in found if part.reason), ""),
        tuple(note for part in found for note in part.notes),
    )
    return whole if folder is None else whole.of_folder([p.as_posix() for p in folder.read], folder.passed_over)


def _refuse_file(path: Path, source: Source) -> None:
    """Raises InputError for a file that is not there, of no known kind, or with a name that cannot be written."""
    try:
        refuse_half_characters("name", [source.label, str(path.relative_to(source.path or path.parent)), path.name])
    except ValueError as error:
        raise InputError(f"the texts {str(path)!a} cannot be used: the file {error}: rename it") from None
    if not path.exists():
        raise InputError(f"the texts {path} do not exist")
    if text_suffix(path) not in SUFFIXES or (path.suffix.lower() in PACKED and text_suffix(path) in PARQUET):
        raise InputError(
            f"the texts {path} are of no known kind: give a file that ends in {', '.join(SUFFIXES)}; all but .parquet "
            f"may be packed ({', '.join(PACKED)})"
        )


def _read_file(path: Path, source: Source, limit: ReadLimit) -> SourceDocuments:
    if text_suffix(path) in PARQUET:
        return first_documents(path, source, limit)
    if text_suffix(path) in PLAIN:
        return SourceDocuments([_read_plain(path, source)])
    assert text_suffix(path) in JSON_LINES
    return _read_lines(path, source)


def _read_plain(path: Path, source: Source) -> Document:
    text = read_text(path)
    if not text.strip():
        raise InputError(f"the texts {path} are empty")
    if _is_conversation(text):
        raise InputError(
            f"the texts {path} hold a conversation as JSON: name the file .jsonl, with each row on its line"
        )
    name = Path(stem_of(path, source)).with_name(path.name).as_posix()
    return Document(name, source.kind or "text", text, None, source=source.label)


def _is_conversation(text: str) -> bool:
    try:
        return conversation_in(text, ("role", "from"), ("content", "value")) is not None
    except ValueError:  # in Python's spelling: a program, perhaps
        return False


def read_jsonl(path: Path, source: Source | None = None) -> list[Document]:
    """The documents of a JSONL file, one a line. Raises InputError listing the bad lines."""
    return _read_lines(path, source or Source(path.name, path)).documents


def _read_lines(path: Path, source: Source) -> SourceDocuments:
    # Not splitlines: JSON strings may hold characters that Unicode counts as line ends.
    lines = read_text(path).split("\n")
    stem, documents, problems, both = stem_of(path, source), list[Document](), list[str](), 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            lacking = source.columns.missing(set(row)) if isinstance(row, dict) else []
            if lacking:
                raise ValueError(f"lacks {', '.join(lacking)}; it has {', '.join(sorted(row)) or 'nothing'}")
            both += holds_both(row, source.columns)
            documents.append(
                document_from(row, source.columns, f"{stem}:{number}", path.parent, source.label, source.kind)
            )
        except json.JSONDecodeError as error:
            problems.append(f"line {number} is not JSON ({error})")
        except RecursionError:
            problems.append(f"line {number} is nested too deeply")
        except ValueError as error:
            problems.append(f"line {number} {error}")
    if problems:
        _refuse_array(path, lines)
        raise input_error(
            f"the texts {path} cannot be used:", problems, 'A line is {"text": "..."} or {"messages": [...]}.', most=20
        )
    if not documents:
        raise InputError(f"the texts {path} are empty")
    return SourceDocuments(documents, notes=both_note(source, both))


def _refuse_array(path: Path, lines: list[str]) -> None:
    """Raises InputError when a file holds one JSON value over several lines, or its rows as one array."""
    whole = "\n".join(lines)
    if whole.lstrip()[:1] not in ("[", "{"):
        return
    packed = " of the unpacked file" if path.suffix.lower() in PACKED else ""
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError) as error:
        if whole.lstrip()[0] == "[" and json_in(next(filter(str.strip, lines))) is None:
            raise InputError(f"the texts {path} begin as one JSON array, and it is damaged ({error})") from None
        return
    what = "one JSON array" if isinstance(value, list) else "one JSON object over several lines"
    if isinstance(value, list) or len([line for line in lines if line.strip()]) > 1:
        name = path.name.removesuffix(path.suffix) if packed else path.name
        raise InputError(
            f"the texts {path} hold {what}, and are read as one row a line: write each row{packed} on its own line, "
            f"for example with jq -c '{'.[]' if isinstance(value, list) else '.'}' {name}"
        )


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
        return usable_documents(chained, set(first), source, limit, f"{source.name}:{source.split}", None)
    except InputError:
        raise
    except Exception as error:  # the network may fail in the middle
        raise _not_fetched(source, error) from error


def _not_fetched(source: Source, error: Exception) -> ResourceError:
    return ResourceError(
        f"the data set {source.label} ({source.split}) cannot be fetched ({type(error).__name__}: {error}). On a "
        "machine without network give your own texts: --evaluation FILE, and for quantize --calibration FILE too"
    )


def split_by_digest(documents: list[Document], evaluated: bool) -> list[Document]:
    """The evaluated or the calibrating part of texts that serve as both: one document in eight is evaluated.

    The digest decides, with case and white space ignored, so the choice depends neither on the order nor on the other
    documents.
    """
    return [d for d in documents if (int(d.likeness[:8], 16) % 8 == 0) == evaluated]
