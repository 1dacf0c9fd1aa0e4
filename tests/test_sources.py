"""Calibration sources: file kinds, data sets, mixtures and long rows, and messages about bad ones."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from click.testing import Result

from command_line import Refuse
from documents import parquet, png, read_documents
from onecard.calibration.source import ReadLimit, Source
from onecard.calibration.sources import read_source
from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError
from onecard.recipe import Recipe, load_recipe

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
def test_files_that_cannot_be_read(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path, name: str) -> None:
    content, needle = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    refuse(baby("llama4-text"), path, needle, arguments=["--calibration", path])


def test_a_folder_without_texts(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    refuse(baby("llama4-text"), tmp_path / "none", "holds no texts", arguments=["--calibration", tmp_path / "none"])


def test_a_line_of_a_million_characters(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "long " * 400_000}) + "\n")
    (document,) = read_documents(tmp_path / "x.jsonl")
    assert len(document.text or "") == 2_000_000


# --- data sets


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces `load_dataset` by one with these data sets, which the library itself streams. Gives the list of
    requests."""
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
    baby: Callable[..., Path], recipe: Callable[..., Path], data_sets: list[tuple[Any, ...]]
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
    assert set(data_sets) == {
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
    # For a model without vision, pictures are left out, with a warning.
    blind = prepare_texts(open_model(str(baby("qwen3"))), use, None, None, True)
    assert blind.facts["calibration"]["rows_with_images"] == 0
    assert any("some/pictures" in warning and "vision" in warning for warning in blind.warnings)


def test_many_books_give_the_long_rows(
    baby: Callable[..., Path], recipe: Callable[..., Path], data_sets: list[tuple[Any, ...]]
) -> None:
    """No book fills all long rows, and none is read further than one long row."""
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
    baby: Callable[..., Path], recipe: Callable[..., Path], data_sets: list[tuple[Any, ...]]
) -> None:
    both = {"source": "some/code", "column": "code"}
    use = load_recipe(str(recipe(calibration=both, evaluation=both, evaluation_row_tokens=48)))
    texts = prepare_texts(open_model(str(baby("qwen3"))), use, None, None, True)
    assert any("one document in eight" in warning for warning in texts.warnings)
    used = {part.document for row in texts.calibration for part in row.parts}
    assert not used & {row.document for row in texts.evaluation}
    assert len(texts.evaluation) > 2


def test_the_network_goes_away_in_the_middle(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    refused: Refuse,
    onecard: Callable[..., Result],
    data_sets: list[tuple[Any, ...]],
) -> None:
    use = recipe(calibration={"source": "some/broken"})
    refused(onecard("calibration", "--show", baby("qwen3"), "--recipe", use), "some/broken", "--calibration", code=4)


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
    """Special tokens are visible, placeholders counted, terminal controls removed; a pool is announced as such."""
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
        assert "will choose" in result.stderr
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
