"""The choice of widths against brute force over every choice, and what prices say of one unit and of many."""

import itertools
from fractions import Fraction
from math import isclose, sqrt

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onecard.bits.allocate import Choice, allocate
from onecard.bits.prices import Priced, UnitPrices, together
from onecard.bits.pricing import Prices
from onecard.core.errors import FitError
from onecard.core.scheme import Scheme

WIDTHS = [Scheme(4, 128), Scheme(4, 64), Scheme(4, 32), Scheme(8, 128), None]
ERRORS = [0.11, 0.1, 0.09, 0.006, 0.0]
BITS = [4.125, 4.25, 4.5, 8.125, 16.0]


def unit(number: int, parameters: int, smooth: float, flip: float, count: int = 5) -> UnitPrices:
    """Candidates with true widths, and the errors that such widths leave."""
    widths = [
        Priced(scheme, int(parameters * bits / 8), error, smooth * error**2 + flip * error)
        for scheme, error, bits in list(zip(WIDTHS, ERRORS, BITS, strict=True))[:count]
    ]
    return UnitPrices(f"u{number}", "expert", parameters, tuple(widths), smooth, flip)


# Prices from nothing to far more than any other unit's, and very different sizes: a layer's experts and its attention.
UNITS = st.lists(
    st.tuples(
        st.sampled_from([64_000, 96_000, 1_000_003, 40_000_000]),
        st.sampled_from([0.0, 1e-7, 0.3, 1.0, 2.0, 500.0]),
        st.sampled_from([0.0, 1e-6, 0.01, 0.1, 3.0]),
        st.integers(2, 5),
    ),
    min_size=1,
    max_size=6,
).map(lambda drawn: [unit(number, *each) for number, each in enumerate(drawn)])


def extremes(units: list[UnitPrices]) -> tuple[int, int]:
    sizes = [[width.bytes for width in unit.widths] for unit in units]
    return sum(map(min, sizes)), sum(map(max, sizes))


def brute(units: list[UnitPrices], budget: int, gain: float) -> tuple[float, int]:
    """(least KL of all choices that fit, fewest bytes among the choices with that KL)."""
    found = []
    for widths in itertools.product(*(unit.widths for unit in units)):
        taken = sum(width.bytes for width in widths)
        if taken <= budget:
            smooth = sum(u.smooth * (gain * w.error) ** 2 for u, w in zip(units, widths, strict=True))
            flips = sum((u.flip * gain * w.error) ** 2 for u, w in zip(units, widths, strict=True))
            found.append((smooth + sqrt(flips), taken))
    least = min(kl for kl, _ in found)
    return least, min(taken for kl, taken in found if kl <= least * (1 + 1e-12))


@settings(max_examples=120)
@given(UNITS, st.fractions(0, 1), st.sampled_from([1.0, 0.7]))
def test_no_choice_that_fits_is_better(units: list[UnitPrices], share: Fraction, gain: float) -> None:
    low, high = extremes(units)
    budget = low + int((high - low) * share**2)
    choice = allocate(units, budget, gain)
    kl, taken = brute(units, budget, gain)
    assert choice.bytes == sum(width.bytes for width in choice.widths) <= budget
    assert all(width in unit.widths for unit, width in zip(units, choice.widths, strict=True))
    assert isclose(choice.kl_nats, kl, rel_tol=1e-9, abs_tol=1e-300), (choice.kl_nats, kl)
    assert choice.bytes <= taken


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=2, max_size=7), st.integers(0, 40))
def test_of_equal_predictions_the_fewest_bytes(drawn: list[tuple[int, int]], room: int) -> None:
    """Small whole numbers: many choices tie."""
    units = [
        UnitPrices(
            f"u{n}", "expert", 1, (Priced(WIDTHS[0], 2, 1.0, kl), Priced(None, 2 + more, 0.0, 0.0)), float(kl), 0
        )
        for n, (more, kl) in enumerate(drawn)
    ]
    budget = 2 * len(units) + room
    choice = allocate(units, budget)
    assert (choice.kl_nats, choice.bytes) == brute(units, budget, 1.0)


@settings(max_examples=30)
@given(UNITS, st.lists(st.fractions(0, 1), min_size=2, max_size=4))
def test_more_bytes_never_cost_more(units: list[UnitPrices], shares: list[Fraction]) -> None:
    low, high = extremes(units)
    budgets = [low, *sorted(low + int((high - low) * share) for share in shares), high]
    found = [allocate(units, budget).kl_nats for budget in budgets]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(found))


@given(UNITS, st.integers(1, 10**9))
def test_less_than_the_least_is_refused_with_the_least(units: list[UnitPrices], missing: int) -> None:
    low, _ = extremes(units)
    assert allocate(units, low).bytes == low
    with pytest.raises(FitError, match=f"{low:,} bytes"):
        allocate(units, low - missing)


def test_a_choice_that_is_a_byte_too_large_is_none() -> None:
    """A solver in floats would keep a budget of 70 GB to a millionth, 70 kB."""
    units = [unit(n, 2_000_000_003 + n, 1.0 + n / 7, 0.0, 4) for n in range(6)]
    low, high = extremes(units)
    sizes = sorted({sum(ws) for ws in itertools.product(*([w.bytes for w in u.widths] for u in units))})
    for size in sizes[:: len(sizes) // 12]:
        for budget in (size - 1, size):
            if low <= budget <= high:
                choice = allocate(units, budget)
                assert choice.bytes <= budget
                assert isclose(choice.kl_nats, brute(units, budget, 1.0)[0], rel_tol=1e-9)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_as_many_units_as_scout_has(jitter: float) -> None:
    """48 blocks of experts, a shared expert, two attention units. No exchange of one unit's width, or of two units',
    fits and is better."""
    draw = np.random.default_rng(0)
    units = []
    for number in range(192):
        parameters = [2_013_265_920, 125_829_120, 36_700_160, 26_214_400][number % 4]
        size = int(parameters * (1 + jitter * draw.random()))
        price = float(np.exp(draw.normal())) * [1.0, 0.4, 0.5, 0.3][number % 4]
        units.append(unit(number, size, price, 0.02 * price * float(np.exp(draw.normal()))))
    low, high = extremes(units)
    budget = low + (high - low) // 10
    choice = allocate(units, budget, 0.7)
    assert low < choice.bytes <= budget
    parts = [[u.parts(w, 0.7) for w in u.widths] for u in units]
    picked = [u.widths.index(w) for u, w in zip(units, choice.widths, strict=True)]
    moves = np.array(
        [
            (n, w.bytes - now.bytes, a - parts[n][picked[n]][0], b - parts[n][picked[n]][1])
            for n, (u, now) in enumerate(zip(units, choice.widths, strict=True))
            for w, (a, b) in zip(u.widths, parts[n], strict=True)
        ]
    )
    a, b = (sum(own[i][k] for own, i in zip(parts, picked, strict=True)) for k in (0, 1))
    size, smooth, flips = (moves[:, None, k] + moves[None, :, k] for k in (1, 2, 3))
    other = (moves[:, None, 0] != moves[None, :, 0]) | (moves[None, :, 1] == 0)
    found = a + smooth + np.sqrt(np.maximum(0, b + flips))
    assert found[other & (size <= budget - choice.bytes)].min() >= choice.kl_nats * (1 - 1e-8)


def greedy(units: list[UnitPrices], budget: int) -> Choice:
    """Buys what saves most KL for each byte, again and again, as long as it fits."""
    picked = [min(unit.widths, key=lambda w: w.bytes) for unit in units]
    while True:
        steps = [
            ((u.parts(old)[0] - u.parts(new)[0]) / (new.bytes - old.bytes), n, new)
            for n, (u, old) in enumerate(zip(units, picked, strict=True))
            for new in u.widths
            if new.bytes > old.bytes and sum(w.bytes for w in picked) - old.bytes + new.bytes <= budget
        ]
        if not steps:
            break
        _, n, new = max(steps, key=lambda step: step[:2])
        picked[n] = new
    parts = [u.parts(w) for u, w in zip(units, picked, strict=True)]
    return Choice(tuple(picked), sum(w.bytes for w in picked), together(parts))


def test_why_not_greedy() -> None:
    """A layer's experts can only be bought together. Attention saves more for each byte, but once it is bought the
    experts no longer fit, and they alone are worth more."""
    experts, attention = unit(0, 1_000_000, 10.0, 0.0, 4), unit(1, 60_000, 1.2, 0.0, 4)
    units = [experts, attention]
    low, _ = extremes(units)
    budget = low + experts.widths[3].bytes - experts.widths[0].bytes
    best, first = allocate(units, budget), greedy(units, budget)
    assert first.bytes <= budget
    assert [w.scheme for w in best.widths] == [WIDTHS[3], WIDTHS[0]]
    assert first.widths[1].scheme != WIDTHS[0]
    assert best.kl_nats < 0.5 * first.kl_nats


def test_the_root_counts() -> None:
    """Flips add in squares: the one unit is bought, not the four whose prices have the larger sum."""
    units = [unit(0, 400_000, 0.0, 1.0, 4), *(unit(n, 100_000, 0.0, 0.4, 4) for n in range(1, 5))]
    cheap, dear = units[0].widths[0], units[0].widths[3]
    budget = extremes(units)[0] + dear.bytes - cheap.bytes
    choice = allocate(units, budget)
    assert [w.scheme for w in choice.widths] == [WIDTHS[3], *[WIDTHS[0]] * 4]
    others = [cheap, *(u.widths[3] for u in units[1:])]
    assert sum(w.bytes for w in others) <= budget
    assert sum(w.kl_nats for w in others) < sum(w.kl_nats for w in choice.widths)


# --- prices


PRICE = st.floats(1e-6, 1e3)


@given(PRICE, PRICE)
def test_both_prices_are_found_in_exact_data(smooth: float, flip: float) -> None:
    widths = [Priced(s, 1, e, smooth * e**2 + flip * e) for s, e in zip(WIDTHS, ERRORS, strict=True)]
    found = UnitPrices.fitted("u", "expert", 1, widths)
    for width in widths:
        assert isclose(sum(found.parts(width)[:1]) + sqrt(found.parts(width)[1]), width.kl_nats, rel_tol=1e-6)
    # Where one part is the millionth of the other at every width, it is lost in rounding.
    assume(1e-3 < smooth / flip < 1e4)
    assert isclose(found.smooth, smooth, rel_tol=1e-4)
    assert isclose(found.flip, flip, rel_tol=1e-4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1e-6, 10)), max_size=6))
def test_prices_are_never_negative(points: list[tuple[float, float]]) -> None:
    """No price is NaN, whatever was measured: also for a KL of zero, or one below zero by rounding."""
    found = UnitPrices.fitted("u", "expert", 1, [Priced(WIDTHS[0], 1, error, kl) for error, kl in points])
    assert found.smooth >= 0
    assert found.flip >= 0
    assert np.isfinite([found.smooth, found.flip]).all()


@given(st.lists(st.tuples(PRICE, PRICE), min_size=1, max_size=5), st.floats(0.05, 2))
def test_a_gain_scales_every_error(prices: list[tuple[float, float]], gain: float) -> None:
    units = [unit(n, 1000, *each) for n, each in enumerate(prices)]
    parts = [u.parts(u.widths[0]) for u in units]
    smooth, flips = (sum(part[i] for part in parts) for i in (0, 1))
    scaled = together(u.parts(u.widths[0], gain) for u in units)
    assert isclose(scaled, smooth * gain**2 + sqrt(flips) * gain, rel_tol=1e-9)


def test_together() -> None:
    assert together([]) == 0
    assert isclose(together([(1.0, 9.0), (2.0, 16.0)]), 1 + 2 + 5)
    assert together([(1.0, 9.0)]) == 4.0


@given(UNITS, st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_prices_written_and_read(units: list[UnitPrices], measured: float, predicted: float) -> None:
    units = [UnitPrices.fitted(u.unit, u.role, u.parameters, u.widths) for u in units]
    prices = Prices(tuple(units), {"int4 group 128": (measured, predicted), "int8 group 128": (0.0, 0.0)}, 3, 77)
    again = Prices.from_facts(prices.facts())
    assert again == prices
    assert isclose(again.scale, measured / predicted, rel_tol=1e-12)
    for held, plain in zip(again.held, units, strict=True):
        assert isclose(held.smooth, plain.smooth * again.scale, rel_tol=1e-12)
        assert held.widths == plain.widths
