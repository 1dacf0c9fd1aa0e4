"""Calibration draws from all rows of Parquet files, by the seed; what is drawn twice is said."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from documents import parquet
from onecard.calibration.parquet import drawn_documents
from onecard.calibration.source import ReadLimit, Source
from onecard.calibration.sources import read_source
from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.model import open_model
from onecard.recipe import load_recipe


@pytest.fixture(scope="module")
def sorted_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of 1,000 rows, sorted by kind; some rows hold no text."""
    folder = tmp_path_factory.mktemp("sorted")
    return [
        parquet(
            folder / f"{n}.parquet",
            [{"text": "" if k % 7 == 3 else f"{'abc'[n]}{k:04d}" * (1 + k % 5)} for k in range(1000)],
        )
        for n in range(3)
    ]


def slow_draw(files: list[Path], limit: ReadLimit, seed: int) -> list[str]:
    """The obvious way: all rows in the order of their keys, until the limit; then in the order of the files."""
    rows = []
    for number, _ in enumerate(files):
        keys = random.Random(f"{seed} {number}")
        for k in range(1000):
            key = keys.random()
            if k % 7 != 3:
                rows.append((key, number, k, f"{'abc'[number]}{k:04d}" * (1 + k % 5)))
    taken: list[tuple[float, int, int, str]] = []
    for row in sorted(rows):
        taken.append(row)
        if limit.reached(len(taken), sum(len(text) for *_, text in taken)):
            break
    return [text for *_, text in sorted(taken, key=lambda row: row[1:3])]


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    characters=st.one_of(st.none(), st.integers(1, 60_000)),
    documents=st.one_of(st.none(), st.integers(1, 3000)),
)
def test_a_draw_is_the_rows_with_the_smallest_keys(
    sorted_files: list[Path], seed: int, characters: int | None, documents: int | None
) -> None:
    limit = ReadLimit(documents, characters)
    found = drawn_documents(sorted_files, Source("s", sorted_files[0]), limit, seed)
    assert [d.text for path in sorted_files for d in found[path].documents] == slow_draw(sorted_files, limit, seed)


def test_every_kind_of_a_sorted_folder_is_drawn(sorted_files: list[Path]) -> None:
    """The share of a kind is its share of the rows, and another seed draws others."""
    source = Source("s", sorted_files[0].parent)
    drawn = [read_source(source, ReadLimit(characters=6000), seed).documents for seed in (0, 0, 1)]
    texts = [[d.text or "" for d in one] for one in drawn]
    assert texts[0] == texts[1] != texts[2]
    counts = [sum(text[0] == kind for text in texts[0]) for kind in "abc"]
    assert min(counts) > 0.2 * sum(counts) > 40
    assert max(int(text[1:5]) for text in texts[0]) > 900
    assert [d.text for d in read_source(source, ReadLimit(documents=3), None).documents[:3]] == [
        "a0000",
        "a0001" * 2,
        "a0002" * 3,
    ]


def test_a_file_that_is_used_up_keeps_its_order(sorted_files: list[Path]) -> None:
    source = Source("s", sorted_files[0])
    drawn, first = (read_source(source, ReadLimit(), seed) for seed in (5, None))
    assert [d.text for d in drawn.documents] == [d.text for d in first.documents]
    assert [d.id for d in drawn.documents] == [d.id for d in first.documents]
    assert (drawn.left_out, drawn.reason) == (first.left_out, first.reason) == (143, "row 3 has an empty text")


def test_a_sorted_file_calibrates_on_both_kinds(
    baby: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{kind} {n} of many words", "kind": kind} for kind in ("code", "prose") for n in range(2000)]
    path = parquet(tmp_path / "sorted.parquet", rows)
    use = load_recipe(str(recipe(calibration={"source": str(path)}, evaluation={"source": "demo"})))
    facts = prepare_texts(open_model(str(baby("qwen3"))), use, None, None, True).facts["calibration"]
    shares = [tokens / facts["tokens"] for tokens in facts["tokens_by_kind"].values()]
    assert len(shares) == 2
    assert min(shares) > 0.25


def test_repeated_calibration_texts_are_counted_and_said(
    baby: Callable[..., Path], recipe: Callable[..., Path], jsonl: Callable[..., Path], onecard: Callable[..., Result]
) -> None:
    """They are not left out: a text that stands there twice weighs twice."""
    rows = [{"text": f"a text with the number {n % 12}, and more words"} for n in range(30)]
    said = ["--recipe", recipe(), "--calibration", jsonl("twice.jsonl", rows)]
    shown = onecard("calibration", "show", baby("qwen3"), *said)
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert (facts["documents"], facts["repeated"]) == (30, 18)
    assert "18 of the 30 calibration texts repeat others" in shown.stderr
