"""What rounding costs in KL: of one unit by itself, and of many together.

Measured is the KL at the head with one unit rounded and all else as it was, for several widths, and how large the error
is that each width leaves (pricing.py). Two things happen to a model whose matrices are a little off:

- Its outputs move. KL grows with the square of the error (Gauss-Newton's quadratic form), squares of independent errors
  add, and so do KLs: the linearity theorem of arXiv 2411.17525.
- Tokens near a router's tie go to another expert. A perturbation of size e turns over the ties that are narrower than
  e, so their share grows with e itself, and a token that is sent elsewhere costs the same however little was missing.
  Independent perturbations add in squares, so of several units these shares add as the root of the sum of squares.

Hence, with e the error of a unit at a width (the root of its relative output error),

    KL of one unit  = smooth e^2 + flip e                          smooth, flip >= 0, fitted to the measured widths
    KL of them all  = sum smooth e^2 + sqrt(sum (flip e)^2)

Plain sums of prices overstate twofold at four bits, and more at eight (docs/benchmarks.md). A method that leaves less
error than plain GPTQ does, since it corrects and refines, scales every e by `gain` < 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.optimize import nnls

from ..core.scheme import Scheme

# Of a mean KL: log-normalisers near 10 are rounded to 1e-6 in fp32, and the mean of 32,768 tokens to a few 1e-9. What
# is less says nothing of a width; eight bits' KL is some hundred times as much.
NOISE_NATS = 1e-9


@dataclass(frozen=True)
class Priced:
    """One unit at one width, alone. scheme: None where it stays as it was. error: root of the relative output error
    tr(E S E^T) / tr(W S W^T), over the unit's outputs. kl_nats: measured at the head, mean over tokens."""

    scheme: Scheme | None
    bytes: int
    error: float
    kl_nats: float


@dataclass(frozen=True)
class UnitPrices:
    """A unit with its widths; `smooth` and `flip` as at the head of this file."""

    unit: str
    role: str
    parameters: int
    widths: tuple[Priced, ...]
    smooth: float
    flip: float

    @classmethod
    def fitted(cls, unit: str, role: str, parameters: int, widths: Sequence[Priced]) -> "UnitPrices":
        """Least squares of relative residuals, so that eight bits count as four do."""
        measured = [w for w in widths if w.error > 0 and w.kl_nats > NOISE_NATS]
        smooth = flip = 0.0
        if measured:
            error = np.array([w.error for w in measured])
            kl = np.array([w.kl_nats for w in measured])
            (smooth, flip), _ = nnls(np.stack([error**2, error], 1) / kl[:, None], np.ones(len(kl)))
        return cls(unit, role, parameters, tuple(widths), float(smooth), float(flip))

    def parts(self, width: Priced, gain: float = 1.0) -> tuple[float, float]:
        """(smooth e^2, (flip e)^2): both add over units."""
        error = gain * width.error
        return self.smooth * error**2, (self.flip * error) ** 2

    def at(self, scheme: Scheme | None) -> Priced:
        return next(width for width in self.widths if width.scheme == scheme)


def together(parts: Iterable[tuple[float, float]]) -> float:
    """KL in nats of units that are rounded all together, from their parts."""
    listed = list(parts)
    return sum(smooth for smooth, _ in listed) + sqrt(sum(flip for _, flip in listed))
