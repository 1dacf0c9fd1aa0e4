"""Intervals and tests for a record's figures: a bootstrap over documents, Wilson's interval, McNemar's exact test.

Tokens of one document are correlated, so a document is one draw: whole documents are drawn with replacement, and a
figure is a ratio of sums over the documents drawn. Intervals are BCa (Efron, Better Bootstrap Confidence Intervals,
JASA 82, 1987): mean KL is skewed to the right, and plain percentiles would leave out too much on that side. All figures
share one set of draws, applied as a matrix product: an interval for every group of tokens then costs next to nothing.

Shape legend: D documents, R resamples, C figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
# With fewer documents the draws hardly differ, and an interval says little about other documents.
FEW_DOCUMENTS = 20
# Counts held in memory at once: 8 million are 64 MB.
COUNTS_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def bootstrap(
    numerators_DC: np.ndarray,
    denominators_DC: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    counts_at_once: int = COUNTS_AT_ONCE,
) -> list[Interval | None]:
    """95 % intervals of sum(numerators) / sum(denominators) over documents, one for each column.

    Both are fp64 [D, C]. A document without tokens in a column has zeros there and does not count for that figure. None
    for a column in which fewer than two documents have tokens.
    """
    documents, columns = numerators_DC.shape
    have_C = (denominators_DC != 0).sum(0)
    if documents < 2:
        return [None] * columns
    drawn = np.concatenate(
        [
            _ratio(counts @ numerators_DC, counts @ denominators_DC)
            for counts in draws(documents, resamples, seed, counts_at_once)
        ]
    )
    totals_n, totals_d = numerators_DC.sum(0), denominators_DC.sum(0)
    estimate_C = _ratio(totals_n, totals_d)
    left_out_DC = _ratio(totals_n - numerators_DC, totals_d - denominators_DC)
    return [
        _bca(drawn[:, c], float(estimate_C[c]), left_out_DC[denominators_DC[:, c] != 0, c]) if have_C[c] > 1 else None
        for c in range(columns)
    ]


def draws(documents: int, resamples: int, seed: int, counts_at_once: int = COUNTS_AT_ONCE) -> Iterator[np.ndarray]:
    """How often each document is drawn: fp64 [R, D], in parts along R."""
    if documents * resamples <= counts_at_once:
        yield _all_draws(documents, resamples, seed)
        return
    generator = np.random.default_rng(seed)
    step = max(1, counts_at_once // documents)
    for start in range(0, resamples, step):
        yield _draw(generator, documents, min(step, resamples - start))


@lru_cache(maxsize=1)  # all figures of one record share their draws
def _all_draws(documents: int, resamples: int, seed: int) -> np.ndarray:
    return _draw(np.random.default_rng(seed), documents, resamples)


def _draw(generator: np.random.Generator, documents: int, resamples: int) -> np.ndarray:
    counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    return np.asarray(counts, dtype=np.float64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator / denominator)  # a draw without any token of a figure gives NaN, and is left out


def _bca(drawn_R: np.ndarray, estimate: float, left_out_D: np.ndarray) -> Interval:
    drawn_R = np.sort(drawn_R[np.isfinite(drawn_R)])
    if not len(drawn_R) or drawn_R[0] == drawn_R[-1]:
        return Interval(estimate, estimate)
    # Ties count half, so that a figure with few distinct values is not pushed to one side. A draw of every document
    # once is a tie, though its sum was rounded in another order.
    rounding = 1e-12 * np.abs(drawn_R).max()
    left = np.searchsorted(drawn_R, estimate - rounding, "left")
    below = (left + np.searchsorted(drawn_R, estimate + rounding, "right")) / 2
    bias = float(ndtri(np.clip(below / len(drawn_R), 0.5 / len(drawn_R), 1 - 0.5 / len(drawn_R))))
    gap_D = left_out_D.mean() - left_out_D
    spread = float((gap_D**2).sum())
    skew = float((gap_D**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    bounds = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + float(ndtri(tail))
        bounds.append(float(np.quantile(drawn_R, ndtr(bias + z / (1 - skew * z)))))
    return Interval(*bounds)


def wilson(count: int, of: int) -> Interval:
    """Wilson's 95 % score interval of the share count / of (JASA 22, 1927), by scipy; (0, 1) when `of` is 0."""
    if of == 0:
        return Interval(0.0, 1.0)
    found = binomtest(count, of).proportion_ci(LEVEL, "wilson")
    return Interval(float(found.low), float(found.high))


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided exact p of McNemar's test (Psychometrika 12, 1947): does one direction outweigh the other?"""
    changed = right_to_wrong + wrong_to_right
    return float(binomtest(right_to_wrong, changed).pvalue) if changed else 1.0
