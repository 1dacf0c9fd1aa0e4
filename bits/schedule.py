"""The stages of the pricing pass of `bits: fit`, for the ETA: each block and the head, with the plan's seconds."""

from ..core.device import Compute
from ..core.rates import Rates
from ..core.rows import Row
from ..core.schedule import Expected, Schedule
from ..models.adapter import Adapter
from ..planner.pricing_cost import pricing_cost
from ..recipe import Recipe
from .fitting import menu_of, priced_units
from .pricing import priced_rows

IN_A_BLOCK = ("price: streams", "price: statistics", "price: round")


def pricing_schedule(adapter: Adapter, recipe: Recipe, rows: list[Row], compute: Compute, rates: Rates) -> Schedule:
    """The expected stages. `rows` are the calibration rows.

    Every block adds streams, so each block takes longer than the one before.
    """
    tokens, others = (sum(len(row.tokens) for row in part) for part in priced_rows(rows, recipe))
    units, widths = list(priced_units(adapter, recipe)), len(menu_of(recipe))
    cost = pricing_cost(adapter, units, widths, tokens, others, compute.dtype.itemsize, rates)
    head = 4.0 * adapter.vocab_size * adapter.hidden_size * cost.tokens * cost.streams / rates.head_flops
    each = (cost.seconds - head) / sum(range(1, adapter.n_blocks + 1))
    blocks = [
        Expected(f"price block {index + 1}", "price", each * (index + 1), IN_A_BLOCK, index)
        for index in range(adapter.n_blocks)
    ]
    return Schedule((*blocks, Expected("price head", "price head", head, ("price: head",), None, tokens)))
