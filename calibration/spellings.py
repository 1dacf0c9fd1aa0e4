"""The spellings of one conversation among which chat templates differ.

parts           a list of texts, or one string
no content      beside calls: an empty string, or null. DeepSeek-V3's template writes calls only where it is null
arguments       of a called tool: an object (transformers' convention), or JSON text (OpenAI's, and DeepSeek-V3's)

What is said stays the same, so each template gets the spelling that it writes whole: first the one that was given, then
those with the fewest changes.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ..core.json_text import json_text
from .messages import json_in, names_called, plain

Message = dict[str, Any]


class _Null:
    """A null that reaches the template: transformers leaves out a message's keys that are null, and gives a template
    what `model_dump` returns."""

    def model_dump(self) -> None:
        return None


NULL = _Null()


def spellings(messages: list[Message]) -> Iterator[list[Message]]:
    """The conversation as it was given, then in its other spellings."""
    tried = [messages]
    yield messages
    choices = itertools.product((None, _joined), (None, _null_beside_calls), (None, _as_objects, _as_json))
    for choice in sorted(choices, key=lambda changes: sum(change is not None for change in changes)):
        spelled = messages
        for change in choice:
            spelled = [change(message) for message in spelled] if change else spelled
        if spelled not in tried:
            tried.append(spelled)
            yield spelled


def alike(message: Message) -> Message:
    """What is said in a message, in the one spelling in which messages are compared: role, content, calls of tools."""
    message = _as_objects(_joined(message))
    said: Message = {key: message[key] for key in ("role", "content") if key in message}
    if message.get("tool_calls"):
        said["tool_calls"] = names_called(message) or message["tool_calls"]
    return said


def _joined(message: Message) -> Message:
    """A list of texts as one string, a line each, as vLLM joins them. A list with pictures stays."""
    content = message["content"]
    if not isinstance(content, list) or any(part["type"] != "text" for part in content):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


def _null_beside_calls(message: Message) -> Message:
    return message | {"content": NULL} if message.get("tool_calls") and message["content"] == "" else message


def _as_objects(message: Message) -> Message:
    return with_arguments(message, lambda given: arguments_in(given) if isinstance(given, str) else given)


def _as_json(message: Message) -> Message:
    return with_arguments(
        message, lambda given: json_text(given, ensure_ascii=False) if isinstance(given, dict) else given
    )


def with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with the arguments of its calls changed. A change to None is none."""
    if not any("arguments" in call for call in names_called(message)):
        return message
    changed = message | {"tool_calls": copy.deepcopy(message["tool_calls"])}
    for call in names_called(changed):
        found = change(call["arguments"]) if "arguments" in call else None
        if found is not None:
            call["arguments"] = found
    return changed


def arguments_in(text: str) -> dict[str, Any] | None:
    """The object that the JSON text of a call's arguments holds; None if it holds something else."""
    found = json_in(text)
    try:
        return plain(found) if isinstance(found, dict) else None
    except ValueError:  # nested too deeply
        return None
