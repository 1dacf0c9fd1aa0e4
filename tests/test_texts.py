"""Texts: what a JSONL file may hold, how documents become rows, and that calibration and evaluation share none."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from babies import PATCH
from onecard.calibration.documents import Document, refuse_shared
from onecard.calibration.packing import document_rows, pack_rows
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.core.errors import InputError
from onecard.core.rows import Row, batches
from onecard.models.families import load_adapter

Check = Callable[..., str]
SAMPLE = [{"text": f"a text of many words, number {n}, to be read"} for n in range(9)]


def conversation(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def picture(path: object) -> dict[str, str]:
    return {"type": "image", "path": str(path)}


def draw_picture(path: Path, colour: str = "red") -> Path:
    Image.new("RGB", (20, 12), colour).save(path)
    return path


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
    """A line ends with a line feed, and in no other way: JSON lets the line ends of Unicode stand in a string."""
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


@pytest.mark.parametrize("which", ["--calibration", "--evaluation"])
def test_all_bad_lines_are_named(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path], which: str
) -> None:
    bad = [*list(BAD_LINES.values())[:7], *SAMPLE, '{"text": 5}']
    numbers = [f"line {n} " for n in (1, 2, 3, 4, 5, 6, 7, 17)]
    path = jsonl("bad.jsonl", bad)
    said = refuse(baby("llama4-text"), path, *numbers, "messages", arguments=[which, path])
    assert "line 8 " not in said


@pytest.mark.parametrize("which", ["--calibration", "--evaluation"])
def test_texts_that_cannot_be_read(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path], tmp_path: Path, which: str
) -> None:
    missing, empty = tmp_path / "none.jsonl", jsonl("empty.jsonl", ["", " "])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    for path in (missing, empty, tmp_path / "latin.jsonl", tmp_path):
        refuse(baby("llama4-text"), path, arguments=[which, path])


def test_a_file_that_is_named_must_exist_even_if_it_is_not_needed(
    baby: Callable[..., Path], refuse: Check, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Round-to-nearest reads no calibration texts; a misspelt name is a mistake all the same."""
    path = tmp_path / "none.jsonl"
    refuse(baby("llama4-text"), path, use=recipe(method="rtn"), arguments=["--calibration", path])


def test_too_little_text(baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path]) -> None:
    short = jsonl("short.jsonl", [{"text": "hi"}])
    refuse(baby("llama4-text"), "calibration", "3 tokens", "24", arguments=["--calibration", short])


def test_data_set_on_an_offline_machine(
    baby: Callable[..., Path],
    refused: Check,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clear message that shows the way round it, and nothing written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    use = recipe(evaluation={"source": "someone/texts", "split": "test"})
    result = onecard("quantize", baby("llama4-text"), tmp_path / "out", "--recipe", use)
    refused(result, "someone/texts", "--calibration", "--evaluation", code=4)
    assert {path.name for path in tmp_path.iterdir()} == {use.name}


# --- what a model can take


def test_pictures_for_a_model_that_cannot_see(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    draw_picture(tmp_path / "cat.png")
    rows = [*SAMPLE, conversation(picture("cat.png")) | {"id": "cat"}, conversation(picture("cat.png")) | {"id": "dog"}]
    refuse(baby("qwen3"), "cat", "dog", "vision", arguments=["--evaluation", jsonl("pictures.jsonl", rows)])


def _png_of_a_billion_pixels() -> bytes:
    header = b"IHDR" + struct.pack(">II5B", 40_000, 30_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header)) + bytes(4) + b"IDAT"


@pytest.mark.parametrize("kind", ["no picture", "cut off", "a billion pixels"])
def test_damaged_pictures_are_all_named(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    Image.effect_noise((40, 40), 90).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:400]
    content = {"no picture": b"GIF, or so", "cut off": cut, "a billion pixels": _png_of_a_billion_pixels()}[kind]
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(content)
    rows = [*SAMPLE, *(conversation(picture(name)) for name in ("cat.png", "whole.png", "dog.png"))]
    refuse(baby("scout"), "cat.png", "dog.png", arguments=["--evaluation", jsonl("pictures.jsonl", rows)])


def test_damaged_picture_settings(
    copied: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied("scout")
    (model / "preprocessor_config.json").write_text("{")
    draw_picture(tmp_path / "cat.png")
    path = jsonl("pictures.jsonl", [conversation(picture("cat.png"))])
    refuse(model, "preprocessor_config.json", arguments=["--evaluation", path])


def test_a_conversation_that_the_template_refuses(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path]
) -> None:
    """Chat templates refuse roles, and turns out of order: every such document is named, with the template's words."""
    rows = [
        *SAMPLE,
        *({"messages": [{"role": "wizard", "content": "abracadabra"}], "id": i} for i in ("spell", "curse")),
    ]
    path = jsonl("wizards.jsonl", rows)
    refuse(baby("llama4-text"), "spell", "curse", "only user and assistant may speak", arguments=["--evaluation", path])


def test_conversations_without_a_template(
    copied: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path]
) -> None:
    model = copied()
    (model / "chat_template.jinja").unlink()
    rows = [*SAMPLE, *({"messages": [{"role": "user", "content": "hello"}], "id": i} for i in ("talk", "chat"))]
    refuse(model, "talk", "chat", "chat template", arguments=["--evaluation", jsonl("talks.jsonl", rows)])


MARKERS = ["<|patch|>", "<|image|>", "<|image_start|><|image|><|image_end|>"]


@pytest.mark.parametrize("marker", MARKERS)
def test_a_text_that_spells_an_image_marker(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Check,
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    marker: str,
) -> None:
    """Texts about such models spell their markers. With pictures in the same row they must not be taken for one: they
    are read as plain words, or refused by name; never a traceback."""
    draw_picture(tmp_path / "cat.png")
    question = conversation(picture("cat.png"), words(f"what is a {marker}?"))
    answer = conversation(picture("cat.png"), words(f"a {marker} is a word."))
    told = [{"text": f"{n}: an image is {marker} in the text, as everybody knows", "id": f"told-{n}"} for n in range(9)]
    calibration = jsonl("calibration.jsonl", [conversation(picture("cat.png")), *told, question])
    evaluation = jsonl("evaluation.jsonl", [answer | {"id": "answer"}, *SAMPLE])
    use = recipe(calibration_row_tokens=48, evaluation_row_tokens=48)
    result = onecard(
        "quantize",
        baby("scout"),
        tmp_path / "out",
        "--recipe",
        use,
        "--calibration",
        calibration,
        "--evaluation",
        evaluation,
    )
    if result.exit_code:
        refused(result, "answer")


# --- encoding


@pytest.fixture
def encoder(baby: Callable[..., Path]) -> Encoder:
    return Encoder(baby("scout"), load_adapter(baby("scout")))


def spelled(encoder: Encoder, row: Row) -> str:
    return str(encoder.tokenizer.decode(row.tokens))


def test_encode_text_and_conversation(encoder: Encoder) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [words("yo")]}]
    assert spelled(encoder, encoder.encode(Document("d", "text", "hi", None))) == "<s>hi"
    assert spelled(encoder, encoder.encode(Document("d", "text", None, talk))) == "<s><|user|>hi<|assistant|>yo"
    asked = encoder.encode(Document("d", "text", None, talk[:1]), ask=True)
    assert spelled(encoder, asked) == "<s><|user|>hi<|assistant|>"
    assert asked.pixels is None


def test_encode_pictures(encoder: Encoder, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """One tile an image: a placeholder for each of its features, and its pixels, red first, as the settings say."""
    draw_picture(tmp_path / "red.png", "red")
    draw_picture(tmp_path / "blue.png", "blue")
    row = conversation(picture("red.png"), words("or"), picture("blue.png"))
    (document,) = read_jsonl(jsonl("x.jsonl", [row]))
    encoded = encoder.encode(document)
    count = encoder.adapter.image_token_count()
    tile = "<|image_start|><|image|>" + "<|patch|>" * count + "<|image_end|>"
    assert spelled(encoder, encoded) == f"<s><|user|>{tile}or{tile}"
    assert int((encoded.tokens == PATCH).sum()) == 2 * count
    assert encoded.pixels is not None
    side = encoder.adapter.config.vision_config.image_size
    assert encoded.pixels.shape == (2, 3, side, side)
    # Mean and deviation of 0.5 take 0..1 to -1..1.
    expected = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[:, :, None, None].expand(2, 3, side, side)
    torch.testing.assert_close(encoded.pixels, expected)


# --- digests


def test_byte_order_mark_and_text_of_another_type(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b'\xef\xbb\xbf{"text": "from an editor of Windows"}\r\n')
    assert [d.text for d in read_jsonl(marked)] == ["from an editor of Windows"]
    with pytest.raises(InputError, match='"text" that is no string'):
        read_jsonl(jsonl("numbers.jsonl", [{"text": 5}]))
    with pytest.raises(InputError, match="JSONL file"):
        read_jsonl(tmp_path)


def test_a_shared_text_is_found_in_other_spacing_and_case() -> None:
    left = [Document("a", "text", "One text, and  another.", None), Document("b", "text", "two", None)]
    right = [Document("c", "text", "one text,\nand another. ", None), Document("d", "text", "two three", None)]
    with pytest.raises(InputError, match="c is a of the calibration texts"):
        refuse_shared(left, right)
    talk = [{"role": "user", "content": [{"type": "text", "text": " Hello"}]}]
    same = [{"role": "user", "content": [{"type": "text", "text": "hello "}]}]
    with pytest.raises(InputError, match="1 evaluation texts"):
        refuse_shared([Document("a", "text", None, talk)], [Document("b", "text", None, same)])
    refuse_shared([Document("a", "text", None, talk)], [Document("b", "text", "hello", None)])


def test_a_text_that_stands_there_twice_is_one_draw(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{"text": text} for text in ("one text of its own", "another one", "another one", "one text of its own")]
    arguments = ["--recipe", recipe(method="rtn"), "--evaluation", jsonl("twice.jsonl", rows)]
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    assert record["kl"]["documents"] == 2
    assert any("2 of the evaluation texts repeat others" in warning for warning in record["warnings"])


def test_texts_of_which_most_is_not_used(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{"text": "a word and one more " * 200}, {"text": "short"}]
    arguments = ["--recipe", recipe(method="rtn"), "--evaluation", jsonl("long.jsonl", rows)]
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    facts = record["texts"]["evaluation"]
    assert facts["tokens"] < facts["tokens_given"] / 10
    warning, few = record["warnings"]
    assert few.startswith("2 evaluation documents")
    assert f"{facts['tokens']:,} of the {facts['tokens_given']:,} tokens" in warning
    assert "evaluation_row_tokens" in warning
    assert "evaluation_row_tokens" in result.stderr


def test_digest_is_of_what_a_model_sees(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red")
    draw_picture(tmp_path / "b.png", "blue")
    first, renamed = read_jsonl(jsonl("x.jsonl", [{"text": "one", "id": "x"}, {"text": "one", "id": "y", "kind": "z"}]))
    assert first.digest == renamed.digest
    rows = [conversation(picture("a.png")), conversation(picture("b.png"))]
    red, blue = (document.digest for document in read_jsonl(jsonl("y.jsonl", rows)))
    draw_picture(tmp_path / "a.png", "green")
    green, still_blue = (document.digest for document in read_jsonl(tmp_path / "y.jsonl"))
    assert len({red, green, blue}) == 3
    assert still_blue == blue
    user, assistant = ([{"role": role, "content": "one"}] for role in ("user", "assistant"))
    digests = {Document("x", "text", None, m).digest for m in (user, assistant)} | {first.digest}
    assert len(digests) == 3


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_refuse_shared_names_all_that_is_shared_and_nothing_else(left: list[str], right: list[str]) -> None:
    calibration = [Document(f"C-{t}-", "text", f"text {t}", None) for t in left]
    evaluation = [Document(f"E-{t}-", "text", f"text {t}", None) for t in right]
    shared = set(left) & set(right)
    if not shared:
        refuse_shared(calibration, evaluation)
        return
    with pytest.raises(InputError) as caught:
        refuse_shared(calibration, evaluation)
    said = str(caught.value)
    assert {t for t in "abcdefgh" if f"E-{t}-" in said} == shared
    assert {t for t in "abcdefgh" if f"C-{t}-" in said} == shared


def test_evaluation_that_shares_documents_with_calibration(
    baby: Callable[..., Path], refuse: Check, jsonl: Callable[..., Path]
) -> None:
    calibration = jsonl("c.jsonl", SAMPLE)
    evaluation = jsonl("e.jsonl", [{"text": "held out"}, SAMPLE[4] | {"id": "four"}, SAMPLE[7] | {"id": "seven"}])
    refuse(
        baby("llama4-text"),
        "four",
        "seven",
        "c:5",
        "c:8",
        arguments=["--calibration", calibration, "--evaluation", evaluation],
    )


# --- rows


@st.composite
def token_documents(draw: st.DrawFn, pictures: bool = False) -> list[Row]:
    """Documents whose tokens all differ, so that a row's tokens say where they come from; some with a picture."""
    lengths = draw(st.lists(st.integers(0, 12), max_size=12))
    documents, start = [], 0
    for number, length in enumerate(lengths):
        seen = pictures and length > 0 and draw(st.booleans())
        pixels = torch.full((1, 3, 1, 1), float(number)) if seen else None
        documents.append(Row(f"d{number}", "text", torch.arange(start, start + length), pixels))
        start += length
    return documents


@given(token_documents(), st.integers(1, 10), st.integers(1, 8), st.integers(0, 3))
def test_packed_texts_are_a_cut_stream(documents: list[Row], length: int, most: int, seed: int) -> None:
    """Rows are exactly `length` long; end to end they are the documents, whole and in some order, cut at the end."""
    total = sum(len(document.tokens) for document in documents)
    if total < length:
        with pytest.raises(InputError, match=f"{total:,} tokens"):
            pack_rows(documents, length, most, seed)
        return
    rows = pack_rows(documents, length, most, seed)
    assert [len(row.tokens) for row in rows] == [length] * min(most, total // length)
    stream = torch.cat([row.tokens for row in rows]).tolist()
    by_first = {int(d.tokens[0]): d.tokens.tolist() for d in documents if len(d.tokens)}
    rest = stream
    while rest:
        document = by_first.pop(rest[0])  # each is used once, from its first token on
        assert rest[: len(document)] == document[: len(rest)]
        rest = rest[len(document) :]


@given(token_documents(pictures=True), st.integers(1, 16), st.integers(1, 8), st.integers(0, 3))
def test_packed_pictures_are_never_cut(documents: list[Row], length: int, most: int, seed: int) -> None:
    try:
        rows = pack_rows(documents, length, most, seed)
    except InputError:
        return
    seen: list[int] = []
    for row in rows:
        tokens = row.tokens.tolist()
        assert len(tokens) == length
        seen += tokens
        inside = [d for d in documents if d.pixels is not None and set(d.tokens.tolist()) & set(tokens)]
        starts = []
        for document in inside:  # whole, in one piece
            start = tokens.index(int(document.tokens[0]))
            assert tokens[start : start + len(document.tokens)] == document.tokens.tolist()
            starts.append(start)
        order = [d for _, d in sorted(zip(starts, inside, strict=True), key=lambda pair: pair[0])]
        if order:  # the pixels come in the order of their placeholders
            assert row.pixels is not None
            assert torch.equal(row.pixels, torch.cat([d.pixels for d in order if d.pixels is not None]))
        else:
            assert row.pixels is None
    assert len(seen) == len(set(seen))
    assert len(rows) <= most


def test_packing_is_seeded() -> None:
    rng = random.Random(0)
    documents = [Row(str(n), "text", torch.tensor([rng.randrange(99) for _ in range(7)])) for n in range(30)]
    rows = [torch.stack([row.tokens for row in pack_rows(documents, 16, 9, seed)]) for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@given(token_documents(pictures=True), st.integers(2, 12), st.integers(1, 8))
def test_evaluation_rows_are_the_heads_of_documents(documents: list[Row], length: int, most: int) -> None:
    usable = [d for d in documents if len(d.tokens) >= 2 and (d.pixels is None or len(d.tokens) <= length)]
    if not usable:
        with pytest.raises(InputError):
            document_rows(documents, length, most)
        return
    rows = document_rows(documents, length, most)
    assert [row.document for row in rows] == [d.document for d in usable[:most]]
    for row, document in zip(rows, usable, strict=False):
        assert row.tokens.tolist() == document.tokens.tolist()[:length]
        assert row.pixels is document.pixels


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 30))
def test_batches(lengths: list[int], limit: int) -> None:
    """Every row once, rows of one length together, and never more tokens than allowed but for a single longer row."""
    rows = [Row(str(n), "text", torch.zeros(length, dtype=torch.int64)) for n, length in enumerate(lengths)]
    groups = batches(rows, limit)
    assert sorted(n for group in groups for n in group) == list(range(len(rows)))
    for group in groups:
        assert len({lengths[n] for n in group}) == 1
        assert len(group) == 1 or sum(lengths[n] for n in group) <= limit
    # Not one batch more than needed.
    for length in set(lengths):
        count, step = lengths.count(length), max(1, limit // length)
        assert sum(lengths[group[0]] == length for group in groups) == -(-count // step)
