"""Is this run worse than the baseline by more than the tolerance? The statistics of the gate, as pure functions.

Two measurements of one evaluation are pairs: the same documents, the same items. A difference is judged over documents,
since tokens of one document are correlated. A regression counts only when even the low end of its interval is beyond
the tolerance. With x_d and y_d two sums over document d, D documents and r the bound,

    e_d = x_d - r y_d,    t = mean(e) / (sd(e) / sqrt D)

and `x / y > r` counts as shown when t passes the one-sided 95 % point of Student's distribution with D - 1 degrees of
freedom. The interval holds the ratios that this test does not reject (Fieller, J. R. Stat. Soc. B 16, 1954), so it
never contradicts the verdict. For the mean KL, x is the run's sum of KL, y the baseline's, and r = 1 + tolerance. For
the same top-1, x is the number of tokens by which it fell, y the number of tokens, and r the tolerance.

The test sees the noise of drawing documents, and the noise of rounding and calibration that falls on each document
anew. benchmarks/gate_power.py measures its power. A change that all documents share is a regression to it.

Shape legend: D documents, I items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, inf, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtr, stdtr, stdtrit

LEVEL = 0.95  # one-sided; the intervals that are quoted are two-sided (eval/intervals.py)
# The normal distribution's 95 % point, one-sided.
_Z = 1.6448536269514722


@dataclass(frozen=True)
class Exceedance:
    """Whether a ratio or rise is beyond its bound."""

    # The measured ratio or rise.
    value: float
    # One-sided 95 % bounds, together a 90 % interval; None where the data set none.
    low: float | None
    high: float | None
    # Of the hypothesis "not beyond the bound".
    p_value: float
    # Beyond the bound, and beyond noise.
    exceeds: bool


def _bounds(
    x: float, y: float, v_xx: float, v_xy: float, v_yy: float, crit: float
) -> tuple[float | None, float | None]:
    """Fieller's bounds of x / y from two means and their (co)variances; None where y may be 0."""
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
    """The one-sided test of `e` > 0 by its standard error; where that is 0 the sign decides. `degrees` of freedom: None
    for the normal distribution."""
    if error > 0:
        t = e / error
        p_value = float(ndtr(-t) if degrees is None else stdtr(degrees, -t))
    else:
        p_value = 0.0 if e > 0 else 1.0
    return Exceedance(value, *bounds, p_value, e > 0 and p_value < 1 - LEVEL)


def ratio_exceeds(x_D: ArrayLike, y_D: ArrayLike, bound: float) -> Exceedance:
    """Whether sum(x) / sum(y) over at least two documents is beyond `bound`. x and y: fp64 [D], paired.

    Where y is zero everywhere there is no ratio: any x above 0 is beyond the bound, and `value` is inf (`bound` where x
    is zero too).
    """
    x_D, y_D = np.asarray(x_D, np.float64), np.asarray(y_D, np.float64)
    count = len(x_D)
    assert x_D.shape == y_D.shape, (x_D.shape, y_D.shape)
    assert count >= 2, "one document tells nothing of noise"
    x, y = float(x_D.mean()), float(y_D.mean())
    covariance = np.cov(x_D, y_D) / count
    crit = float(stdtrit(count - 1, LEVEL))
    e_D = x_D - bound * y_D
    # A difference in the last bits of a sum is rounding, not spread.
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
    """`ratio_exceeds` from means and standard errors alone: wider, since what documents share does not cancel."""
    bounds = _bounds(now, before, now_error**2, 0.0, before_error**2, _Z)
    value = now / before if before > 0 else (inf if now > 0 else bound)
    return _judged(now - bound * before, hypot(now_error, bound * before_error), None, value, bounds)


def unpaired_rise_exceeds(now: float, now_error: float, before: float, before_error: float, bound: float) -> Exceedance:
    """Whether now - before is beyond `bound`, from two figures and their standard errors."""
    rise, error = now - before, hypot(now_error, before_error)
    return _judged(rise - bound, error, None, rise, (rise - _Z * error, rise + _Z * error))


def _tango(risen: int, fallen: int, count: int, bound: float) -> float:
    """The score statistic of "the share rose by `bound`" (Tango, Stat. Med. 17, 1998); for a bound of 0 McNemar's.
    `risen` and `fallen` of `count` items changed."""
    b = -risen - fallen + (2 * count - risen + fallen) * bound
    c = -fallen * bound * (1 - bound)
    share_fallen = (sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
    variance = count * (2 * share_fallen + bound * (1 - bound))
    distance = risen - fallen - count * bound
    return distance / sqrt(variance) if variance > 0 else (inf if distance > 0 else -inf if distance < 0 else 0.0)


def share_rise_exceeds(now_I: ArrayLike, before_I: ArrayLike, bound: float) -> Exceedance:
    """Whether the share of true items rose by more than `bound`. Both sides: bool [I], paired.

    `low` and `high` are the rises at which Tango's score statistic meets the one-sided 95 % points.
    """
    now_I, before_I = np.asarray(now_I, bool), np.asarray(before_I, bool)
    count = len(now_I)
    assert now_I.shape == before_I.shape, (now_I.shape, before_I.shape)
    assert count, "no items"
    risen, fallen = int((now_I & ~before_I).sum()), int((before_I & ~now_I).sum())
    z = _tango(risen, fallen, count, bound)
    rise = (risen - fallen) / count
    return Exceedance(
        value=rise,
        low=_crossing(lambda at: _tango(risen, fallen, count, at) - _Z, -1.0, rise),
        high=_crossing(lambda at: _tango(risen, fallen, count, at) + _Z, rise, 1.0),
        p_value=float(ndtr(-z)),
        exceeds=z > _Z,
    )


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """The share at which a falling function meets 0; the nearer end where it stays on one side of 0."""
    at_low, at_high = falling(low), falling(high)
    if at_low <= 0:
        return low
    return high if at_high > 0 else float(brentq(falling, low, high, xtol=1e-15))
