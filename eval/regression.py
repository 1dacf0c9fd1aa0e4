"""Is this run worse than the frozen one by more than may be? The statistics of the gate, pure.

Two measurements of one evaluation are pairs: the same documents, the same items. A difference is judged over documents,
since tokens of one document are correlated, and a regression counts only when even the low end of what the pairs allow
lies beyond the tolerance. With x_d and y_d two sums of a document, D documents and r the bound,

    e_d = x_d - r y_d,    t = mean(e) / (sd(e) / sqrt D)

and `x / y > r` is held to be shown when t passes the 95 % point of Student's distribution with D - 1 degrees of
freedom (one-sided). The interval is what that same test does not refuse (Fieller, J. R. Stat. Soc. B 16, 1954), so
that it never contradicts the verdict. For the mean KL x is the run's sum of KL, y the baseline's, and r = 1 +
tolerance; for the same top-1 x is by how many tokens it fell, y the number of tokens, and r the tolerance.

The noise that this sees is that of the documents drawn, and that of two runs which differ in rounding or in what they
were calibrated on, as far as that falls on each document anew. What the test is worth is measured by
benchmarks/gate_power.py. It cannot tell a change that all documents share from a regression: it is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, inf, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtr, stdtrit

LEVEL = 0.95  # one-sided; the intervals that are quoted are two-sided (eval/intervals.py)
# The normal distribution's 95 % point, one-sided.
_Z = 1.6448536269514722


@dataclass(frozen=True)
class Exceedance:
    """`value` is the measured ratio or rise; `low` and `high` its one-sided 95 % bounds (together a 90 % interval),
    None where the data set none; `p_value` of "not beyond the bound"; `exceeds`: beyond the bound and beyond noise."""

    value: float
    low: float | None
    high: float | None
    p_value: float
    exceeds: bool


def _bounds(
    x: float, y: float, v_xx: float, v_xy: float, v_yy: float, crit: float
) -> tuple[float | None, float | None]:
    """Fieller's bounds of x / y from two means and their variances; None where y is not surely above 0."""
    a = y * y - crit * crit * v_yy
    b = x * y - crit * crit * v_xy
    c = x * x - crit * crit * v_xx
    if a <= 0:
        return None, None
    root = sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


def _judged(
    e: float, error: float, degrees: int | None, value: float, bounds: tuple[float | None, float | None]
) -> Exceedance:
    """`e` against its standard error; without any spread the sign decides."""
    if error > 0:
        t = e / error
        p_value = float(ndtr(-t) if degrees is None else stdtr(degrees, -t))
    else:
        p_value = 0.0 if e > 0 else 1.0
    return Exceedance(value, *bounds, p_value, e > 0 and p_value < 1 - LEVEL)


def ratio_exceeds(x_D: ArrayLike, y_D: ArrayLike, bound: float) -> Exceedance:
    """Whether sum(x) / sum(y) over documents (rows of pairs) lies beyond `bound`; two documents at least.

    A y of zero everywhere has no ratio (`value` is inf, or `bound` where x is zero too): then any x above 0 is beyond.
    """
    x_D, y_D = np.asarray(x_D, np.float64), np.asarray(y_D, np.float64)
    count = len(x_D)
    assert x_D.shape == y_D.shape, (x_D.shape, y_D.shape)
    assert count >= 2, "one document tells nothing of noise"
    x, y = float(x_D.mean()), float(y_D.mean())
    covariance = np.cov(x_D, y_D) / count
    crit = float(stdtrit(count - 1, LEVEL))
    e_D = x_D - bound * y_D
    # Differences that are nothing but the last bits of a sum are no spread.
    scale = float(np.abs(x_D).max() + abs(bound) * np.abs(y_D).max())
    e, error = float(e_D.mean()), float(e_D.std(ddof=1)) / sqrt(count)
    if np.abs(e_D).max() <= 1e-12 * scale:
        e = error = 0.0
    value = x / y if y > 0 else (inf if x > 0 else bound)
    bounds = _bounds(x, y, float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]), crit)
    return _judged(e, error, count - 1, value, bounds)


def unpaired_ratio_exceeds(
    now: float, now_error: float, before: float, before_error: float, bound: float
) -> Exceedance:
    """The same from two means and their standard errors alone: wider, for what the documents share is not taken out."""
    bounds = _bounds(now, before, now_error**2, 0.0, before_error**2, _Z)
    value = now / before if before > 0 else (inf if now > 0 else bound)
    return _judged(now - bound * before, hypot(now_error, bound * before_error), None, value, bounds)


def unpaired_rise_exceeds(now: float, now_error: float, before: float, before_error: float, bound: float) -> Exceedance:
    """Whether now - before lies beyond `bound`, from two figures and their standard errors."""
    rise, error = now - before, hypot(now_error, before_error)
    return _judged(rise - bound, error, None, rise, (rise - _Z * error, rise + _Z * error))


def _tango(risen: int, fallen: int, count: int, bound: float) -> float:
    """The score statistic of "the share rose by `bound`" (Tango, Stat. Med. 17, 1998); at 0 McNemar's."""
    b = -risen - fallen + (2 * count - risen + fallen) * bound
    c = -fallen * bound * (1 - bound)
    share_fallen = (sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
    variance = count * (2 * share_fallen + bound * (1 - bound))
    distance = risen - fallen - count * bound
    return distance / sqrt(variance) if variance > 0 else (inf if distance > 0 else -inf if distance < 0 else 0.0)


def share_rise_exceeds(now_I: ArrayLike, before_I: ArrayLike, bound: float) -> Exceedance:
    """Whether the share of true items rose by more than `bound`, from pairs of yes and no, item by item.

    `low` and `high` are where Tango's score statistic meets the one-sided 95 % points.
    """
    now_I, before_I = np.asarray(now_I, bool), np.asarray(before_I, bool)
    count = len(now_I)
    assert now_I.shape == before_I.shape, (now_I.shape, before_I.shape)
    assert count, "no items"
    risen, fallen = int((now_I & ~before_I).sum()), int((before_I & ~now_I).sum())
    z = _tango(risen, fallen, count, bound)
    rise = (risen - fallen) / count
    low = _crossing(lambda at: _tango(risen, fallen, count, at) - _Z, -1.0, rise)
    high = _crossing(lambda at: _tango(risen, fallen, count, at) + _Z, rise, 1.0)
    return Exceedance(rise, low, high, float(ndtr(-z)), z > _Z)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function meets 0 between two points, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
