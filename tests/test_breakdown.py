"""What a record tells of documents and worst tokens, and the file of every token: held against the rows by hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from onecard.core.rows import Row
from onecard.eval import token_table
from onecard.eval.breakdown import (
    AFTER,
    BEFORE,
    WORST_OF_A_DOCUMENT,
    WORST_TOKENS,
    break_down,
    documents,
    kinds,
    worst_tokens,
)
from onecard.eval.kl import TokenResults
from onecard.eval.summary import summarize
from onecard.eval.token_table import write_tokens
from outcomes import make_results, make_rows, only, with_values

VOCAB, IMAGE = 61, 60
LENGTHS = [50, 12, 90, 33, 7, 61, 40]
ORDER = [2, 5, 0, 6, 3, 1, 4]  # longest first, as batches go


def decode(ids: list[int]) -> str:
    """Told apart and joined as text is: "3 4 5"."""
    return " ".join(str(i) for i in ids)


def ids_of(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_rows(LENGTHS, VOCAB - 1)


@pytest.fixture(scope="module")
def results(rows: list[Row]) -> TokenResults:
    return make_results(rows, VOCAB - 1, order=ORDER)


def told_documents(results: TokenResults, rows: list[Row]) -> list[dict[str, Any]]:
    return [entry.to_json() for entry in documents(results, rows)]


def told_worst_tokens(results: TokenResults, rows: list[Row]) -> list[dict[str, Any]]:
    return [entry.to_json() for entry in worst_tokens(results, rows, decode)]


def spiked(results: TokenResults, places: dict[tuple[int, int], float]) -> TokenResults:
    """KL zero but at (row, position)."""
    kl = torch.zeros(len(results))
    for (number, position), value in places.items():
        kl[(results.document == number) & (results.position == position)] = value
    return with_values(results, kl_nats=kl)


# Documents


def test_documents_by_hand(results: TokenResults, rows: list[Row]) -> None:
    """In the order of the rows, whatever the order of the batches."""
    told = told_documents(results, rows)
    assert [entry["document"] for entry in told] == [row.document for row in rows]
    for number, (entry, row) in enumerate(zip(told, rows, strict=True)):
        own = only(results, results.document == number)
        assert entry["digest"] == hashlib.sha256(row.tokens.numpy().tobytes()).hexdigest()[:16]
        assert (entry["kind"], entry["source"]) == (row.kind, row.parts[0].source)
        assert entry["tokens"] == LENGTHS[number] - 1
        for key, values in (
            ("kl_mean_nats", own.kl_nats),
            ("same_top1", own.same_top1),
            ("nll_reference", -own.logp_reference),
            ("nll_quantized", -own.logp_quantized),
        ):
            assert entry[key] == pytest.approx(float(values.double().mean()), rel=1e-9)


def test_documents_make_the_mean(results: TokenResults, rows: list[Row]) -> None:
    told = told_documents(results, rows)
    total = sum(entry["tokens"] for entry in told)
    assert total == len(results)
    mean = sum(entry["kl_mean_nats"] * entry["tokens"] for entry in told) / total
    assert mean == pytest.approx(float(results.kl_nats.double().mean()), rel=1e-9)


def test_a_document_without_predictions_is_not_told(results: TokenResults, rows: list[Row]) -> None:
    """A row of one token predicts nothing; at the end of the rows or between them."""
    for row in (1, len(rows) - 1):
        told = told_documents(only(results, results.document != row), rows)
        assert [entry["document"] for entry in told] == [r.document for n, r in enumerate(rows) if n != row]


def test_a_digest_names_what_a_model_sees(rows: list[Row]) -> None:
    tokens, pixels = rows[0].tokens, torch.rand(1, 3, 4, 4)
    seen = [
        Row("a", "prose", tokens),
        Row("a", "prose", tokens.flip(0)),
        Row("a", "prose", tokens, pixels),
        Row("a", "prose", tokens, 1 - pixels),
    ]
    assert len({row.digest for row in seen}) == 4
    assert seen[2].digest == Row("other", "code", tokens.clone(), pixels.clone()).digest


# Worst tokens


def test_worst_tokens_by_hand(results: TokenResults, rows: list[Row]) -> None:
    places = {(0, 20): 9.0, (2, 40): 8.0, (0, 21): 7.0, (5, 30): 6.0}
    results = spiked(results, places)
    told = told_worst_tokens(results, rows)
    assert len(told) == WORST_TOKENS
    for entry, ((number, position), kl) in zip(told, places.items(), strict=False):
        row, (index,) = rows[number], torch.nonzero((results.document == number) & (results.position == position))[0]
        tokens, target = row.tokens.tolist(), position + 1
        assert (entry["document"], entry["kind"], entry["position"]) == (row.document, row.kind, target)
        assert entry["kl_nats"] == kl
        assert ids_of(entry["token"]) == [tokens[target]]
        assert ids_of(entry["before"]) == tokens[max(0, target - BEFORE) : target]
        assert ids_of(entry["after"]) == tokens[target + 1 : target + 1 + AFTER]
        assert entry["p_reference"] == pytest.approx(float(results.logp_reference[index].exp()))
        assert entry["p_quantized"] == pytest.approx(float(results.logp_quantized[index].exp()))
        for key, top, p in (
            ("reference_top", results.top_reference, results.top_p_reference),
            ("quantized_top", results.top_quantized, results.top_p_quantized),
        ):
            assert [ids_of(text) for text, _ in entry[key]] == [[i] for i in top[index].tolist()[:3]]
            assert [value for _, value in entry[key]] == pytest.approx(p[index].tolist()[:3])


def test_the_context_ends_where_the_row_does(results: TokenResults, rows: list[Row]) -> None:
    """The first prediction has one token before it, the last has none after it."""
    last = LENGTHS[3] - 2
    first_told, last_told = told_worst_tokens(spiked(results, {(1, 0): 5.0, (3, last): 4.0}), rows)[:2]
    tokens = rows[1].tokens.tolist()
    assert (first_told["position"], ids_of(first_told["before"])) == (1, tokens[:1])
    assert ids_of(first_told["after"]) == tokens[2 : 2 + AFTER]
    tokens = rows[3].tokens.tolist()
    assert ids_of(last_told["token"]) == tokens[-1:]
    assert last_told["after"] == ""
    assert ids_of(last_told["before"]) == tokens[-1 - BEFORE : -1]


def test_no_document_takes_all_the_places(results: TokenResults, rows: list[Row]) -> None:
    """One bad document would hide the others; where documents are few, so are the tokens."""
    bad = spiked(results, {(2, position): 100.0 - position for position in range(60)})
    told = told_worst_tokens(bad, rows)
    counts = [sum(entry["document"] == row.document for entry in told) for row in rows]
    assert max(counts) == counts[2] == WORST_OF_A_DOCUMENT
    assert [entry["kl_nats"] for entry in told[:4]] == [100.0, 99.0, 98.0, 0.0]
    few = told_worst_tokens(only(results, results.document < 2), rows)
    assert len(few) == 2 * WORST_OF_A_DOCUMENT
    values = [entry["kl_nats"] for entry in few]
    assert values == sorted(values, reverse=True)


# Kinds


def with_image(rows: list[Row], number: int, start: int, stop: int) -> list[Row]:
    row = rows[number]
    tokens = row.tokens.clone()
    tokens[start:stop] = IMAGE
    return [*rows[:number], Row(row.document, "image", tokens, torch.rand(1, 3, 4, 4)), *rows[number + 1 :]]


def test_text_after_an_image_is_a_kind_of_its_own(results: TokenResults, rows: list[Row]) -> None:
    """What is predicted from a position at or behind the first placeholder has an image to look at."""
    pictured = with_image(rows, 3, 10, 14)
    named = kinds(results, pictured, IMAGE)
    for kind, number, position in zip(named, results.document.tolist(), results.position.tolist(), strict=True):
        if number == 3:
            assert kind == ("image" if position < 10 else "image, after an image")
        else:
            assert kind == pictured[number].kind
    assert kinds(results, rows, IMAGE) == [rows[n].kind for n in results.document.tolist()]
    assert set(kinds(results, rows, None)) == {"prose", "code"}


def test_what_is_told_is_json_and_each_list_holds_every_token(results: TokenResults, rows: list[Row]) -> None:
    summary = summarize(results)
    broken_down = break_down(summary, results, with_image(rows, 3, 10, 14), IMAGE, decode)
    told = json.loads(json.dumps(broken_down.to_json(), allow_nan=False))
    lists = {"histogram", "by_position", "by_confidence", "by_kind", "by_document", "worst_tokens"}
    assert set(told) - set(summary.to_json()) == lists
    assert {key: told[key] for key in summary.to_json()} == summary.to_json()
    for key in ("by_position", "by_confidence", "by_kind", "by_document"):
        assert sum(entry["tokens"] for entry in told[key]) == len(results), key
    assert sum(told["histogram"]["tokens"]) == len(results)
    assert {entry["label"] for entry in told["by_kind"]} == {"prose", "code", "image", "image, after an image"}
    keys = {"label", "tokens", "documents", "kl_mean_nats", "kl_low_nats", "kl_high_nats", "same_top1"}
    assert all(set(entry) == keys for key in ("by_position", "by_confidence", "by_kind") for entry in told[key])


def test_texts_like_calibration_stand_apart_from_others(results: TokenResults, rows: list[Row]) -> None:
    summary = summarize(results)
    found = break_down(summary, results, rows, None, decode, {"prose", "poetry"}).by_likeness
    prose = torch.tensor([rows[n].kind == "prose" for n in results.document.tolist()])
    assert {bucket.label: bucket.tokens for bucket in found} == {
        "texts like calibration": int(prose.sum()),
        "others": int((~prose).sum()),
    }
    for bucket in found:
        mine = prose if bucket.label == "texts like calibration" else ~prose
        assert bucket.kl_mean_nats == pytest.approx(float(results.kl_nats[mine].mean()), rel=1e-6)


@pytest.mark.parametrize("calibrated", [(), ("prose", "code", "image"), ("poetry",)])
def test_nothing_stands_apart_where_all_texts_are_of_one_sort(
    calibrated: tuple[str, ...], results: TokenResults, rows: list[Row]
) -> None:
    assert break_down(summarize(results), results, rows, None, decode, calibrated).by_likeness == ()


# Every token


def test_the_file_of_every_token(results: TokenResults, rows: list[Row], tmp_path: Path) -> None:
    """Read with pyarrow alone: a line a token, in the order of rows and positions."""
    path = tmp_path / "tokens.parquet"
    write_tokens(path, results, rows)
    lines = pyarrow.parquet.read_table(path).to_pylist()
    assert len(lines) == len(results)
    place = {(int(d), int(p)): i for i, (d, p) in enumerate(zip(results.document, results.position, strict=True))}
    expected_order = [(number, position) for number, length in enumerate(LENGTHS) for position in range(length - 1)]
    for line, (number, position) in zip(lines, expected_order, strict=True):
        i, row = place[number, position], rows[number]
        overlap = len(set(results.top_reference[i].tolist()) & set(results.top_quantized[i].tolist())) / 5
        assert line == {
            "document": row.document,
            "document_digest": row.digest,
            "kind": row.kind,
            "source": row.parts[0].source,
            "position": position + 1,
            "token": int(row.tokens[position + 1]),
            "kl_nats": float(results.kl_nats[i]),
            "reverse_kl_nats": float(results.reverse_kl_nats[i]),
            "logp_reference": float(results.logp_reference[i]),
            "logp_quantized": float(results.logp_quantized[i]),
            "top1_reference": int(results.top_reference[i, 0]),
            "top1_quantized": int(results.top_quantized[i, 0]),
            "same_top1": bool(results.same_top1[i]),
            "top5_overlap": pytest.approx(overlap),
        }
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.parquet"]


def test_the_file_is_whole_or_not_there(
    results: TokenResults, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while it is written leaves what was there before."""
    path = tmp_path / "tokens.parquet"
    write_tokens(path, only(results, results.document == 1), rows)
    before = path.read_bytes()

    def full(self: object, path: Path) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        write_tokens(path, results, rows)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_tokens(path, results, rows)
    assert len(pyarrow.parquet.read_table(path)) == len(results)
    assert not path.with_name(path.name + token_table.TEMPORARY).exists()
