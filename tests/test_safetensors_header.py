"""Whatever the safetensors library refuses, onecard refuses too: a checkpoint is not called sound that no engine opens.

The library itself is the judge, on the same bytes. Where it is lenient and the specification is not (a key twice), the
specification counts.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from babies import shard_files
from command_line import Refuse
from damage import damaged
from onecard.checkpoint.safetensors_header import read_header
from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError
from papers import resum

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWO: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]},
}
DEEP = "[" * 500 + "]" * 500


def entry(**changes: Any) -> str:
    return json.dumps({"a": TWO["a"] | changes})


def second(begin: int, end: int) -> str:
    return json.dumps(TWO | {"b": TWO["b"] | {"data_offsets": [begin, end]}})


def written(inside: str) -> str:
    """A header whose one entry is written out, so that it may hold what json.dumps cannot write."""
    return '{"a":{' + inside + "}}"


# Header and number of data bytes.
HOSTILE: dict[str, tuple[str | bytes, int]] = {
    "UTF-16": (json.dumps(TWO).encode("utf-16"), 12),
    "UTF-16 without a mark": (json.dumps(TWO).encode("utf-16-le"), 12),
    "UTF-32": (json.dumps(TWO).encode("utf-32"), 12),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(TWO).encode(), 12),
    "no UTF-8": (b'{"\xff":' + ENTRY.encode() + b"}", 8),
    "an encoded surrogate": (b'{"\xed\xa0\x80":' + ENTRY.encode() + b"}", 8),
    "half of a surrogate pair": (f'{{"\\ud800":{ENTRY}}}', 8),
    "half of a pair in metadata": (f'{{"__metadata__":{{"x":"\\ud800"}},"a":{ENTRY}}}', 8),
    "dtype twice": (written('"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]'), 8),
    "shape twice": (written('"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]'), 8),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ENTRY}}}', 8),
    "trailing data": (json.dumps(TWO), 13),
    "cut data": (json.dumps(TWO), 11),
    "text behind": (json.dumps(TWO) + "x", 12),
    "zero bytes behind": (json.dumps(TWO) + "\0\0", 12),
    "an overlap": (second(4, 8), 8),
    "a hole": (second(12, 16), 16),
    "a hole first": (entry(data_offsets=[4, 12]), 12),
    "offsets backwards": (entry(data_offsets=[8, 0]), 8),
    "one offset": (entry(data_offsets=[0]), 8),
    "three offsets": (entry(data_offsets=[0, 8, 8]), 8),
    "an offset of -0": (written('"dtype":"F32","shape":[2],"data_offsets":[-0,8]'), 8),
    "a shape of -0": (written('"dtype":"F32","shape":[-0],"data_offsets":[0,0]'), 0),
    "a shape of 02": (written('"dtype":"F32","shape":[02],"data_offsets":[0,8]'), 8),
    "a shape of 2.0": (entry(shape=[2.0]), 8),
    "a shape of true": (entry(shape=[True, 2]), 8),
    "a shape below 0": (entry(shape=[-2]), 8),
    "a shape that is an object": (entry(shape={}), 4),
    "no shape": (written('"dtype":"F32","data_offsets":[0,8]'), 8),
    "an axis past 64 bits": (json.dumps({"a": TWO["a"] | {"shape": [2**64, 0], "data_offsets": [0, 0]}}), 0),
    "axes past 64 bits": (json.dumps({"a": TWO["a"] | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}), 0),
    "dtype in small letters": (entry(dtype="f32"), 8),
    "an unknown dtype": (entry(dtype="Q4"), 8),
    "no dtype": (entry(dtype=None), 8),
    "NaN": (written('"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":NaN'), 8),
    "-Infinity": (written('"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":-Infinity'), 8),
    "1e999": (written('"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1e999'), 8),
    "a number of 5000 digits": (written(f'"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":{"1" * 5000}'), 8),
    "nested 500 deep": (written(f'"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":{DEEP}'), 8),
    "metadata of numbers": (json.dumps({"__metadata__": {"a": 1}} | TWO), 12),
    "metadata of null": (json.dumps({"__metadata__": {"a": None}} | TWO), 12),
    "metadata is a list": (json.dumps({"__metadata__": []} | TWO), 12),
    "a line break in a name": (f'{{"a\n":{ENTRY}}}', 8),
    "a comment": (f'{{"a":{ENTRY}/*c*/}}', 8),
    "a comma too many": (f'{{"a":{ENTRY},}}', 8),
    "a list": ("[" + json.dumps(TWO) + "]", 12),
    "null": ("null", 0),
    "a word": ('"abc"', 0),
    "an entry of null": ('{"a":null}', 0),
}
# The library takes the last; the specification forbids it.
TWICE: dict[str, str] = {
    "a name twice": f'{{"a":{ENTRY},"a":{ENTRY}}}',
    "a name twice in two spellings": f'{{"a":{ENTRY},"\\u0061":{ENTRY}}}',
    "a key twice in metadata": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ENTRY}}}',
}


def as_file(path: Path, header: str | bytes, count: int) -> Path:
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(count))
    return path


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.keys() is not None
    except SafetensorError:
        return False


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_the_library_refuses_is_refused(kind: str, tmp_path: Path) -> None:
    path = as_file(tmp_path / "x.safetensors", *HOSTILE[kind])
    assert not library_takes(path), "a test of this test"
    with pytest.raises(ValueError, match=r"^(has|is) [^\n]+$"):
        read_header(path)


@pytest.mark.parametrize("kind", TWICE)
def test_no_key_occurs_twice(kind: str, tmp_path: Path) -> None:
    path = as_file(tmp_path / "x.safetensors", TWICE[kind], 8)
    assert library_takes(path)
    with pytest.raises(ValueError, match="occurs twice"):
        read_header(path)


@pytest.mark.parametrize("header", [" " + json.dumps(TWO), json.dumps(TWO) + " \n\t", json.dumps(TWO, indent=1)])
def test_white_space_and_the_order_of_entries_are_free(header: str, tmp_path: Path) -> None:
    path = as_file(tmp_path / "x.safetensors", header, 12)
    assert library_takes(path)
    assert {name: info.shape for name, (info, _) in read_header(path).items()} == {"a": (2,), "b": (2,)}
    turned = json.dumps(dict(reversed(TWO.items())))
    assert read_header(as_file(path, turned, 12))["b"][1] == 8 + len(turned) + 8


PIECES = [
    '"a":',
    '"b":',
    ENTRY,
    "{",
    "}",
    ",",
    "[",
    "]",
    "0",
    "2",
    "8",
    "-0",
    "1.0",
    "NaN",
    '"dtype"',
    '"F32"',
    " ",
    "\\u0061",
]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_header_edited_at_random_is_not_taken_where_the_library_refuses_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    text = json.dumps({"__metadata__": {"k": "v"}} | TWO, separators=(",", ":"))
    for _ in range(data.draw(st.integers(1, 2))):
        begin = data.draw(st.integers(0, len(text)))
        end = begin + data.draw(st.sampled_from([0, 0, 1, 4]))
        text = text[:begin] + data.draw(st.sampled_from(PIECES)) + text[end:]
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    path = as_file(tmp_path / "x.safetensors", text.encode(encoding), 12)
    try:
        read_header(path)
    except ValueError:
        return
    assert library_takes(path), text


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "bom": lambda text: b"\xef\xbb\xbf" + text,
    "twice": lambda text: b'{"__metadata__":{"a":"b"},' + text[1:],
}


@pytest.mark.parametrize("kind", SPOILT)
def test_check_and_quantize_say_so(folder: Path, copied: Callable[..., Path], refuse_model: Refuse, kind: str) -> None:
    """No verb calls such a file sound, even where SHA256SUMS fits it."""
    model = copied()
    for place in (folder, model):
        shard = shard_files(place)[0]
        raw = shard.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        text = SPOILT[kind](raw[8 : 8 + length].rstrip())
        shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        assert not library_takes(shard)
    resum(folder)
    damaged(folder, f"{shard_files(folder)[0].name} has a damaged header")
    refuse_model(model, shard_files(model)[0].name, "damaged header", "Fetch")


def test_a_dtype_that_is_not_read_is_no_damage(
    copied: Callable[..., Path], refuse_model: Refuse, onecard: Callable[..., Result]
) -> None:
    """The way out is another version of the checkpoint: fetching it again would give the same."""
    model = copied()
    (file,) = shard_files(model)
    as_file(file, entry(dtype="U64", shape=[1]), 8)
    assert library_takes(file)
    refuse_model(model, file.name, "U64", "bf16")
    assert "etch" not in onecard("inspect", model).stderr
    checked = onecard("check", model)
    assert checked.exit_code == 0, "what cannot be read is not judged"
    assert any("U64" in line for line in json.loads(checked.stdout)["not_checked"])
    with pytest.raises(InputError, match="does not read"):
        open_folder(model)
