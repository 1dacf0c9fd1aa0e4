"""Document: one text or conversation, when two of them count as the same, and its form as a JSON object.

The object is {"text": ...} or {"messages": [...]}. A message's content is a string, or a list of parts: {"type":
"text", "text": ...}, {"type": "image", "path": ...} with the path inside the texts' own folder, or {"type": "image",
"data": ...} with the picture's file in base64. `id`, `kind` and `tools` are optional. messages.py spells the messages.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import input_error
from ..core.json_text import json_text, nonfinite
from .messages import normalized, objects, refuse_half_characters
from .spellings import alike

# What could begin a line, or steer a terminal.
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
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
    # What the chat template is given as `tools`.
    tools: list[dict[str, Any]] | None = None
    # A row of Parquet or of a data set, which are often other people's: left out where the model cannot take it. The
    # user's own is refused.
    borrowed: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of all that a model would see."""
        return self._digest(_unplaced([self.text, self.messages, *([self.tools] if self.tools else [])]))

    @property
    def likeness(self) -> str:
        """SHA-256 of what is said, with case and white space ignored. Calibration and evaluation may share none."""
        said = None
        if self.messages is not None:
            said = [alike(message) for message in self.messages]
        return self._digest(_folded(_unplaced([self.text, said])))

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
    name = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", name)
    refuse_half_characters("id", name)
    refuse_half_characters("kind", kind)
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise ValueError("has an empty text")
        refuse_half_characters("text", row["text"])
        return Document(name, kind, row["text"], None, source=source)
    if "text" in row and "messages" not in row:
        raise ValueError('has a "text" that is no string')
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise ValueError('has neither "text" nor "messages"')
    messages, tools = [normalized(message) for message in given], objects("tools", row.get("tools"))
    refuse_half_characters("messages", messages)
    refuse_half_characters("tools", tools)
    for place, word in nonfinite({"messages": messages, "tools": tools}):
        raise ValueError(f"has {word} as a number, at {place}")
    images = [_picture(part, folder) for message in messages for part in _parts(message) if part["type"] == "image"]
    return Document(name, kind, None, messages, tuple(images), source, tools or None)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content, checked; none where it is a string."""
    parts = message["content"] if isinstance(message["content"], list) else []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            raise ValueError("has a content part that is neither text nor image")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError("has a text part without a text")
    return parts


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
        messages.append(message | {"content": parts})
    return row | {"messages": messages} | ({"tools": document.tools} if document.tools else {})


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
