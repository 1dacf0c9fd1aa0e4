"""A conversation is the same document whatever kind of file holds it, and under whatever names its roles go."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from documents import parquet, read_documents
from inputs import write_jsonl
from onecard.calibration.columns import Columns
from onecard.calibration.documents import Document, document_of, spelled
from onecard.calibration.source import ReadLimit, Source
from onecard.calibration.sources import read_source
from onecard.core.errors import InputError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"]}}}]
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def of_jsonl(tmp_path: Path, row: Any, **changes: Any) -> Document:
    (document,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [row]), **changes)
    return document


def of_parquet(tmp_path: Path, row: Any, **changes: Any) -> Document:
    (document,) = read_documents(parquet(tmp_path / "x.parquet", [row]), **changes)
    return document


def roles(document: Document) -> list[str]:
    return [message["role"] for message in document.messages or []]


READERS = pytest.mark.parametrize("read", [of_jsonl, of_parquet])
SPELLINGS = {
    "ShareGPT's names": (["human", "gpt"], ["user", "assistant"]),
    "capitals": (["SYSTEM", "User", "ASSISTANT"], ["system", "user", "assistant"]),
    "OpenAI's newer name": (["developer", "user", "assistant"], ["system", "user", "assistant"]),
    "tools": (["user", "function_call", "observation", "gpt"], ["user", "assistant", "tool", "assistant"]),
    "a role that nobody knows": (["user", "Wizard"], ["user", "wizard"]),
}


@READERS
@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("keys", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_roles_have_one_name_in_every_reader(
    tmp_path: Path, read: Callable[..., Document], kind: str, keys: tuple[str, str, str]
) -> None:
    given, expected = SPELLINGS[kind]
    column, role, content = keys
    document = read(tmp_path, {column: [{role: name, content: f"word {n}"} for n, name in enumerate(given)]})
    assert roles(document) == expected
    assert [message["content"] for message in document.messages or []] == [f"word {n}" for n in range(len(given))]


def test_a_call_of_a_tool_is_the_same_in_its_three_spellings(tmp_path: Path) -> None:
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    spellings = [
        {"role": "function_call", "content": json.dumps(function)},
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
    ]
    found = [of_jsonl(tmp_path, {"messages": [{"role": "user", "content": "?"}, one]}).messages for one in spellings]
    assert found[0] == found[1] == found[2]
    assert (found[0] or [])[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


AGENT = [
    {"role": "user", "content": "how warm is it in Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I must ask"},
    {"role": "tool", "content": "21 degrees", "tool_call_id": "call-1", "name": "weather"},
    {"role": "assistant", "content": "21 degrees", "tool_calls": None, "reasoning_content": None},
]


@pytest.mark.parametrize(
    "tools",
    [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS], None, [], "", "null"],
    ids=["list", "JSON", "list of JSON", "null", "empty", '""', '"null"'],
)
def test_jsonl_and_parquet_keep_the_same(tmp_path: Path, tools: Any) -> None:
    """All keys are carried, null is absent, and `tools` may be a JSON string."""
    row = {"messages": AGENT, "tools": tools}
    one, other = of_jsonl(tmp_path, row), of_parquet(tmp_path, row)
    assert one.messages == other.messages
    assert one.tools == other.tools == (TOOLS if tools not in (None, [], "", "null") else None)
    assert one.digest == other.digest
    assert one.messages == [
        AGENT[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I must ask"},
        AGENT[2],
        {"role": "assistant", "content": "21 degrees"},
    ]
    assert document_of(spelled(one), "x", None).digest == one.digest


@READERS
def test_content_may_be_null_only_beside_what_says_something(tmp_path: Path, read: Callable[..., Document]) -> None:
    with pytest.raises(InputError, match="a message without role or content"):
        read(tmp_path, {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None}]})


@READERS
@pytest.mark.parametrize("tools", ["no JSON", '{"name": "f"}', '["f"]'])
def test_tools_that_are_none_are_refused(tmp_path: Path, read: Callable[..., Document], tools: str) -> None:
    with pytest.raises(InputError, match=r'"tools" that are no list of objects'):
        read(tmp_path, {"messages": AGENT[:1], "tools": tools})


TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]


@READERS
@pytest.mark.parametrize("column", ["text", "messages", "conversations", "chat"])
def test_a_conversation_as_a_json_string_is_a_conversation(
    tmp_path: Path, read: Callable[..., Document], column: str
) -> None:
    columns = Columns(column) if column == "chat" else Columns()
    document = read(tmp_path, {column: json.dumps(TALK)}, columns=columns)
    assert (document.text, document.messages) == (None, TALK)


HELD = {
    "twice": json.dumps(json.dumps(TALK)),
    "an object": json.dumps({"messages": TALK}),
    "an object with tools": json.dumps({"conversations": json.dumps(TALK), "tools": TOOLS}),
    "turns": json.dumps([{"user": "why?", "assistant": "because"}]),
}


@READERS
@pytest.mark.parametrize("column", ["text", "messages", "chat"])
@pytest.mark.parametrize("kind", HELD)
def test_every_json_of_a_conversation_is_one_in_every_column(
    tmp_path: Path, read: Callable[..., Document], column: str, kind: str
) -> None:
    columns = Columns(column) if column == "chat" else Columns()
    document = read(tmp_path, {column: HELD[kind]}, columns=columns)
    assert (document.text, document.messages) == (None, TALK)
    assert document.tools == (TOOLS if "tools" in kind else None)


@READERS
@pytest.mark.parametrize("column", ["text", "messages", "chat"])
def test_a_conversation_that_is_not_whole_is_refused(
    tmp_path: Path, read: Callable[..., Document], column: str
) -> None:
    """Also in a column that may hold any text: Python's spelling, and a list with a message that is null."""
    columns = Columns(column) if column == "chat" else Columns()
    for value, needle in (
        (str(TALK), "in Python's spelling"),
        (json.dumps([*TALK, None]), "message that is no object"),
    ):
        with pytest.raises(InputError, match=needle):
            read(tmp_path, {column: value}, columns=columns)


def test_a_plain_text_with_a_conversation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(json.dumps(TALK, indent=1))
    with pytest.raises(InputError, match=r"x\.txt hold a conversation as JSON: name the file \.jsonl"):
        read_documents(tmp_path / "x.txt")


@READERS
def test_a_text_that_only_looks_like_a_conversation_stays_a_text(tmp_path: Path, read: Callable[..., Document]) -> None:
    for text in ("[1, 2]", '[{"role": "admin", "rights": 3}]', "[not JSON]", "[]", '"quoted"', '{"messages": 3}'):
        assert read(tmp_path, {"text": text}).text == text
    with pytest.raises(InputError, match="no JSON list of messages"):
        read(tmp_path, {"messages": '[{"role": "user"'})


@READERS
def test_a_text_wins_over_a_conversation_and_that_is_said(tmp_path: Path, read: Callable[..., Document]) -> None:
    row = {"text": "rendered already", "messages": TALK}
    assert read(tmp_path, row).text == "rendered already"
    path = next(tmp_path.glob("x.*"))
    for seed in (None, 0):
        (note,) = read_source(Source("both", path), ReadLimit(), seed).notes
        assert note.startswith("1 rows of both hold a text and a conversation: the text is read")
    assert read(tmp_path, row, columns=Columns("messages")).messages == TALK
    assert read(tmp_path, row | {"text": " \n"}).messages == TALK


def test_plain_conversations_digest_as_ever(tmp_path: Path) -> None:
    """Records and baselines of earlier versions hold these digests."""
    talk = [{"role": "system", "content": "Be  brief"}, *TALK]
    document = of_jsonl(tmp_path, {"messages": talk})
    assert document.digest == "d1f24fb7daa338e8211fbf59e9ffb9ad9e6ecfed103ac8ed3efb0d4c133b2daa"
    assert document.likeness == "df01cf7f4345ca9db4437b8fadfcacbb64ef59d602c3ee1e6c306d6cacc99709"
    assert of_parquet(tmp_path, {"conversations": talk}).digest == document.digest


def test_what_is_not_said_makes_no_other_conversation() -> None:
    """A leak is found although one file holds notes beside the words; other calls are another conversation."""
    noted = [message | {"weight": 1, "reasoning_content": "hm"} for message in TALK]
    called = [TALK[0], TALK[1] | {"tool_calls": [CALL]}]
    bare, rich, other = (Document("x", "t", None, messages) for messages in (TALK, noted, called))
    assert bare.likeness == rich.likeness
    listed = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    assert Document("x", "t", None, listed).likeness == bare.likeness
    older = {"type": "function", "function": CALL["function"] | {"arguments": {"city": "Bern"}}}
    assert Document("x", "t", None, [TALK[0], TALK[1] | {"tool_calls": [older]}]).likeness == other.likeness
    assert bare.likeness != other.likeness
    assert len({bare.digest, rich.digest, other.digest}) == 3


NOT_JSON = {
    "a date": (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
    "a day": (datetime.date(2024, 5, 1), "2024-05-01"),
    "a decimal": (decimal.Decimal("0.25"), "0.25"),
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_values_that_json_does_not_have_are_carried_as_strings(tmp_path: Path, kind: str) -> None:
    """Chat logs in Parquet have the time of each message."""
    value, expected = NOT_JSON[kind]
    talk = [message | {"at": value, "head": {"at": [value]}} for message in TALK]
    document = of_parquet(tmp_path, {"messages": talk})
    assert document.messages == [message | {"at": expected, "head": {"at": [expected]}} for message in TALK]
    assert document_of(json.loads(json.dumps(spelled(document))), "x", None).digest == document.digest


@pytest.mark.parametrize("seed", [None, 0])
def test_a_row_with_a_value_that_cannot_be_carried_is_named(tmp_path: Path, seed: int | None) -> None:
    """Bytes beside the words, and a date that Python does not have."""
    path = parquet(tmp_path / "bytes.parquet", [{"messages": [message | {"hash": b"\0\1"} for message in TALK]}])
    with pytest.raises(InputError, match=r'row 0 has a value under "hash" that JSON does not have \(bytes\)'):
        read_source(Source("x", path), ReadLimit(), seed)
    far = pyarrow.array([0, 2**58], pyarrow.timestamp("us"))
    table = pyarrow.table({"messages": [TALK, TALK], "id": far})
    pyarrow.parquet.write_table(table, tmp_path / "far.parquet")
    found = read_source(Source("x", tmp_path / "far.parquet"), ReadLimit(), seed)
    assert (len(found.documents), found.left_out) == (1, 1)
    assert found.reason.startswith("row 1 has a value that cannot be read")


@pytest.mark.parametrize("seed", [None, 0])
def test_every_kind_of_string_column_is_read(tmp_path: Path, seed: int | None) -> None:
    """A draw takes its rows from all of them."""
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b"], kind)}), tmp_path / "x.parquet")
        found = read_source(Source("x", tmp_path / "x.parquet"), ReadLimit(), seed)
        assert [document.text for document in found.documents] == ["a", "b"]


@READERS
def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, read: Callable[..., Document]) -> None:
    for depth in (150, 600, 100_000):
        tools = '[{"a":' + "[" * depth + "]" * depth + "}]"
        with pytest.raises(InputError, match=r"nested too deeply|no list of objects"):
            read(tmp_path, {"messages": TALK, "tools": tools})


@READERS
def test_a_call_with_nothing_in_it_is_no_call(tmp_path: Path, read: Callable[..., Document]) -> None:
    """A typed column has the keys of a call in every message."""
    for key, empty in (
        ("function_call", {"name": None, "arguments": None}),
        ("function_call", {"name": "", "arguments": ""}),
        ("tool_calls", [{"id": None, "function": {"name": None, "arguments": None}}]),
    ):
        document = read(tmp_path, {"messages": [TALK[0], TALK[1] | {key: empty}]})
        assert document.messages == TALK
    called = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": None}}
    (_, message) = read(tmp_path, {"messages": [TALK[0], called]}).messages or []
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "weather"}}]


def test_an_id_holds_no_line_end() -> None:
    """Errors name rows by their ids, one a line."""
    assert document_of({"id": "a\nerror: fake\x1b[2K", "text": "b"}, "x", None).id == "a\ufffderror: fake\ufffd[2K"
