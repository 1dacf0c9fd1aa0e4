"""JSONL files of texts: what a line may hold, and every bad line is named."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from command_line import Refuse
from documents import SAMPLE, conversation, draw_picture, picture, words
from onecard.calibration.sources import read_jsonl
from onecard.core.errors import InputError
from onecard.core.layout import json_bytes

# --- reading JSONL


def test_read_jsonl(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    draw_picture(tmp_path / "cat.png")
    said = {"role": "user", "content": "hello"}
    path = jsonl(
        "some.jsonl",
        [
            {"text": "one", "id": "first", "kind": "docs"},
            "",
            {"messages": [said]},
            "  ",
            conversation(picture("cat.png"), words("what?")),
        ],
    )
    first, second, third = read_jsonl(path)
    assert (first.id, first.kind, first.text, first.messages) == ("first", "docs", "one", None)
    assert (second.id, second.text, second.messages, second.images) == ("some:3", None, [said], ())
    assert third.images == (tmp_path / "cat.png",)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1), separators=st.sampled_from([None, (",", ":")]))
@example(text="a\u2028b\u0085c\x0bd\x1ce", separators=None)
def test_every_text_that_json_can_hold_is_one_line(tmp_path: Path, text: str, separators: Any) -> None:
    """Only a line feed ends a line: JSON allows Unicode's other line ends inside a string."""
    line = json.dumps({"text": text}, ensure_ascii=False, separators=separators)
    (tmp_path / "x.jsonl").write_bytes((line + "\n" + line + "\r\n").encode())
    assert [document.text for document in read_jsonl(tmp_path / "x.jsonl")] == [text, text]


BAD_LINES = {
    "no JSON": "{text: 1}",
    "cut off": '{"text": "on',
    "a number": "5",
    "a list": "[]",
    "no text": '{"prompt": "x"}',
    "empty text": '{"text": ""}',
    "text is a number": '{"text": 5}',
    "half a character": '{"text": "\\ud800"}',
    "half a character in the id": '{"text": "x", "id": "\\udc80"}',
    "half a character in the kind": '{"text": "x", "kind": "\\udc80"}',
    "half a character in a role": '{"messages": [{"role": "\\udc80", "content": "x"}]}',
    "half a character in a call": json.dumps(
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f", "x": ["\udc80"]}}]}]}
    ),
    "half a character in a key": '{"messages": [{"role": "user", "content": "x", "\\udc80": 1}]}',
    "half a character in a tool": '{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "\\udc80"}]}',
    "NaN in a call": '{"messages": [{"role": "user", "content": "x", "tool_calls": [{"x": NaN}]}]}',
    "no messages": '{"messages": []}',
    "message is a string": '{"messages": ["x"]}',
    "no role": '{"messages": [{"content": "x"}]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "content is a number": '{"messages": [{"role": "user", "content": 5}]}',
    "unknown part": json.dumps(conversation({"type": "video", "path": "x"})),
    "text part without text": json.dumps(conversation({"type": "text"})),
    "text part is a number": json.dumps(conversation({"type": "text", "text": 5})),
    "picture without path": json.dumps(conversation({"type": "image"})),
    "missing picture": json.dumps(conversation(picture("none.png"))),
    "picture outside": json.dumps(conversation(picture("../secret.png"))),
    "absolute picture": json.dumps(conversation(picture("/etc/hostname"))),
    "picture through a link": json.dumps(conversation(picture("link.png"))),
    "picture is a folder": json.dumps(conversation(picture("."))),
    "NUL in a path": json.dumps(conversation(picture("a\0b"))),
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(tmp_path: Path, kind: str) -> None:
    """One bad line among good ones is named by its number."""
    folder = tmp_path / "texts"
    folder.mkdir()
    draw_picture(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "x.jsonl").write_text('{"text": "good"}\n' + BAD_LINES[kind] + '\n{"text": "good"}\n')
    with pytest.raises(InputError) as caught:
        read_jsonl(folder / "x.jsonl")
    named = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert [line.split()[:3] for line in named] == [["-", "line", "2"]]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text": "b"}]\n', '[{"text": "a"}]', "[\n]"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_json_array_is_called_that(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"hold one JSON array, .* jq -c '\.\[\]' x\.json"):
        read_jsonl(tmp_path / name)


@pytest.mark.parametrize("text", ['[\n{"text": "a"},\n]', '[{"text": "a"},\n{"text": "b"}'])
def test_a_damaged_json_array_is_called_that(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"begin as one JSON array, and it is damaged \("):
        read_jsonl(tmp_path / "x.json")


def test_a_packed_json_array_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'[{"text": "a"}]'))
    with pytest.raises(InputError, match=r"each row of the unpacked file .* jq -c '\.\[\]' x\.jsonl$"):
        read_jsonl(tmp_path / "x.jsonl.gz")


def test_an_object_over_several_lines_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a"}, indent=2))
    with pytest.raises(InputError, match="one JSON object over several lines"):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9.txt", b"caf\xe9/x.jsonl"])
def test_a_name_that_is_no_utf8_is_refused_before_anything_is_written(
    baby: Callable[..., Path], refuse: Refuse, tmp_path: Path, name: bytes
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / "own") + b"/" + name))
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "a text of many words"}\n')
    for texts in (path, tmp_path / "own") if path.parent.name == "own" else (tmp_path / "own",):
        refuse(baby("llama4-text"), "\\udce9", "rename it", arguments=["--calibration", texts])


@given(value=st.recursive(st.text(st.characters()), lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
@example(value={"\udc80": ["\ud800x", "\ud83d\ude00", "\\ud800", '"\udfff']})
def test_the_writer_of_records_takes_every_string(value: Any) -> None:
    """A record is written at the very end of a run: whatever it holds comes back."""
    written = json_bytes(value)
    written.decode()
    # Python reads two halves that stand side by side as the character that they make.
    assert json_bytes(json.loads(written)) == json_bytes(json.loads(json.dumps(value)))


@pytest.mark.parametrize("which", ["--calibration", "--evaluation"])
def test_all_bad_lines_are_named(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path], which: str
) -> None:
    bad = [*list(BAD_LINES.values())[:7], *SAMPLE, '{"text": 5}']
    numbers = [f"line {n} " for n in (1, 2, 3, 4, 5, 6, 7, 17)]
    path = jsonl("bad.jsonl", bad)
    said = refuse(baby("llama4-text"), path, *numbers, "messages", arguments=[which, path])
    assert "line 8 " not in said


@pytest.mark.parametrize("which", ["--calibration", "--evaluation"])
def test_texts_that_cannot_be_read(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path], tmp_path: Path, which: str
) -> None:
    missing, empty = tmp_path / "none.jsonl", jsonl("empty.jsonl", ["", " "])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    for path in (missing, empty, tmp_path / "latin.jsonl", tmp_path):
        refuse(baby("llama4-text"), path, arguments=[which, path])


def test_a_file_that_is_named_must_exist_even_if_it_is_not_needed(
    baby: Callable[..., Path], refuse: Refuse, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Round-to-nearest reads no calibration texts, but a misspelt file name is still an error."""
    path = tmp_path / "none.jsonl"
    refuse(baby("llama4-text"), path, use=recipe(method="rtn"), arguments=["--calibration", path])


def test_too_little_text(baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path]) -> None:
    short = jsonl("short.jsonl", [{"text": "hi"}])
    refuse(baby("llama4-text"), "calibration", "3 tokens", "24", arguments=["--calibration", short])


def test_data_set_on_an_offline_machine(
    baby: Callable[..., Path],
    refused: Refuse,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clear message shows the way round it, and nothing is written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    use = recipe(evaluation={"source": "someone/texts", "split": "test"})
    result = onecard("quantize", baby("llama4-text"), tmp_path / "out", "--recipe", use)
    refused(result, "someone/texts", "--calibration", "--evaluation", code=4)
    assert {path.name for path in tmp_path.iterdir()} == {use.name}


# --- digests


def test_byte_order_mark_and_text_of_another_type(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b'\xef\xbb\xbf{"text": "from an editor of Windows"}\r\n')
    assert [d.text for d in read_jsonl(marked)] == ["from an editor of Windows"]
    with pytest.raises(InputError, match='"text" that is no string'):
        read_jsonl(jsonl("numbers.jsonl", [{"text": 5}]))
    with pytest.raises(InputError, match="JSONL file"):
        read_jsonl(tmp_path)
