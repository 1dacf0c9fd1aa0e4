"""Documents become rows: packed, cut, mixed by share, and cut into batches; no token is used twice."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onecard.calibration.documents import Document
from onecard.calibration.packing import RowLayout, document_rows, mixed, pack, pack_rows, quotas, repeated_share
from onecard.calibration.sources import split_by_digest
from onecard.core.errors import InputError
from onecard.core.rows import Part, Row, batches


@st.composite
def token_documents(draw: st.DrawFn, pictures: bool = False) -> list[Row]:
    """Documents without a common token, so that a row's tokens show where they come from; some with a picture."""
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
    """Rows are exactly `length` long. End to end they are whole documents in some order, the last one cut."""
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


SPELLED = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=9), min_size=1, max_size=9)


@given(SPELLED, st.integers(2, 9), st.integers(1, 9))
def test_documents_count_once_for_each_row_that_is_scored(texts: list[list[int]], length: int, most: int) -> None:
    """Whatever follows the cut: rows are the distinct heads in their order, each from the first document that has it.
    `most` counts rows, not documents."""
    rows = document_rows([Row(str(n), "text", torch.tensor(t)) for n, t in enumerate(texts)], length, most)
    heads = [tuple(text[:length]) for text in texts]
    assert [tuple(row.tokens.tolist()) for row in rows] == list(dict.fromkeys(heads))[:most]
    assert all(heads.index(tuple(row.tokens.tolist())) == int(row.document) for row in rows)


@given(SPELLED)
def test_what_rows_share_is_what_one_tree_of_them_saves(texts: list[list[int]]) -> None:
    """Every distinct beginning is one prediction; all others say the same again."""
    rows = [Row(str(n), "text", torch.tensor(t)) for n, t in enumerate(texts)]
    beginnings = {tuple(t[: n + 1]) for t in texts for n in range(len(t))}
    total = sum(map(len, texts))
    assert repeated_share(rows) == pytest.approx(1 - len(beginnings) / total)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 30))
def test_batches(lengths: list[int], limit: int) -> None:
    """Each row appears once, rows of one length together. Only a single longer row exceeds the limit."""
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


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0.1, 9)), min_size=1, max_size=6), st.integers(0, 900))
def test_quotas_are_shares_and_what_others_lack(sources: list[tuple[int, float]], wanted: int) -> None:
    available, weights = [a for a, _ in sources], [w for _, w in sources]
    given_ = quotas(available, weights, wanted)
    assert all(0 <= g <= a for g, a in zip(given_, available, strict=True))
    assert sum(given_) == pytest.approx(min(wanted, sum(available)), abs=len(sources))
    # A source with text left gives as much for its weight as any other.
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
    for row in packed:  # the parts name every token's document
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
