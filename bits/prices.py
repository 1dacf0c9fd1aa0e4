"""The KL that rounding costs: for one unit alone, and for many units together.

The pricing pass (pricing.py) rounds one unit at a time, to each of several widths. It measures the KL at the head and
the output error of the unit. Small errors in the matrices have two effects:

- Outputs move. KL grows with the square of the error (Gauss-Newton's quadratic form). Squares of independent errors
  add, and so do KLs: the linearity theorem of arXiv 2411.17525.
- Tokens near a router's tie go to another expert. A perturbation of size e flips the ties narrower than e, so the share
  of flipped tokens grows linearly with e. A flipped token costs the same however close its tie was. Independent
  perturbations add in squares, so the shares of several units add as the root of the sum of squares.

With e the error of a unit at a width (the root of its relative output error):

    KL of one unit   = smooth e^2 + flip e                         smooth, flip >= 0, fitted to the measured widths
    KL of all units  = sum smooth e^2 + sqrt(sum (flip e)^2)

A plain sum of prices overstates the KL twofold at four bits, and more at eight (docs/benchmarks.md). A method that
corrects and refines leaves less error than plain GPTQ: it scales every e by `gain` < 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.optimize import nnls

from ..core.scheme import Scheme

# Noise of a mean KL: fp32 rounds log-normalisers near 10 to 1e-6, which leaves a few 1e-9 in the mean of 32,768 tokens.
# A smaller KL says nothing about a width. The KL at eight bits is about a hundred times larger.
NOISE_NATS = 1e-9


@dataclass(frozen=True)
class Priced:
    """One unit alone at one width. scheme: None if the unit stays as it is. error: root of the relative output error
    tr(E S E^T) / tr(W S W^T), over the unit's outputs. kl_nats: mean over tokens, measured at the head."""

    scheme: Scheme | None
    bytes: int
    error: float
    kl_nats: float


@dataclass(frozen=True)
class UnitPrices:
    """A unit with its widths. The module's docstring defines `smooth` and `flip`."""

    unit: str
    role: str
    parameters: int
    widths: tuple[Priced, ...]
    smooth: float
    flip: float

    @classmethod
    def fitted(cls, unit: str, role: str, parameters: int, widths: Sequence[Priced]) -> "UnitPrices":
        """Fit `smooth` and `flip` by least squares of relative residuals, so that eight bits weigh as much as four."""
        measured = [w for w in widths if w.error > 0 and w.kl_nats > NOISE_NATS]
        smooth = flip = 0.0
        if measured:
            error = np.array([w.error for w in measured])
            kl = np.array([w.kl_nats for w in measured])
            (smooth, flip), _ = nnls(np.stack([error**2, error], 1) / kl[:, None], np.ones(len(kl)))
        return cls(unit, role, parameters, tuple(widths), float(smooth), float(flip))

    def parts(self, width: Priced, gain: float = 1.0) -> tuple[float, float]:
        """(smooth e^2, (flip e)^2). Each of the two adds over units."""
        error = gain * width.error
        return self.smooth * error**2, (self.flip * error) ** 2

    def at(self, scheme: Scheme | None) -> Priced:
        return next(width for width in self.widths if width.scheme == scheme)


def together(parts: Iterable[tuple[float, float]]) -> float:
    """Predicted KL, in nats, of rounding several units at once; `parts` holds UnitPrices.parts of each."""
    listed = list(parts)
    return sum(smooth for smooth, _ in listed) + sqrt(sum(flip for _, flip in listed))
