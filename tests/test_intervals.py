"""Intervals and tests: the bootstrap against scipy's, its coverage by simulation, Wilson and McNemar by their formulas.

The simulation draws whole documents of unequal length whose tokens share a skewed level, as KL does.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from onecard.eval.intervals import Interval, bootstrap, draws, mcnemar, wilson

NORMAL_975 = 1.959963984540054


def column(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)[:, None]


def skewed(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums of KL, tokens) of documents of 20 to 400 tokens, their levels log-normal."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 400, documents).astype(np.float64)
    return sizes * rng.lognormal(-3.0, 0.9, documents), sizes


def one(numerators: object, denominators: object, **more: int) -> Interval:
    (found,) = bootstrap(column(numerators), column(denominators), **more)
    assert found is not None
    return found


# The bootstrap


@pytest.mark.parametrize(("documents", "seed"), [(12, 0), (40, 1), (120, 2)])
def test_it_is_scipys_bca_of_pairs(documents: int, seed: int) -> None:
    """Both draw 20,000 times: their ends differ by Monte Carlo error, here about 2 % of the width."""
    sums, sizes = skewed(documents, seed)
    got = one(sums, sizes, resamples=20_000)
    other = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis=-1: s.sum(axis) / n.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=20_000,
        rng=np.random.default_rng(seed),
        batch=2000,
    ).confidence_interval
    width = other.high - other.low
    assert got.low == pytest.approx(other.low, abs=0.04 * width)
    assert got.high == pytest.approx(other.high, abs=0.04 * width)
    # It reaches farther to the right of the estimate than to the left, unlike Student's t.
    estimate = sums.sum() / sizes.sum()
    assert got.high - estimate > 1.1 * (estimate - got.low)


def test_a_95_percent_interval_holds_the_truth_so_often() -> None:
    """300 samples of 40 skewed documents. The truth is the mean of log-normal levels, independent of the sizes."""
    truth = math.exp(-3.0 + 0.9**2 / 2)
    inside = 0
    for seed in range(300):
        interval = one(*skewed(40, seed), resamples=1000, seed=seed)
        inside += interval.low <= truth <= interval.high
    assert 0.90 <= inside / 300 <= 0.98


def test_tokens_of_one_document_are_no_draws_of_their_own() -> None:
    """30 documents of a hundred tokens, all tokens of a document alike: the interval is that of one token each, far
    wider than with independent tokens."""
    levels = np.random.default_rng(3).lognormal(size=30)
    whole, single = one(levels * 100, np.full(30, 100.0)), one(levels, np.ones(30))
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high), rel=1e-12)
    naive = one(np.repeat(levels, 100), np.ones(3000), resamples=500)
    assert whole.high - whole.low > 7 * (naive.high - naive.low)


def test_every_column_is_as_if_it_stood_alone() -> None:
    """A group that is absent from some documents has the interval of its own documents alone, up to the draws."""
    sums, sizes = skewed(60, 4)
    absent = np.arange(60) % 3 == 0
    thin_sums, thin_sizes = np.where(absent, 0, sums), np.where(absent, 0, sizes)
    together = bootstrap(np.stack([sums, thin_sums], 1), np.stack([sizes, thin_sizes], 1))
    for got, want in zip(together, (one(sums, sizes), one(thin_sums, thin_sizes)), strict=True):
        assert got is not None
        assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=1e-12)
    alone = one(sums[~absent], sizes[~absent])
    assert together[1] is not None
    width = alone.high - alone.low
    # The number of the group's documents varies between draws, which widens the interval a little.
    assert together[1].low == pytest.approx(alone.low, abs=0.15 * width)
    assert together[1].high == pytest.approx(alone.high, abs=0.15 * width)


def test_draws_in_parts_have_the_law_of_draws_at_once() -> None:
    """For very many documents the counts of all draws would not fit into memory, so they are made in parts."""
    sums, sizes = skewed(50, 5)
    whole = one(sums, sizes)
    assert [len(part) for part in draws(50, 1000, 0)] == [1000]
    parts = draws(50, 1000, 0, 50 * 333)
    assert isinstance(parts, Iterator)
    assert [len(part) for part in parts] == [333, 333, 333, 1]
    parted = one(sums, sizes, counts_at_once=50 * 333)
    assert (parted.low, parted.high) == pytest.approx((whole.low, whole.high), rel=1e-9)


def test_the_seed_decides() -> None:
    sums, sizes = skewed(30, 6)
    assert one(sums, sizes) == one(sums, sizes)
    assert one(sums, sizes, seed=1) != one(sums, sizes)


def test_no_interval_of_one_document_or_of_none() -> None:
    assert bootstrap(column([3.0]), column([2.0])) == [None]
    numerators = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 4.0]])
    denominators = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 2.0], [0.0, 0.0, 5.0]])
    first, second, third = bootstrap(numerators, denominators)
    assert first is None
    assert second is None
    assert third is not None


def test_two_documents_span_what_they_are() -> None:
    """Four draws are possible: the interval ends at the two documents' own figures."""
    interval = one([1.0, 9.0], [10.0, 10.0])
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.9))


def test_documents_that_are_all_alike_have_an_interval_of_no_width() -> None:
    interval = one([0.5] * 9, [5.0] * 9)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert one([0.0] * 9, [5.0] * 9) == Interval(0.0, 0.0)
    # Sums in proportion to the lengths: equal figures, but not equal to the last bit.
    sizes = np.random.default_rng(7).integers(3, 900, 25).astype(np.float64)
    interval = one(0.1 * sizes, sizes)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), rel=1e-12)


def test_ties_count_half() -> None:
    """Same top-1 of one-token documents, most of them right: half of all draws share a few values."""
    values = np.r_[np.ones(35), np.zeros(5)]
    interval = one(values, np.ones(40))
    exact = stats.binomtest(35, 40).proportion_ci(0.95, "wilson")
    assert interval.low == pytest.approx(exact.low, abs=0.05)
    assert interval.high == pytest.approx(exact.high, abs=0.05)
    assert interval.low < 35 / 40 < interval.high
    mirrored = one(1 - values, np.ones(40))
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high), abs=0.026)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 500)), min_size=2, max_size=25),
    st.floats(1e-3, 1e3),
)
def test_an_interval_lies_within_the_documents_and_scales_with_them(
    rows: list[tuple[float, int]], scale: float
) -> None:
    levels, sizes = np.array([v for v, _ in rows]), np.array([float(n) for _, n in rows])
    got = one(levels * sizes, sizes, resamples=200)
    assert levels.min() - 1e-9 <= got.low <= got.high <= levels.max() + 1e-9
    larger = one(scale * levels * sizes, sizes, resamples=200)
    assert (larger.low, larger.high) == pytest.approx((scale * got.low, scale * got.high), rel=1e-6, abs=1e-9)


# Wilson and McNemar


def wilson_written_out(count: int, of: int) -> tuple[float, float]:
    p, z = count / of, NORMAL_975
    middle = p + z * z / (2 * of)
    reach = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return (middle - reach) / (1 + z * z / of), (middle + reach) / (1 + z * z / of)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_formula(pair: tuple[int, int]) -> None:
    got = wilson(*pair)
    assert (got.low, got.high) == pytest.approx(wilson_written_out(*pair), abs=1e-9)
    assert 0 <= got.low <= pair[0] / pair[1] <= got.high <= 1


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_of_binomial_terms(lost: int, won: int) -> None:
    """Two-sided for a fair coin: twice the tail of the rarer direction, at most 1."""
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_mcnemar_of_no_change_is_one() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
