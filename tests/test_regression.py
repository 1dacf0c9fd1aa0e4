"""The gate's statistics against written-out formulas, laws that must hold, and their level by simulation.

D documents; x and y are a document's sums.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import onecard
from onecard.eval.regression import (
    Exceedance,
    ratio_exceeds,
    share_rise_exceeds,
    unpaired_ratio_exceeds,
    unpaired_rise_exceeds,
)

positive = st.floats(0.01, 100)
pairs = st.lists(st.tuples(positive, positive), min_size=3, max_size=40)
bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def real_documents() -> tuple[np.ndarray, np.ndarray]:
    """Sums of KL of two equivalent runs of the embedded model, 123 documents."""
    held = json.loads((Path(onecard.__file__).parent / "benchmarks" / "gate_power.json").read_text())
    return tuple(np.asarray(held["runs"][name]["kl_nats"]) for name in ("fast", "fast, seed 1"))  # type: ignore[return-value]


# --- ratios over documents


@given(pairs, st.floats(0.5, 2))
def test_the_test_is_student_t_on_what_lies_over_the_bound(rows: list[tuple[float, float]], bound: float) -> None:
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    over = x - bound * y
    assume(over.std() > 1e-6 * np.abs(over).max())
    got = ratio_exceeds(x, y, bound)
    expected = stats.ttest_1samp(over, 0.0, alternative="greater")
    assert got.p_value == pytest.approx(float(expected.pvalue), rel=1e-6, abs=1e-12)
    assert got.exceeds == (expected.pvalue < 0.05)
    assert got.value == pytest.approx(math.fsum(x) / math.fsum(y))


@given(pairs)
def test_the_interval_is_what_the_test_does_not_refuse(rows: list[tuple[float, float]]) -> None:
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    found = ratio_exceeds(x, y, 1.0)
    assume(found.low is not None and found.high is not None and found.high - found.low > 1e-6)
    assert found.low <= found.value <= found.high
    edge = 1e-4 * (found.high - found.low)
    assert ratio_exceeds(x, y, found.low - edge).exceeds
    assert not ratio_exceeds(x, y, found.low + edge).exceeds
    # From the other side: a value above `high` is rejected too.
    assert ratio_exceeds(-x, y, -(found.high + edge)).exceeds
    assert not ratio_exceeds(-x, y, -(found.high - edge)).exceeds


@given(pairs, st.floats(0.001, 1000))
def test_units_do_not_matter(rows: list[tuple[float, float]], unit: float) -> None:
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    a, b = ratio_exceeds(x, y, 1.02), ratio_exceeds(unit * x, unit * y, 1.02)
    assert a.p_value == pytest.approx(b.p_value, rel=1e-6, abs=1e-9)
    assert a.value == pytest.approx(b.value)


@given(pairs, st.floats(0, 1))
def test_the_same_files_never_fail(rows: list[tuple[float, float]], tolerance: float) -> None:
    y = [row[0] for row in rows]
    found = ratio_exceeds(y, y, 1 + tolerance)
    assert not found.exceeds
    assert found.value == 1


def test_a_rise_without_any_noise_is_one() -> None:
    same = np.full(5, 2.0)
    assert ratio_exceeds(1.05 * same, same, 1.04).exceeds
    assert not ratio_exceeds(1.05 * same, same, 1.05).exceeds
    assert not ratio_exceeds(1.03 * same, same, 1.04).exceeds


def test_the_last_bits_of_a_sum_are_no_rise() -> None:
    same = np.full(5, 0.1)
    assert not ratio_exceeds(np.nextafter(same, 1), same, 1.0).exceeds
    assert ratio_exceeds(same * (1 + 1e-9), same, 1.0).exceeds


def test_a_baseline_without_any_kl() -> None:
    none, some = np.zeros(8), np.linspace(0.9, 1.1, 8)
    assert not ratio_exceeds(none, none, 1.01).exceeds
    found = ratio_exceeds(some, none, 1.01)
    assert found.exceeds
    assert (found.value, found.low, found.high) == (math.inf, None, None)


def test_one_document_far_off_is_noise_and_many_are_not() -> None:
    """A rise of 10 % that comes from one document of 123 says nothing about the others."""
    _, base = real_documents()
    one = base.copy()
    one[7] += 0.1 * base.sum()
    assert ratio_exceeds(one, base, 1.01).value == pytest.approx(1.1)
    assert not ratio_exceeds(one, base, 1.01).exceeds
    assert ratio_exceeds(1.1 * base, base, 1.01).exceeds


@pytest.mark.parametrize(
    ("ratio", "bound", "least", "most"), [(1.0, 1.0, 0.03, 0.07), (1.0, 1.01, 0.0, 0.04), (1.1, 1.01, 0.95, 1.0)]
)
def test_level_and_power_on_real_documents(ratio: float, bound: float, least: float, most: float) -> None:
    """Two equivalent runs, one scaled: alarms are 5 % at the bound and rare at the default tolerance, and a rise of a
    tenth is found."""
    now, before = real_documents()
    now = now * (ratio * before.sum() / now.sum())
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(now), (1500, len(now)))
    share = np.mean([ratio_exceeds(now[d], before[d], bound).exceeds for d in drawn])
    assert least <= share <= most


# --- means alone


def width(found: Exceedance) -> float:
    assert found.low is not None
    assert found.high is not None
    return found.high - found.low


def test_means_alone_are_wider_than_pairs() -> None:
    now, before = real_documents()
    errors = [float(x.std(ddof=1)) / math.sqrt(len(x)) for x in (now, before)]
    alone = unpaired_ratio_exceeds(float(now.mean()), errors[0], float(before.mean()), errors[1], 1.01)
    paired = ratio_exceeds(now, before, 1.01)
    assert alone.value == pytest.approx(paired.value)
    assert width(alone) > 2 * width(paired)


def test_means_alone_by_hand() -> None:
    found = unpaired_ratio_exceeds(1.2, 0.03, 1.0, 0.04, 1.0)
    assert found.p_value == pytest.approx(float(stats.norm.sf(0.2 / 0.05)))
    assert found.exceeds
    assert not unpaired_ratio_exceeds(1.2, 0.3, 1.0, 0.4, 1.0).exceeds
    rise = unpaired_rise_exceeds(0.12, 0.003, 0.1, 0.004, 0.01)
    assert rise.p_value == pytest.approx(float(stats.norm.sf(2.0)))
    assert (rise.low, rise.high) == (pytest.approx(0.02 - 1.644854 * 0.005), pytest.approx(0.02 + 1.644854 * 0.005))


# --- yes and no, item by item


def test_without_a_tolerance_it_is_mcnemar() -> None:
    """(b - c) / sqrt(b + c), b = 15 items changed only now, c = 5 only before."""
    now = [True] * 15 + [False] * 5 + [True] * 3 + [False] * 77
    before = [False] * 15 + [True] * 5 + [True] * 3 + [False] * 77
    found = share_rise_exceeds(now, before, 0.0)
    assert found.value == pytest.approx(0.1)
    assert found.p_value == pytest.approx(float(stats.norm.sf(10 / math.sqrt(20))))
    assert found.exceeds


def test_tango_against_the_likelihood_by_search() -> None:
    """The score statistic with the nuisance share found by a fine search of the likelihood, not by the formula."""
    risen, fallen, count, bound = 9, 2, 80, 0.03
    q = np.linspace(1e-6, (1 - bound) / 2 - 1e-6, 400_001)
    likelihood = risen * np.log(q + bound) + fallen * np.log(q) + (count - risen - fallen) * np.log(1 - 2 * q - bound)
    best = float(q[likelihood.argmax()])
    z = (risen - fallen - count * bound) / math.sqrt(count * (2 * best + bound * (1 - bound)))
    now = [True] * risen + [False] * (count - risen)
    before = [False] * risen + [True] * fallen + [False] * (count - risen - fallen)
    assert share_rise_exceeds(now, before, bound).p_value == pytest.approx(float(stats.norm.sf(z)), abs=1e-5)


@given(bits, st.floats(0, 0.3))
def test_items_alike_never_fail_and_the_interval_holds_the_rise(items: list[tuple[bool, bool]], bound: float) -> None:
    now, before = (list(column) for column in zip(*items, strict=True))
    assert not share_rise_exceeds(now, now, bound).exceeds
    found = share_rise_exceeds(now, before, bound)
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 1
    assert found.exceeds == (found.low > bound) or abs(found.low - bound) < 1e-6


def test_the_level_for_items() -> None:
    """400 items, some of which change in each run: one alarm in twenty without tolerance, few at the default."""
    rng = np.random.default_rng(1)
    noise = rng.random((2, 2000, 400)) < 0.03
    shared = rng.random((2000, 400)) < 0.03
    for bound, most in ((0.0, 0.07), (0.01, 0.02)):
        alarms = [
            share_rise_exceeds(shared[i] ^ noise[0, i], shared[i] ^ noise[1, i], bound).exceeds for i in range(2000)
        ]
        assert np.mean(alarms) <= most
