"""Where texts come from: the user's JSONL, the embedded demo texts, or a Hugging Face data set.

A line of JSONL is {"text": ...} or {"messages": [...]} (content a string, or parts {"type": "text"} and
{"type": "image", "path": ...} with the path inside the JSONL's own folder); `id` and `kind` are optional.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.errors import InputError, ResourceError, input_error


@dataclass(frozen=True)
class Document:
    """One text or conversation. `images` are the files that its image parts name, in order."""

    id: str
    kind: str
    text: str | None
    messages: list[dict[str, Any]] | None
    images: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of what a model would see."""
        return self._digest([self.text, self.messages])

    @property
    def likeness(self) -> str:
        """SHA-256 that forgives case and white space: calibration and evaluation may share none."""
        return self._digest(_folded([self.text, self.messages]))

    def _digest(self, content: Any) -> str:
        sha = hashlib.sha256()
        sha.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
        for path in self.images:
            sha.update(hashlib.sha256(path.read_bytes()).digest())
        return sha.hexdigest()


def _folded(value: Any) -> Any:
    match value:
        case str():
            return " ".join(value.casefold().split())
        case list():
            return [_folded(item) for item in value]
        case dict():
            return {key: _folded(item) for key, item in value.items()}
    return value


def read_jsonl(path: Path) -> list[Document]:
    """Every document of a JSONL file. Raises InputError listing the bad lines."""
    try:
        # Not splitlines: JSON may hold the characters that Unicode counts as line ends.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"the texts {path} do not exist") from None
    except OSError as error:
        raise InputError(f"the texts {path} cannot be read ({error.strerror}): name a JSONL file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the texts {path} are not UTF-8 ({error}): convert them") from None
    documents, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            documents.append(_document(json.loads(line), f"{path.stem}:{number}", path.parent))
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


def _document(row: Any, default_id: str, folder: Path) -> Document:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    name, kind = str(row.get("id", default_id)), str(row.get("kind", "text"))
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise ValueError("has an empty text")
        _refuse_half_characters(row["text"])
        return Document(name, kind, row["text"], None)
    if "text" in row and "messages" not in row:
        raise ValueError('has a "text" that is no string')
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('has neither "text" nor "messages"')
    images = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError("has a message without role or content")
        parts = message["content"] if isinstance(message["content"], list) else []
        if not parts and not isinstance(message["content"], str):
            raise ValueError("has a message whose content is neither a string nor a list of parts")
        _refuse_half_characters(message["content"] if isinstance(message["content"], str) else "")
        for part in parts:
            if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
                raise ValueError("has a content part that is neither text nor image")
            if part["type"] == "image":
                images.append(_image_path(part, folder))
            elif not isinstance(part.get("text"), str):
                raise ValueError("has a text part without a text")
            else:
                _refuse_half_characters(part["text"])
    return Document(name, kind, None, messages, tuple(images))


def _refuse_half_characters(text: str) -> None:
    """JSON can spell half of a surrogate pair; no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half of a surrogate pair at character {error.start}") from None


def _image_path(part: dict[str, Any], folder: Path) -> Path:
    path = (folder / str(part.get("path", ""))).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"names the image {part.get('path')!r}, which is outside the folder of the texts")
    if not path.is_file():
        raise ValueError(f"names the image {part.get('path')!r}, which does not exist")
    return path


def read_dataset(name: str, split: str, column: str, limit: int) -> list[Document]:
    """The first `limit` rows of a Hugging Face data set, streamed. `column` holds texts or lists of messages."""
    from datasets import load_dataset

    try:
        stream: Iterable[dict[str, Any]] = load_dataset(name, split=split, streaming=True)
        rows = list(islice(stream, limit))
    except Exception as error:  # the library raises whatever its file systems and hub client raise
        raise ResourceError(
            f"the data set {name} ({split}) cannot be fetched ({type(error).__name__}: {error}). On a machine without "
            "the hub give your own texts: --evaluation FILE, and for quantize --calibration FILE too"
        ) from error
    return list(_from_rows(rows, name, split, column))


def _from_rows(rows: list[dict[str, Any]], name: str, split: str, column: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if column not in row:
            raise InputError(f"the data set {name} has no column {column!r}; it has {', '.join(sorted(row))}")
        key = "text" if isinstance(row[column], str) else "messages"
        try:
            yield _document({key: row[column], "kind": "dataset"}, f"{name}:{split}:{number}", Path())
        except ValueError:
            continue  # an empty row of a public data set is no reason to stop


def refuse_shared(calibration: list[Document], evaluation: list[Document]) -> None:
    """Calibration and evaluation may share no document: a KL measured on calibration rows flatters the result."""
    seen = {document.likeness: document.id for document in calibration}
    shared = [f"{d.id} is {seen[d.likeness]} of the calibration texts" for d in evaluation if d.likeness in seen]
    if shared:
        raise input_error(
            f"{len(shared)} evaluation texts are calibration texts too:",
            shared[:20],
            "Remove them from one of the two files: KL must be measured on texts that calibration never saw.",
        )
