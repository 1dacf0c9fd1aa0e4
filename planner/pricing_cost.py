"""Estimates the time and disk of the pricing pass of `bits: fit` (pricing.py), with the rates of cost.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.rates import Rates
from ..models.adapter import Adapter


@dataclass(frozen=True)
class PricingCost:
    """The estimate. Each block reads and writes its rows once, on average for half of the streams."""

    # As stream_count gives it.
    streams: int
    # Tokens of each stream.
    tokens: int
    flops: float
    seconds: float
    # The peak, as hidden_bytes gives it.
    disk_bytes: int

    def facts(self) -> dict[str, float]:
        return {
            "price_streams": self.streams,
            "price_tokens": self.tokens,
            "price_flops": self.flops,
            "price_seconds": self.seconds,
            "price_disk_bytes": self.disk_bytes,
        }


def stream_count(units: int, widths: int) -> int:
    """Number of variant streams: one per unit and width, and one per width with all units at that width."""
    return (units + 1) * widths


def hidden_bytes(hidden_size: int, streams: int, tokens: int, other_tokens: int, itemsize: int) -> int:
    """Bytes of hidden rows on disk during the last block, when both its inputs and its outputs are kept.

    The rows are those of all streams, of the reference and of the statistics. `itemsize` is bytes per number.
    """
    return 2 * hidden_size * itemsize * ((streams + 1) * tokens + other_tokens)


def pricing_cost(
    adapter: Adapter, units: Sequence[str], widths: int, tokens: int, other_tokens: int, itemsize: int, rates: Rates
) -> PricingCost:
    """Every stream reads `tokens`; the statistics are taken from `other_tokens`. Operations by kind:

    forward     2 x outputs x inputs per row, for tokens x (streams / 2 + 1) + other_tokens x 2 rows
    statistics  2 x inputs^2 per row of other_tokens
    rounding    4 x outputs x inputs^2 + 3 x inputs^3 per matrix and width: plain GPTQ and one round of refinement
    head        each stream, and the reference once for each stream
    """
    forward = statistics = rounding = 0.0
    for block in range(adapter.n_blocks):
        for site in adapter.sites(block):
            outputs, inputs, count = sum(site.out_features), site.in_features, len(site.members)
            forward += 2.0 * outputs * inputs * site.entries_per_token
            statistics += 2.0 * inputs**2 * site.entries_per_token
            rounding += count * (4.0 * outputs * inputs**2 + 3.0 * inputs**3)
    streams = stream_count(len(units), widths)
    forward_flops = forward * (tokens * (streams / 2 + 1) + 2 * other_tokens)
    product_flops, solve_flops = statistics * other_tokens, rounding * widths
    head_flops = 2 * 2.0 * adapter.vocab_size * adapter.hidden_size * tokens * streams
    rows = tokens * adapter.hidden_size * itemsize
    traffic = adapter.n_blocks * rows * streams / 2
    seconds = (
        forward_flops / rates.forward_flops
        + product_flops / rates.product_flops
        + solve_flops / rates.solve_flops
        + head_flops / rates.head_flops
        + traffic / rates.read_bytes
        + traffic / rates.write_bytes
    )
    flops = forward_flops + product_flops + solve_flops + head_flops
    disk_bytes = hidden_bytes(adapter.hidden_size, streams, tokens, other_tokens, itemsize)
    return PricingCost(streams, tokens, flops, seconds, disk_bytes)
