"""Document: one text or conversation, when two of them count as the same, and its form as a JSON object.

The object is {"text": ...} or {"messages": [...]}. A message's content is a string, or a list of parts: {"type":
"text", "text": ...}, {"type": "image", "path": ...} with the path inside the texts' own folder, or {"type": "image",
"data": ...} with the picture's file in base64. `id` and `kind` are optional.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import input_error
from ..core.json_text import json_text

# The path of an image file, or its bytes.
Picture = Path | bytes


@dataclass(frozen=True)
class Document:
    """A text or a conversation: exactly one of `text` and `messages` is set."""

    id: str
    kind: str
    text: str | None
    messages: list[dict[str, Any]] | None
    # The pictures of the image parts, in order.
    images: tuple[Picture, ...] = ()
    # The label of the source that it was read from.
    source: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of all that a model would see."""
        return self._digest(_unplaced([self.text, self.messages]))

    @property
    def likeness(self) -> str:
        """SHA-256 that ignores case and white space. Calibration and evaluation may share none."""
        return self._digest(_folded(_unplaced([self.text, self.messages])))

    def _digest(self, content: Any) -> str:
        sha = hashlib.sha256()
        sha.update(json_text(content, sort_keys=True, ensure_ascii=False).encode())
        for picture in self.images:
            content = picture if isinstance(picture, bytes) else picture.read_bytes()
            sha.update(hashlib.sha256(content).digest())
        return sha.hexdigest()


def _unplaced(value: Any) -> Any:
    """The content without the paths of its pictures: a model sees their bytes, which are digested apart."""
    match value:
        case list():
            return [_unplaced(item) for item in value]
        case {"type": "image"}:
            return {"type": "image"}
        case dict():
            return {key: _unplaced(item) for key, item in value.items()}
    return value


def _folded(value: Any) -> Any:
    """The content in one case, with single spaces."""
    match value:
        case str():
            return " ".join(value.casefold().split())
        case list():
            return [_folded(item) for item in value]
        case dict():
            return {key: _folded(item) for key, item in value.items()}
    return value


def document_of(row: Any, default_id: str, folder: Path | None, source: str = "", kind: str | None = None) -> Document:
    """The document of a JSON object. Pictures named by a path must lie in `folder`; None allows no paths.

    Raises ValueError whose text continues a sentence that begins with the row's name.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    name, kind = str(row.get("id", default_id)), kind or str(row.get("kind", "text"))
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise ValueError("has an empty text")
        _refuse_half_characters(row["text"])
        return Document(name, kind, row["text"], None, source=source)
    if "text" in row and "messages" not in row:
        raise ValueError('has a "text" that is no string')
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('has neither "text" nor "messages"')
    images: list[Picture] = []
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
                images.append(_picture(part, folder))
            elif not isinstance(part.get("text"), str):
                raise ValueError("has a text part without a text")
            else:
                _refuse_half_characters(part["text"])
    return Document(name, kind, None, messages, tuple(images), source)


def _refuse_half_characters(text: str) -> None:
    """JSON can hold half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half of a surrogate pair at character {error.start}") from None


def _picture(part: dict[str, Any], folder: Path | None) -> Picture:
    if isinstance(part.get("data"), bytes):
        return bytes(part["data"])
    if "data" in part:
        try:
            return base64.b64decode(str(part["data"]), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError('has an image whose "data" is no base64') from None
    if folder is None:
        raise ValueError("names an image by a path, and a data set has no folder")
    path = (folder / str(part.get("path", ""))).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"names the image {part.get('path')!r}, which is outside the folder of the texts")
    if not path.is_file():
        raise ValueError(f"names the image {part.get('path')!r}, which does not exist")
    return path


def spelled(document: Document) -> dict[str, Any]:
    """The JSON object of a document, with its pictures in base64. `document_of` reads it back."""
    row: dict[str, Any] = {"id": document.id, "kind": document.kind}
    if document.messages is None:
        return row | {"text": document.text}
    pictures = iter(document.images)

    def part(item: dict[str, Any]) -> dict[str, Any]:
        if item["type"] != "image":
            return {"type": "text", "text": item["text"]}
        picture = next(pictures)
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
        return {"type": "image", "data": base64.b64encode(content).decode()}

    messages = []
    for message in document.messages:
        content = message["content"]
        parts = content if isinstance(content, str) else [part(item) for item in content]
        messages.append({"role": message["role"], "content": parts})
    return row | {"messages": messages}


def refuse_shared(calibration: list[Document], evaluation: list[Document]) -> None:
    """Raises InputError for documents that are in both sets: KL on calibration rows would look too good."""
    seen = {document.likeness: document.id for document in calibration}
    shared = [f"{d.id} is {seen[d.likeness]} of the calibration texts" for d in evaluation if d.likeness in seen]
    if shared:
        raise input_error(
            f"{len(shared)} evaluation texts are calibration texts too:",
            shared[:20],
            "Remove them from one of the two files: KL must be measured on texts that calibration never saw.",
        )
