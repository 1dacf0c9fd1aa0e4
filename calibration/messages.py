"""Messages in one spelling, whatever file or data set they come from.

roles       in lower case, and under the names that chat templates know (ROLES)
keys        all are carried: a template may read any of them. A key that is null counts as absent, since a typed
            column has every key in every message
content     may be absent beside tool calls or reasoning: it is then empty
calls       `tool_calls`; ShareGPT's role function_call and OpenAI's older key function_call become one
tools       a list of JSON objects, or the same as a JSON string
"""

import json
from collections.abc import Iterator
from typing import Any

# Other names for the roles that chat templates know.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
# A message without content may hold one of these.
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def plain(value: Any) -> Any:
    """`value` without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def role_of(name: str) -> str:
    """The name that chat templates know for a role."""
    folded = name.strip().casefold()
    return ROLES.get(folded, folded)


def normalized(message: Any) -> dict[str, Any]:
    """One message with `role` and `content`. Raises ValueError that says what is wrong with it."""
    if not isinstance(message, dict):
        raise ValueError("has a message that is no object")
    if not isinstance(message.get("role"), str):
        raise ValueError("has a message without role or content")
    found = _with_calls(plain(message))
    found["role"] = role_of(message["role"])
    if "content" not in found and any(found.get(key) for key in BESIDE_CONTENT):
        found["content"] = ""
    if "content" not in found:
        raise ValueError("has a message without role or content")
    if not isinstance(found["content"], str) and not (isinstance(found["content"], list) and found["content"]):
        raise ValueError("has a message whose content is neither a string nor a list of parts")
    return found


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls of tools under `tool_calls`, where it has any."""
    spoken = message["role"].strip().casefold() == "function_call"
    older = message.get("function_call")
    if isinstance(older, dict) and not message.get("tool_calls"):
        message = {key: value for key, value in message.items() if key != "function_call"}
        return message | {"tool_calls": [_call(older)]}
    if spoken and isinstance(message.get("content"), str):
        calls = _json(message["content"])
        calls = calls if isinstance(calls, list) else [calls]
        if calls and all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            return message | {"content": "", "tool_calls": [_call(call) for call in calls]}
    if isinstance(message.get("tool_calls"), str):
        message = message | {"tool_calls": objects("tool_calls", message["tool_calls"])}
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    return message


def _call(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": plain(function)}


def objects(key: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, given as such or as a JSON string; null and "" are an empty list. Raises ValueError."""
    found = _json(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f'has "{key}" that are no list of objects, nor one as a JSON string')
    return [plain(entry) for entry in found]


def _json(text: str) -> Any:
    """What a JSON text holds; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def conversation_in(text: str, speaker: tuple[str, ...], said: tuple[str, ...]) -> list[Any] | None:
    """The messages that a JSON string holds; None if it holds something else.

    Each message has one of the keys `speaker`, and one of `said` or of those that may stand in its place.
    """
    if not (text.lstrip().startswith("[") and text.rstrip().endswith("]")):
        return None
    found, words = _json(text), {*said, *BESIDE_CONTENT}
    if not isinstance(found, list) or not found:
        return None
    spoken = all(
        isinstance(message, dict) and message.keys() & {*speaker} and message.keys() & words for message in found
    )
    return found if spoken else None


def names_called(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a message that name the tools it calls."""
    calls = message.get("tool_calls")
    found = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [call for call in found if isinstance(call, dict) and isinstance(call.get("name"), str)]


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from strings(key)
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)


def refuse_half_characters(what: str, value: Any) -> None:
    """JSON can hold half of a surrogate pair, and so can a file's name. No tokenizer, file or terminal takes one.

    Raises ValueError that calls the value `what`.
    """
    for text in strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has half of a surrogate pair in its {what}, at character {error.start}") from None
