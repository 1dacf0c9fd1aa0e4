"""Makes a document from a data set's row: which column holds the text, the conversation or the pictures.

    a text                          `column` holds a string
    a conversation                  `column` holds a list of messages, {role, content} under any names (`role_key`,
                                    `content_key`; ShareGPT's from/value is known), or of {user, assistant} turns
    a question and its answer       `prompt_column` and `response_column`
    pictures                        `image_column` holds one or a list: a file's bytes, {bytes, path}, a decoded image

A picture goes where the content has an image part or the word <image>, otherwise before the user's first words. A text
with pictures is read as their caption: the user shows the pictures and the assistant says the text.
"""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from .documents import Document, document_of
from .messages import BESIDE_CONTENT, CONVERSATIONS, conversation_in, opened

MARK = "<image>"


@dataclass(frozen=True)
class Columns:
    """The column names that a recipe gives. None: the usual names are tried."""

    column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    image_column: str | None = None

    def missing(self, present: set[str]) -> list[str]:
        """The columns that are needed and not among `present`."""
        named = (self.column, self.prompt_column, self.response_column, self.image_column)
        lacking = [name for name in named if name is not None and name not in present]
        if not any(getattr(self, field.name) for field in fields(self) if field.name.endswith("column")):
            usual = ("text", *CONVERSATIONS)
            lacking += [] if present & set(usual) else [f"any of {', '.join(usual)}"]
        return lacking


def document_from(
    row: dict[str, Any], columns: Columns, name: str, folder: Path | None, source: str, kind: str | None
) -> Document:
    """The document of a row. `name` is its id if the row has none; pictures named by a path must lie in `folder`.

    Raises ValueError that says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    images = _pictures(row.get(columns.image_column), folder) if columns.image_column else []
    value, tools = _value(row, columns)
    spelled: dict[str, Any] = {key: row[key] for key in ("id", "kind") if isinstance(row.get(key), str | int)}
    if tools is not None:
        spelled["tools"] = tools
    if isinstance(value, str) and not images:
        spelled["text"] = value
    elif isinstance(value, str):
        spelled["messages"] = [{"role": "user", "content": ""}, {"role": "assistant", "content": value}]
    else:
        spelled["messages"] = [message for item in value for message in _messages(item, columns)]
    if columns.image_column:
        spelled["messages"] = _placed(spelled.get("messages") or [], images)
    return document_of(spelled, name, folder, source, kind)


def _value(row: dict[str, Any], columns: Columns) -> tuple[str | list[Any], Any]:
    """(the text or the list of messages of a row, its tools). A conversation may also be a JSON string.

    Raises ValueError."""
    if columns.prompt_column and columns.response_column:
        words = [row.get(columns.prompt_column), row.get(columns.response_column)]
        if not all(isinstance(text, str) and text.strip() for text in words):
            raise ValueError("has an empty prompt or response")
        said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), words, strict=True)]
        return said, row.get("tools")
    key = columns.column or next((key for key in ("text", *CONVERSATIONS) if _holds(row, key)), "text")
    value = row.get(key)
    if isinstance(value, str):
        found = conversation_in(
            value, (columns.role_key or "role", "role", "from"), (columns.content_key or "content", "content", "value")
        )
        if found is not None:
            return found["messages"], row.get("tools") or found.get("tools")
        if key in CONVERSATIONS and opened(value).lstrip()[:1] in ("[", "{"):
            raise ValueError(f'has "{key}" as a string that is no JSON list of messages')
    if isinstance(value, str | list):
        return value, row.get("tools")
    if value is not None and key == "text":
        raise ValueError('has a "text" that is no string')
    raise ValueError("holds neither a text nor a conversation")


def holds_both(row: Any, columns: Columns) -> bool:
    """Whether a row holds a text and a conversation, and no column is named: the text is read."""
    named = columns.column or columns.prompt_column
    if not isinstance(row, dict) or named or not isinstance(row.get("text"), str):
        return False
    return _holds(row, "text") and any(_holds(row, key) for key in CONVERSATIONS)


def _holds(row: dict[str, Any], key: str) -> bool:
    """Whether anything stands under a key. A blank text is nothing beside a conversation."""
    value = row.get(key)
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _messages(item: Any, columns: Columns) -> list[dict[str, Any]]:
    """The message of one list item with all its keys, or the two messages of a {user, assistant} turn."""
    if not isinstance(item, dict):
        raise ValueError("has a message that is no object")
    role_key = columns.role_key or ("from" if "role" not in item and "from" in item else "role")
    content_key = columns.content_key or ("value" if "content" not in item and "value" in item else "content")
    if role_key not in item and isinstance(item.get("user"), str) and isinstance(item.get("assistant"), str):
        return [{"role": role, "content": item[role]} for role in ("user", "assistant")]
    said = any(item.get(key) for key in (*BESIDE_CONTENT, "function_call"))
    absent = [key for key in (role_key, content_key) if key not in item and not (said and key == content_key)]
    if absent:
        raise ValueError(f"has a message without {' and '.join(map(repr, absent))}: it has {', '.join(sorted(item))}")
    others = {key: value for key, value in item.items() if key not in (role_key, content_key)}
    return [others | {"role": item[role_key], "content": item.get(content_key)}]


def _pictures(value: Any, folder: Path | None) -> list[bytes]:
    """Each picture as the bytes of an image file."""
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if item is None:
            continue
        content = item.get("bytes") if isinstance(item, dict) else item
        if isinstance(item, dict) and content is None:
            content = item.get("path")
        if isinstance(content, str):
            path = (folder / content).resolve() if folder else None
            if folder is None or path is None or not path.is_relative_to(folder.resolve()) or not path.is_file():
                raise ValueError(f"names the image {content!r}, which is no file in the folder of the texts")
            content = path.read_bytes()
        elif isinstance(content, Image.Image):  # decoded already; PNG keeps every pixel
            buffer = io.BytesIO()
            content.convert("RGB").save(buffer, "PNG")
            content = buffer.getvalue()
        if not isinstance(content, bytes):
            raise ValueError("has an image column that holds no image")
        found.append(content)
    return found


def _placed(messages: list[dict[str, Any]], images: list[bytes]) -> list[dict[str, Any]]:
    """The messages with the pictures at their places. Raises ValueError when places and pictures do not match."""
    rest = list(images)
    out = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        placed: list[Any] = []
        for part in parts:
            if isinstance(part, dict) and part.get("type") == "image":
                placed.append({"type": "image", "data": rest.pop(0)} if rest else part)
                continue
            words = part["text"].split(MARK) if isinstance(part, dict) and isinstance(part.get("text"), str) else None
            if words is None or len(words) == 1 or not images:
                placed.append(part)
                continue
            for number, text in enumerate(words):
                if number:
                    if not rest:
                        raise ValueError(f"has more marks {MARK} than images")
                    placed.append({"type": "image", "data": rest.pop(0)})
                if text.strip():
                    placed.append({"type": "text", "text": text})
        out.append(message | {"content": placed or ""})
    if len(rest) == len(images) and images:
        first = next((i for i, message in enumerate(out) if message["role"] == "user"), 0)
        shown = [{"type": "image", "data": picture} for picture in rest]
        words = [part for part in out[first]["content"] if part.get("text")]
        out[first] = out[first] | {"content": [*shown, *words]}
    elif rest:
        raise ValueError(f"has {len(images)} images and {len(images) - len(rest)} places for them")
    return out
