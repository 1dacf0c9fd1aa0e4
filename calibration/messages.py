"""Messages in one spelling, whatever file or data set they come from.

roles       in lower case, and under the names that chat templates know (ROLES)
keys        all are carried: a template may read any of them. A key that is null counts as absent, since a typed
            column has every key in every message
values      JSON's own. Of the others that a Parquet file has, dates, times and decimals become strings
content     may be absent beside tool calls or reasoning: it is then empty
calls       `tool_calls`; ShareGPT's role function_call and OpenAI's older key function_call become one
tools       a list of JSON objects, of JSON strings of them, or the same as one JSON string
"""

import datetime as dates
import decimal
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

# The columns of conversations, in the order in which they are tried.
CONVERSATIONS = ("messages", "conversations", "conversation")
# What the program prints that forgot to write JSON.
_IN_PYTHON = re.compile(r"\s*(\{\s*'(messages|conversations?)'\s*:|\[\s*\{\s*'(role|from|content|value)'\s*:)")
# So many times a string is opened.
_MOST_STRINGS = 3
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
# Deeper values are refused: a program that follows them ends at its stack's own limit.
MOST_DEPTH = 100


def plain(value: Any, key: str = "value", depth: int = 0) -> Any:
    """`value`, which stands under `key`, as JSON has it, without the keys that are null at any depth.

    Raises ValueError for values that JSON does not have, and for those that are nested too deeply.
    """
    if depth > MOST_DEPTH:
        raise ValueError(f"is nested too deeply (more than {MOST_DEPTH} levels)")
    match value:
        case dict():
            return {str(k): plain(entry, str(k), depth + 1) for k, entry in value.items() if entry is not None}
        case list() | tuple():
            return [plain(entry, key, depth + 1) for entry in value]
        case dates.date() | dates.time():
            return value.isoformat()
        case decimal.Decimal() | dates.timedelta() | uuid.UUID():
            return str(value)
        case None | str() | int() | float():
            return value
        case bytes() if key == "data":  # a picture's file, which documents.py takes out
            return value
    raise ValueError(f'has a value under "{key}" that JSON does not have ({type(value).__name__}): leave that key out')


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
    if isinstance(older, dict) and not any(older.values()):  # a typed column's way to say that there is none
        del message["function_call"]
    elif isinstance(older, dict) and not message.get("tool_calls"):
        del message["function_call"]
        return message | {"tool_calls": [_call(older)]}
    if spoken and isinstance(message.get("content"), str):
        calls = json_in(message["content"])
        calls = calls if isinstance(calls, list) else [calls]
        if calls and all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            return message | {"content": "", "tool_calls": [_call(call) for call in calls]}
    if isinstance(message.get("tool_calls"), str):
        message = message | {"tool_calls": objects("tool_calls", message["tool_calls"])}
    if isinstance(message.get("tool_calls"), list) and not any(map(_says, message["tool_calls"])):
        del message["tool_calls"]
    return message


def _says(call: Any) -> bool:
    """Whether anything stands in a call of a tool. A typed column may have one whose every key is null."""
    return any(map(_says, call.values())) if isinstance(call, dict) else bool(call)


def _call(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": plain(function)}


def objects(key: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, given as such, as JSON strings or as one; null and "" are an empty list. Raises ValueError."""
    found = value or []
    if isinstance(value, str):
        found = [] if value.strip() in ("", "null") else json_in(value)
    if isinstance(found, list):
        found = [json_in(entry) if isinstance(entry, str) else entry for entry in found]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f'has "{key}" that are no list of objects, nor one as a JSON string')
    return [plain(entry, key) for entry in found]


def json_in(text: str) -> Any:
    """What a JSON text holds; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def conversation_in(text: str, speaker: tuple[str, ...], said: tuple[str, ...]) -> dict[str, Any] | None:
    """The conversation that a string holds as JSON, under `messages`, with `tools` where it has them; else None.

    It holds a list of messages, or an object with such a list. A JSON string of a JSON string is opened. A message has
    one of the keys `speaker`, and one of `said` or of those that may stand in its place; or it is a {user, assistant}
    turn. Raises ValueError for a conversation in Python's spelling.
    """
    text = opened(text)
    if _IN_PYTHON.match(text):
        raise ValueError("holds a conversation in Python's spelling: write it as JSON")
    found = json_in(text) if text.lstrip()[:1] in ("[", "{") else None
    row = found if isinstance(found, dict) else {"messages": found}
    held = next((row[key] for key in CONVERSATIONS if row.get(key)), None)
    if isinstance(held, str) and isinstance(found, dict):
        inner = conversation_in(held, speaker, said)
        return inner and {"tools": row.get("tools")} | inner

    def speaks(message: Any) -> bool:
        keys = message.keys() if isinstance(message, dict) else set()
        return bool(keys & {*speaker} and keys & {*said, *BESIDE_CONTENT}) or {"user", "assistant"} <= keys

    if not isinstance(held, list) or not any(map(speaks, held)):
        return None
    return {"messages": held} | ({"tools": row["tools"]} if row.get("tools") else {})


def opened(text: str) -> str:
    """What a JSON string holds, if that is JSON again; else the text itself."""
    inner = text
    for _ in range(_MOST_STRINGS):
        found = json_in(inner) if inner.lstrip().startswith('"') else None
        if not isinstance(found, str):
            break
        inner = found
    return inner if inner.lstrip()[:1] in ("[", "{") else text


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
