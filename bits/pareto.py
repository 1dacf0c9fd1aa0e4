"""`onecard pareto`: predicted KL against bytes, before anything is quantized.

A curve gives the best choice for each of many budgets. Named points beside it are uniform widths and rules of thumb:
the choices that people make without prices.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..calibration.texts import prepare_texts
from ..checkpoint.assign import plan_for
from ..checkpoint.model import Model, open_source, said_name
from ..core.device import choose_compute
from ..core.rates import first_guess
from ..core.recipe_groups import KEEP
from ..core.scheme import Scheme
from ..models.adapter import Role
from ..models.walk import Walk
from ..recipe import Recipe
from ..report.progress import Progress
from .allocate import allocate, chosen
from .fitting import (
    GAINS,
    fit_to,
    load_prices,
    menu_of,
    price_model,
    priced_units,
    refuse_unmeetable,
    resolved,
    save_prices,
)
from .prices import Priced
from .pricing import Prices, priced_rows
from .schedule import pricing_schedule

# Number of budgets on the curve, from the smallest choice to the largest. Steps grow, since KL falls fastest at the low
# end.
CURVE_POINTS = 33
# Roles that rules of thumb give more bits when bytes are to spare, as llama.cpp's and Unsloth's files do.
FIRST = (Role.ATTENTION.value, Role.SHARED.value)


@dataclass(frozen=True)
class Point:
    """A named choice of widths. `bytes`: size of its safetensors files, exact but for a few bytes of headers."""

    name: str
    bytes: int
    kl_nats: float


@dataclass(frozen=True)
class Pareto:
    """`named`: uniform widths and rules of thumb. `curve`: the best choice for each budget. `asked`: the best for the
    recipe's own budget, if it has one."""

    model: str
    recipe: str
    parameters: int
    named: tuple[Point, ...]
    curve: tuple[Point, ...]
    asked: Point | None
    prices: Prices

    def facts(self) -> dict[str, Any]:
        """As data for JSON, for scripts and report/pareto_card.py."""

        def said(point: Point) -> dict[str, Any]:
            bits = point.bytes * 8 / self.parameters
            return {
                "name": point.name,
                "bytes": point.bytes,
                "bits_per_weight": bits,
                "predicted_kl_nats": point.kl_nats,
            }

        return {
            "model": self.model,
            "recipe": self.recipe,
            "named": [said(point) for point in self.named],
            "curve": [said(point) for point in self.curve],
            "asked": said(self.asked) if self.asked is not None else None,
            "together": self.prices.facts()["together"],
            "price_rows": self.prices.rows,
            "price_tokens": self.prices.tokens,
        }


def rules_of_thumb(menu: tuple[Scheme, ...]) -> dict[str, tuple[Scheme, Scheme]]:
    """Name -> (width of attention and shared experts, width of the rest).

    Each width of the menu once for all units, then the widest for attention and shared experts with each narrower one
    for the rest.
    """
    finest = max(menu, key=lambda scheme: scheme.bits)
    narrower = [scheme for scheme in menu if scheme.bits < finest.bits]
    rules = {f"all {scheme}": (scheme, scheme) for scheme in menu}
    return rules | {f"attention, shared {finest}; rest {scheme}": (finest, scheme) for scheme in narrower}


def pareto(
    model_name: str,
    recipe: Recipe,
    *,
    prices_file: Path | None = None,
    calibration: Path | None = None,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> Pareto:
    """Read the prices from `prices_file`, or measure them and write them there; then draw the curve from them.

    Raises InputError for a model, recipe, texts or prices that cannot be used, FitError for a budget that is too small.
    """
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens)
    model = open_source(model_name)
    priced_units(model.adapter, recipe)  # raises early if there is no width to choose
    if recipe.widths.bits == "fit":
        refuse_unmeetable(model, recipe)
    rows = prepare_texts(model, recipe, calibration, None, needs_calibration=True).calibration
    priced_rows(rows, recipe)  # raises if there are too few rows
    if prices_file is not None and prices_file.exists():
        prices = load_prices(prices_file, model, recipe, rows, compute)
    else:
        with (
            # Beside the prices file, where the user has room: /tmp may be small.
            tempfile.TemporaryDirectory(
                prefix=".onecard-prices-", dir=prices_file.absolute().parent if prices_file is not None else None
            ) as folder,
            Progress(f"onecard pareto {model_name}", model.adapter.n_blocks, console, quiet) as progress,
        ):
            walk = Walk.over(model.adapter, model.source, compute, progress)
            rates = first_guess(compute.device, compute.dtype)
            progress.expect(pricing_schedule(model.adapter, recipe, rows, compute, rates))
            prices = price_model(walk, model, recipe, rows, Path(folder))
        if prices_file is not None:
            save_prices(prices_file, prices, model, recipe, rows, compute)
    return drawn_from(model, recipe, prices)


def drawn_from(model: Model, recipe: Recipe, prices: Prices) -> Pareto:
    """The curve and the named points that these prices predict."""
    menu, gain = menu_of(recipe), GAINS[recipe.quantizer.method]
    keeps = KEEP in recipe.fit.fit_schemes
    units = [replace(u, widths=tuple(w for w in u.widths if keeps or w.scheme is not None)) for u in prices.held]
    modules = priced_units(model.adapter, recipe)
    least = {u.unit: min(u.widths, key=lambda w: w.bytes).scheme for u in units}
    smallest = plan_for(model, resolved(recipe, modules, least))
    rest = smallest.emitted_bytes - sum(min(w.bytes for w in u.widths) for u in units)

    def point(name: str, widths: list[Priced]) -> Point:
        choice = chosen(units, widths, gain)
        return Point(name, rest + choice.bytes, choice.kl_nats)

    named = [
        point(name, [unit.at(first if unit.role in FIRST else rest_of_it) for unit in prices.held])
        for name, (first, rest_of_it) in rules_of_thumb(menu).items()
    ]
    most = sum(max(w.bytes for w in u.widths) for u in units)
    lowest = smallest.emitted_bytes - rest
    budgets = lowest + (most - lowest) * np.linspace(0, 1, CURVE_POINTS) ** 2
    curve: list[Point] = []
    for budget in budgets:
        choice = allocate(units, round(budget), gain)
        found = Point("fit", rest + choice.bytes, choice.kl_nats)
        if not curve or found.bytes > curve[-1].bytes:
            curve.append(found)
    asked = None
    if recipe.widths.bits == "fit":
        fitted = fit_to(model, recipe, prices)
        asked = Point("asked", plan_for(model, fitted.recipe).emitted_bytes, fitted.choice.kl_nats)
    return Pareto(said_name(model.name), recipe.name, smallest.parameters, tuple(named), tuple(curve), asked, prices)
