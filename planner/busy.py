"""Busy: how long kernels keep a card and its host, which work at the same time."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..core.card_rates import CardRates
from .layer_kernels import BF16, FACTOR, FP32, TILED, Kernel

# What torch does between two launches without a kernel, views and allocations, beside a launch: of the counted model's
# 129,782 launches of a block and as many views, each a fifth of a launch.
BETWEEN_LAUNCHES = 1.12


@dataclass(frozen=True)
class Busy:
    """Launches, and seconds of the card."""

    launches: float = 0.0
    card: float = 0.0

    def __add__(self, other: "Busy") -> "Busy":
        return Busy(self.launches + other.launches, self.card + other.card)

    def __mul__(self, times: float) -> "Busy":
        return Busy(self.launches * times, self.card * times)


@dataclass(frozen=True)
class Card:
    """A card with these rates; its methods say what kernels take."""

    rates: CardRates

    def seconds(self, busy: Busy) -> float:
        """Of kernels for which the host waits at the end only."""
        return max(busy.launches * BETWEEN_LAUNCHES / self.rates.launches, busy.card)

    def kernels(self, found: Iterable[Kernel], times: float = 1.0) -> Busy:
        """`times` launches of each."""
        r = self.rates
        speed = {BF16: r.bf16_flops, TILED: r.tiled_flops, FP32: r.fp32_flops, FACTOR: r.factor_flops}
        each = [max(1 / r.kernels, k.nbytes / r.card_bytes, k.flops / speed[k.unit]) for k in found]
        return Busy(len(each), sum(each)) * times

    def moved(self, nbytes: float, launches: float) -> Busy:
        """Launches that move so many bytes in all, and compute little."""
        return Busy(launches, max(launches / self.rates.kernels, nbytes / self.rates.card_bytes))

    def product(self, m: float, k: float, n: float, times: float = 1.0, unit: str = BF16, parts: int = 1) -> Busy:
        """[m, k] @ [k, n], so often; `parts`: as many such products are added up."""
        size = 4 if unit == FP32 else 2
        nbytes = parts * size * (m * k + k * n) + 8 * m * n
        return self.kernels([Kernel(nbytes, 2.0 * parts * m * k * n, unit)], times)

    def factored(self, flops: float, times: float = 1.0) -> Busy:
        """A factorisation, or a triangular solve."""
        return self.kernels([Kernel(0.0, flops, FACTOR)], times)

    def issued(self, instructions: float, launches: float) -> Busy:
        """Launches of the solver's own kernels, whose warps issue so many instructions in all."""
        return Busy(launches, max(launches / self.rates.kernels, instructions / self.rates.warp_instructions))
