"""Calibration sources: file kinds, column mappings, data sets, mixtures, long rows, and what is said of bad ones."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onecard.calibration.columns import Columns, document_from
from onecard.calibration.documents import Document, document_of, spelled
from onecard.calibration.packing import RowLayout, mixed, pack, quotas
from onecard.calibration.sources import ReadLimit, Source, read_source, split_by_digest
from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError
from onecard.core.rows import Part, Row
from onecard.recipe import Recipe, load_recipe

Check = Callable[..., str]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path, **changes: Any) -> list[Document]:
    return read_source(Source(path.name, path, **changes), ReadLimit(), None).documents


def said(document: Document) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in document.messages or []]


# --- file kinds


def test_every_kind_of_file_and_a_folder_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("not read")
    (folder / "picture.png").write_bytes(png())
    (folder / "a.txt").write_text("one long text\n\nof two paragraphs\n")
    (folder / "b.md").write_text("# A page")
    (folder / "c.jsonl").write_text('{"text": "a line"}\n{"text": "another"}\n')
    parquet(folder / "deep" / "d.parquet", [{"text": "a cell"}, {"text": None}, {"text": "a third"}])
    found = read_source(Source("mine", folder), ReadLimit(), None)
    assert [d.text for d in found.documents] == [
        "one long text\n\nof two paragraphs\n",
        "# A page",
        "a line",
        "another",
        "a cell",
        "a third",
    ]
    assert (found.left_out, {d.source for d in found.documents}) == (1, {"mine"})
    assert found.reason.startswith("row 1 ")


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b" \n", "empty"),
    "empty.jsonl": (b"\n", "empty"),
    "empty.parquet": (b"", "Parquet"),
    "binary.txt": (bytes(range(256)), "UTF-8"),
    "nul.md": (b"a\0b", "NUL"),
    "cut.parquet": (b"PAR1 and then nothing", "Parquet"),
    "table.csv": (b"a,b\n1,2\n", ".parquet"),
    "noname": (b"text", ".jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read(baby: Callable[..., Path], refuse: Check, tmp_path: Path, name: str) -> None:
    content, needle = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    refuse(baby("llama4-text"), path, needle, arguments=["--calibration", path])


def test_a_folder_without_texts(baby: Callable[..., Path], refuse: Check, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    refuse(baby("llama4-text"), tmp_path / "none", "holds no texts", arguments=["--calibration", tmp_path / "none"])


def test_a_line_of_a_million_characters(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "long " * 400_000}) + "\n")
    (document,) = read(tmp_path / "x.jsonl")
    assert len(document.text or "") == 2_000_000


# --- columns

SHAREGPT = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]
MAPPINGS: dict[str, tuple[dict[str, Any], Columns]] = {
    "ShareGPT": ({"conversations": SHAREGPT}, Columns()),
    "keys of its own": (
        {"talk": [{"who": "user", "says": "why?"}, {"who": "assistant", "says": "because"}]},
        Columns("talk", role_key="who", content_key="says"),
    ),
    "prompt and response": ({"q": "why?", "a": "because"}, Columns(prompt_column="q", response_column="a")),
    "turns": ({"texts": [{"user": "why?", "assistant": "because", "source": "x"}]}, Columns("texts")),
    "usual": (
        {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]},
        Columns(),
    ),
}


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns(tmp_path: Path, kind: str, suffix: str) -> None:
    row, columns = MAPPINGS[kind]
    path = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        parquet(path, [row])
    (document,) = read(path, columns=columns)
    assert said(document) == [("user", "why?"), ("assistant", "because")]


def pictured(row: dict[str, Any], columns: Columns) -> tuple[list[list[str]], tuple[bytes, ...]]:
    document = document_from(row, columns, "x", None, "s", None)
    words = [[p.get("text", "<>") for p in m["content"]] for m in document.messages or []]
    return words, tuple(p if isinstance(p, bytes) else p.read_bytes() for p in document.images)


def test_pictures_in_columns() -> None:
    """As bytes, as a dict of them, decoded; at their marks, or before the first words."""
    red, blue = png("red"), png("blue")
    turns = [{"user": "what?", "assistant": "red"}, {"user": "sure?", "assistant": "yes"}]
    columns = Columns("texts", image_column="images")
    words = [["<>", "<>", "what?"], ["red"], ["sure?"], ["yes"]]
    assert pictured({"images": [{"bytes": red, "path": None}, blue], "texts": turns}, columns) == (words, (red, blue))
    marked = [{"from": "human", "value": "<image>\nwhat? and <image>"}, {"from": "gpt", "value": "two"}]
    columns = Columns("conversations", image_column="image")
    words = [["<>", "\nwhat? and ", "<>"], ["two"]]
    assert pictured({"image": [red, blue], "conversations": marked}, columns) == (words, (red, blue))
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "see ", "x": None}, {"type": "image", "text": None}]}
    ]
    assert pictured({"i": red, "messages": parts}, Columns(image_column="i")) == ([["see ", "<>"]], (red,))
    words, (decoded,) = pictured({"i": Image.open(io.BytesIO(red)), "text": "a red tile"}, Columns(image_column="i"))
    assert words == [["<>"], ["a red tile"]]
    assert Image.open(io.BytesIO(decoded)).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="2 images and 1 places"):
        pictured(
            {"i": [red, blue], "conversations": [{"from": "human", "value": "<image>?"}]}, Columns(image_column="i")
        )
    with pytest.raises(ValueError, match="more marks"):
        pictured({"i": red, "conversations": [{"from": "human", "value": "<image><image>"}]}, Columns(image_column="i"))


def test_a_picture_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    here = {"type": "image", "path": "a.png"}
    inside = {"type": "image", "data": base64.b64encode(png()).decode()}
    one, two = (
        document_of({"messages": [{"role": "user", "content": [part]}]}, "x", tmp_path) for part in (here, inside)
    )
    other = document_of(spelled(one), "x", None)
    assert one.digest == two.digest == other.digest
    assert (
        document_of({"messages": [{"role": "user", "content": [inside | {"data": "////"}]}]}, "x", None).digest
        != one.digest
    )
    with pytest.raises(ValueError, match="base64"):
        document_of({"messages": [{"role": "user", "content": [{"type": "image", "data": "?"}]}]}, "x", None)
    with pytest.raises(ValueError, match="no folder"):
        document_of({"messages": [{"role": "user", "content": [here]}]}, "x", None)


def test_wrong_columns(
    baby: Callable[..., Path],
    refused: Check,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The message says what is missing and what there is; both halves of a pair, a mixture's keys."""
    path = parquet(tmp_path / "x.parquet", [{"question": "why?", "reply": "because"}])
    mapping = {"source": str(path), "prompt_column": "question", "response_column": "answer"}
    bare = ["--evaluation", parquet(tmp_path / "e.parquet", [{"text": "held out"}])]
    for texts, needles in (
        ({"source": str(path)}, ["any of text, messages", "question, reply"]),
        (mapping, ["no column answer", "question, reply"]),
        ({"source": str(path), "column": "question", "role_key": 5}, ["role_key"]),
        ({"source": str(path), "prompt_column": "question"}, ["prompt_column and response_column"]),
        ({"split": "test", "mixture": [{"source": "demo"}]}, ["move split into its entries"]),
        ({"mixture": []}, ["mixture is empty"]),
        ({"mixture": [{"source": "demo", "wait": 1}, {"weight": 0}]}, ["mixture.0.wait: unknown", "mixture.1.weight"]),
    ):
        use = recipe(calibration=texts)
        refused(onecard("calibration", "show", baby("llama4-text"), "--recipe", use, *bare), *needles)


# --- data sets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`load_dataset` of a hub that has what is put here, as the library itself streams it."""
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None = None, *, split: str, streaming: bool) -> Any:
        assert streaming
        asked.append((name, config, split))

        def rows() -> Iterator[dict[str, Any]]:
            for number in range(400):
                text = f"{name} {split} number {number} of many words to be read"
                match name:
                    case "some/chats":
                        yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
                    case "some/pictures":
                        yield {
                            "images": [{"bytes": png(), "path": None}],
                            "texts": [{"user": text[:20], "assistant": "red"}],
                        }
                    case "some/books":
                        yield {"text": f"book {number} " + "of many words " * 5000}
                    case "some/broken":
                        yield {"text": text}
                        raise ConnectionError("the line went dead")
                    case _:
                        yield {"code": text if number % 2 else ""}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


MIXTURE = {
    "mixture": [
        {"source": "some/chats", "split": "train_sft", "kind": "conversation", "weight": 0.5},
        {"source": "some/code", "config": "python", "column": "code", "kind": "code", "weight": 0.3},
        {"source": "some/pictures", "column": "texts", "image_column": "images", "kind": "image", "weight": 0.2},
    ]
}


def test_a_mixture_of_data_sets(
    baby: Callable[..., Path], recipe: Callable[..., Path], hub: list[tuple[Any, ...]]
) -> None:
    use = load_recipe(
        str(
            recipe(
                calibration=MIXTURE,
                evaluation={"source": "some/chats", "split": "test_sft"},
                calibration_rows=60,
                calibration_row_tokens=64,
                calibration_long_share=0.2,
                calibration_long_row_tokens=192,
            )
        )
    )
    texts = prepare_texts(open_model(str(baby("scout"))), use, None, None, True)
    assert set(hub) == {
        ("some/chats", None, "train_sft"),
        ("some/chats", None, "test_sft"),
        ("some/code", "python", "train"),
        ("some/pictures", None, "train"),
    }
    facts = texts.facts["calibration"]
    shares = {name: tokens / facts["tokens"] for name, tokens in facts["tokens_by_kind"].items()}
    assert shares == pytest.approx({"code": 0.3, "conversation": 0.5, "image": 0.2}, abs=0.05)
    lengths = [len(row.tokens) for row in texts.calibration]
    assert (lengths.count(192), facts["long_rows"], facts["longest_row_tokens"]) == (4, 4, 192)
    assert set(lengths) == {64, 192}
    assert facts["rows_with_images"] > 5
    assert facts["tokens"] == pytest.approx(60 * 64, rel=0.05)
    assert all(sum(part.tokens for part in row.parts) == len(row.tokens) for row in texts.calibration)
    again = prepare_texts(open_model(str(baby("scout"))), use, None, None, True)
    assert again.facts == texts.facts
    # Of a model that sees no pictures they are left out, and the warning says so.
    blind = prepare_texts(open_model(str(baby("qwen3"))), use, None, None, True)
    assert blind.facts["calibration"]["rows_with_images"] == 0
    assert any("some/pictures" in warning and "vision" in warning for warning in blind.warnings)


def test_many_books_give_the_long_rows(
    baby: Callable[..., Path], recipe: Callable[..., Path], hub: list[tuple[Any, ...]]
) -> None:
    """No one of them fills them all, and none is read past a long row's worth."""
    use = load_recipe(
        str(
            recipe(
                calibration={"source": "some/books", "kind": "long"},
                calibration_rows=40,
                calibration_long_share=0.8,
                calibration_long_row_tokens=96,
            )
        )
    )
    texts = prepare_texts(open_model(str(baby("qwen3"))), use, None, None, True)
    long = [row for row in texts.calibration if len(row.tokens) == 96]
    assert len(long) == len({row.parts[0].document for row in long}) == 8
    assert all(len(row.parts) == 1 for row in long)
    assert texts.facts["calibration"]["tokens_given"] < 20_000


def test_a_data_set_that_serves_for_both_is_split(
    baby: Callable[..., Path], recipe: Callable[..., Path], hub: list[tuple[Any, ...]]
) -> None:
    both = {"source": "some/code", "column": "code"}
    texts = prepare_texts(
        open_model(str(baby("qwen3"))), load_recipe(str(recipe(calibration=both, evaluation=both))), None, None, True
    )
    assert any("one document in eight" in warning for warning in texts.warnings)
    used = {part.document for row in texts.calibration for part in row.parts}
    assert not used & {row.document for row in texts.evaluation}
    assert len(texts.evaluation) > 2


def test_the_network_goes_away_in_the_middle(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    refused: Check,
    onecard: Callable[..., Result],
    hub: list[tuple[Any, ...]],
) -> None:
    use = recipe(calibration={"source": "some/broken"})
    refused(onecard("calibration", "--show", baby("qwen3"), "--recipe", use), "some/broken", "--calibration", code=4)


# --- packing


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0.1, 9)), min_size=1, max_size=6), st.integers(0, 900))
def test_quotas_are_shares_and_what_others_lack(sources: list[tuple[int, float]], wanted: int) -> None:
    available, weights = [a for a, _ in sources], [w for _, w in sources]
    given_ = quotas(available, weights, wanted)
    assert all(0 <= g <= a for g, a in zip(given_, available, strict=True))
    assert sum(given_) == pytest.approx(min(wanted, sum(available)), abs=len(sources))
    # Who has text left gives no less for its weight than anybody.
    rates = [g / w for g, w in zip(given_, weights, strict=True)]
    for g, a, rate, weight in zip(given_, available, rates, weights, strict=True):
        assert g >= a - 1 or all(rate >= other - 2 / min(weight, w) for other, w in zip(rates, weights, strict=True))


def documents(lengths: list[int], source: str = "s", start: int = 0) -> list[Row]:
    rows = []
    for number, length in enumerate(lengths):
        name = f"{source}{number}"
        parts = (Part(name, "text", source, length),) if length else ()
        rows.append(Row(name, "text", torch.arange(start, start + length), None, parts))
        start += length
    return rows


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 8), st.integers(2, 40), st.integers(0, 3))
def test_long_rows_use_no_token_twice(lengths: list[int], rows: int, long: int, seed: int) -> None:
    layout = RowLayout(rows, 8, 0.5, long)
    encoded = documents(lengths)
    try:
        packed = pack(encoded, layout, seed)
    except InputError:
        return
    assert {len(row.tokens) for row in packed} <= {8, long}
    tokens = torch.cat([row.tokens for row in packed]).tolist()
    assert len(tokens) == len(set(tokens))
    where = {t: d.document for d in encoded for t in d.tokens.tolist()}
    for row in packed:  # the parts say of every token where it came from
        told = [part.document for part in row.parts for _ in range(part.tokens)]
        assert told == [where[t] for t in row.tokens.tolist()]


def test_the_longest_documents_fill_the_long_rows() -> None:
    encoded = documents([5] * 40 + [70, 30, 64])
    packed = pack(encoded, RowLayout(20, 8, 0.75, 64), 0)
    long = [row for row in packed if len(row.tokens) == 64]
    assert [row.parts[0].document for row in long] == ["s40", "s42"]
    assert [part.tokens for part in long[0].parts] == [64]


def test_mixed_draws_anew_with_another_seed() -> None:
    sources = [documents([9] * 30, "a"), documents([7] * 30, "b", 1000)]
    one, same, other = (mixed(sources, [1, 2], 150, seed) for seed in (0, 0, 1))
    assert [row.document for row in one] == [row.document for row in same] != [row.document for row in other]
    count = {s: sum(len(r.tokens) for r in one if r.parts[0].source == s) for s in "ab"}
    assert count == {"a": 50, "b": 100}


@given(st.lists(st.text(min_size=1), unique=True))
def test_a_split_takes_every_document_once(texts: list[str]) -> None:
    all_ = [Document(t, "text", t, None) for t in texts]
    sides = [split_by_digest(all_, evaluated) for evaluated in (True, False)]
    assert sorted(d.id for side in sides for d in side) == sorted(texts)
    assert not {d.likeness for d in sides[0]} & {d.likeness for d in sides[1]}


# --- recipes and the verb that shows rows


def test_paths_begin_at_the_recipe(baby: Callable[..., Path], tmp_path: Path, recipe: Callable[..., Path]) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").write_text("words to be read, and more of them, until it is enough " * 9)
    use = recipe(calibration={"source": "own/mine.txt", "kind": "long"}, evaluation={"source": "demo"})
    texts = prepare_texts(open_model(str(baby("qwen3"))), load_recipe(str(use)), None, None, True)
    assert texts.facts["calibration"]["tokens_by_kind"].keys() == {"long"}
    assert texts.facts["calibration"]["source"] == "own/mine.txt"


def test_a_long_share_too_small_for_a_row(recipe: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="long rows, and one has"):
        load_recipe(str(recipe(calibration_long_share=0.1)))


def test_show(
    baby: Callable[..., Path], onecard: Callable[..., Result], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Special tokens visible, placeholders counted, nothing that steers a terminal; a pool says that it is one."""
    message = {
        "role": "user",
        "content": [
            {"type": "image", "data": base64.b64encode(png()).decode()},
            {"type": "text", "text": "what is [bold]this[/bold]?"},
        ],
    }
    rows = [{"messages": [message]}] + [{"text": f"text {n}, some words, and more \u200b of them"} for n in range(40)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    use = recipe(calibration_row_tokens=64, calibration_pool=2.0)
    for spelling in (["show", baby("scout")], ["--show", baby("scout")], [baby("scout"), "--show"]):
        result = onecard("calibration", *spelling, "--recipe", use, "--calibration", path, "--rows", 2)
        assert result.exit_code == 0, result.stderr
        assert "<|patch|> x 4" in result.stderr
        assert "<|user|>" in result.stderr
        assert "[bold]this[/bold]" in result.stderr
        assert "will be chosen" in result.stderr
        line = json.loads(result.stdout)
        assert (line["rows_with_images"], line["rows"]) == (1, 16)


def test_show_needs_nothing_more(onecard: Callable[..., Result]) -> None:
    result = onecard("calibration", "--show")
    assert result.exit_code == 0, result.stderr
    assert "<|begin_of_text|>" in result.stderr
    assert json.loads(result.stdout)["tokens"] == 209_920


def test_shipped_recipes_round_trip() -> None:
    recipe = load_recipe("llama4-scout-h100")
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
