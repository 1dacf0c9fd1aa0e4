"""`bits: fit`: from prices and a budget to the width of every unit, and to the recipe that says so.

The budget is what a card leaves for weights beside the context, sequences and engine of the recipe (planner/fit.py),
or so many bytes of files. What is priced are the units of the recipe's roles, but for those that its `schemes` or
`keep_modules` settle. Bytes of a width are those that the plan lays out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .candidates import entries_of, packed_bytes, recipe_candidate
from .checkpoint.files import write_json
from .checkpoint.workdir import refuse_changed
from .core.errors import FitError, InputError, input_error
from .core.rows import Row, Step
from .core.scheme import Scheme
from .core.tensors import DTYPE_NAMES
from .models.adapter import Adapter, stored_dtype
from .planner.allocate import Choice, allocate, chosen
from .planner.cards import find_card
from .planner.fit import Needs, Request, weight_budget_bytes
from .planner.prices import Priced, UnitPrices
from .planner.weights import device_weights, place_of
from .prepare import Model, plan_for
from .pricing import Prices, identity_of, price
from .recipe import KEEP, Recipe, matches

# By how much the errors of a method are smaller than those of the quantizer that prices are taken with, when the whole
# model is rounded: it is aimed at the reference and searched. Measured on the embedded model and on a small Qwen3-MoE
# (benchmarks/fit.py); too high a value overstates the predicted KL and changes few choices.
GAINS = {"rtn": 1.0, "fast": 0.79, "balanced": 0.7, "best": 0.68}
GB = 10**9


@dataclass(frozen=True)
class Fitted:
    """A choice for a model. `recipe` says it, module by module; `request`: what of a card was asked, None without."""

    recipe: Recipe
    choice: Choice
    units: tuple[UnitPrices, ...]
    budget_bytes: int
    request: Request | None

    def facts(self, adapter: Adapter) -> dict[str, Any]:
        """For the record: of every unit where it is too, as its family says."""
        prefixes = {block: adapter.block_prefix(block) for block in range(adapter.n_blocks)}
        of = {unit.unit: next(b for b, p in prefixes.items() if unit.unit.startswith(p)) for unit in self.units}
        return {
            "budget_bytes": self.budget_bytes,
            "predicted_kl_nats": self.choice.kl_nats,
            "gain": GAINS[self.recipe.method],
            "units": [
                {
                    "unit": unit.unit,
                    "role": unit.role,
                    "block": of[unit.unit],
                    "kind": unit.unit.removeprefix(prefixes[of[unit.unit]]),
                    "width": str(width.scheme or KEEP),
                    "bytes": width.bytes,
                }
                for unit, width in zip(self.units, self.choice.widths, strict=True)
            ],
        }


def menu_of(recipe: Recipe) -> tuple[Scheme, ...]:
    return tuple(Scheme.parse(words) for words in recipe.fit_schemes if words != KEEP)


def priced_units(adapter: Adapter, recipe: Recipe) -> dict[str, list[str]]:
    """Unit -> its modules, of all whose width the recipe leaves open. Raises InputError where a width of the menu does
    not suit an input, or nothing is left to choose."""
    found: dict[str, list[str]] = {}
    problems: dict[str, None] = {}
    for block in range(adapter.n_blocks):
        for site, module, _, inputs in adapter.modules(block):
            settled = any(matches(pattern, module) for pattern in (*recipe.keep_modules, *recipe.schemes))
            if site.role.value not in recipe.quantize_roles or settled or site.role.value in recipe.schemes:
                continue
            found.setdefault(adapter.unit(module), []).append(module)
            problems |= {
                f"{scheme} does not divide the {inputs} inputs of {site.role.value} matrices": None
                for scheme in menu_of(recipe)
                if not scheme.divides(inputs)
            }
    if not found and not problems:
        problems["quantize_roles, schemes and keep_modules leave no module whose width could be chosen"] = None
    if problems:
        raise input_error(f"the recipe {recipe.name} cannot be fitted to this model:", problems, "Change the recipe.")
    return found


def bytes_of_units(
    model: Model, units: dict[str, list[str]], menu: Iterable[Scheme]
) -> dict[tuple[str, Scheme | None], int]:
    """(unit, width) -> bytes of its tensors; None: as the source has them."""
    adapter = model.adapter
    shapes = {m: (o, i) for b in range(adapter.n_blocks) for _, m, o, i in adapter.modules(b)}
    schemes = list(menu)
    sizes: dict[tuple[str, Scheme | None], int] = {}
    for unit, modules in units.items():
        dtype = stored_dtype(adapter, model.source, f"{modules[0]}.weight")
        for scheme in schemes:
            sizes[unit, scheme] = sum(packed_bytes(scheme, *shapes[m], DTYPE_NAMES[dtype]) for m in modules)
        sizes[unit, None] = sum(shapes[m][0] * shapes[m][1] for m in modules) * dtype.itemsize
    return sizes


def request_of(recipe: Recipe) -> tuple[Request, Any] | None:
    """What the recipe asks of a card, and the card. Raises InputError for one that is not known."""
    if recipe.gpu is None:
        return None
    count, card = find_card(recipe.gpu)
    asked = Request(
        context=recipe.context, sequences=recipe.sequences, kv_dtype=recipe.kv_dtype, engine=recipe.engine,
        tensor_parallel=count, vision=recipe.vision,
    )  # fmt: skip
    return asked, card


def resolved(recipe: Recipe, modules: dict[str, list[str]], widths: dict[str, Scheme | None]) -> Recipe:
    """The recipe with the width of every unit written down: any reader of a recipe then knows what was chosen."""
    said: dict[str, str] = {}
    for unit, names in modules.items():
        words = KEEP if widths[unit] is None else str(widths[unit])
        keys = [f"{unit}.*"] if names[0].startswith(f"{unit}.") else names
        said |= dict.fromkeys(keys, words)
    return recipe.model_copy(update={"bits": 4, "schemes": recipe.schemes | said})


def fit_to(model: Model, recipe: Recipe, prices: Prices, budget_bytes: int | None = None) -> Fitted:
    """The best choice within the recipe's budget, or within `budget_bytes` of files.

    Raises FitError with the least that can be had.
    """
    adapter = model.adapter
    modules = priced_units(adapter, recipe)
    allowed = [*menu_of(recipe), *([None] if KEEP in recipe.fit_schemes else [])]
    units = [replace(unit, widths=tuple(w for w in unit.widths if w.scheme in allowed)) for unit in prices.held]
    gain = GAINS[recipe.method]
    asked = request_of(recipe)
    budget = (
        budget_bytes if budget_bytes is not None else None if recipe.budget_gb is None else int(recipe.budget_gb * GB)
    )
    least = resolved(recipe, modules, {u.unit: min(u.widths, key=lambda w: w.bytes).scheme for u in units})
    if budget is None and asked is not None:
        request, card = asked
        return _on_card(model, recipe, least, modules, units, gain, request, card)
    assert budget is not None, "a recipe that is fitted names a card or a budget"
    # Headers grow and shrink with the shapes in them: what the files take too much is taken off the budget.
    smallest = plan_for(model, least).emitted_bytes
    rest = smallest - sum(min(w.bytes for w in unit.widths) for unit in units)
    if smallest > budget:
        raise FitError(
            f"{budget / GB:.2f} GB cannot be met: the smallest checkpoint that {recipe.name} can make of {model.name} "
            f"has {smallest:,} bytes ({smallest / GB:.2f} GB). Below four bits a weight nothing is offered: take a "
            "smaller model, or more cards"
        )
    room = budget - rest
    while True:
        choice = allocate(units, room, gain)
        found = resolved(recipe, modules, _widths(units, choice))
        excess = plan_for(model, found).emitted_bytes - budget
        if excess <= 0:
            return Fitted(found, choice, tuple(units), budget, None)
        room -= excess


def _widths(units: Iterable[UnitPrices], choice: Choice) -> dict[str, Scheme | None]:
    return {unit.unit: width.scheme for unit, width in zip(units, choice.widths, strict=True)}


def _on_card(
    model: Model, recipe: Recipe, least: Recipe, modules: dict[str, list[str]], units: list[UnitPrices], gain: float,
    request: Request, card: Any,
) -> Fitted:  # fmt: skip
    """Bytes on each card: a unit's are cut over them, and some are not."""
    adapter = model.adapter
    budget = weight_budget_bytes(Needs.of(adapter), card, request)

    def on_card(unit: UnitPrices, width: Priced) -> int:
        # All modules of a unit are cut alike, or by whole KV heads, which is more on many cards: then by its module.
        places = [
            (place_of(adapter, f"{m}.weight"), width.bytes // len(modules[unit.unit])) for m in modules[unit.unit]
        ]
        return device_weights(adapter, places).on_card(request.tensor_parallel, request.vision)

    local = [replace(unit, widths=tuple(replace(w, bytes=on_card(unit, w)) for w in unit.widths)) for unit in units]
    smallest = recipe_candidate(model, entries_of(model), least).weights.on_card(
        request.tensor_parallel, request.vision
    )
    rest = smallest - sum(min(w.bytes for w in unit.widths) for unit in local)
    if smallest > budget:
        raise FitError(
            f"{recipe.gpu} leaves {budget / GB:.2f} GB for weights beside {request.context:,} tokens of context x "
            f"{request.sequences}, and the smallest checkpoint that {recipe.name} can make of {model.name} takes "
            f"{smallest / GB:.2f} GB there: a shorter context, fewer sequences, an fp8 cache, or more cards "
            "(`onecard plan` says which)"
        )
    choice = allocate(local, budget - rest, gain)
    found = resolved(recipe, modules, _widths(units, choice))
    widths = [unit.at(width.scheme) for unit, width in zip(units, choice.widths, strict=True)]
    return Fitted(found, chosen(units, widths, gain), tuple(units), budget, request)


def price_model(
    model: Model, recipe: Recipe, rows: list[Row], folder: Path, device: torch.device, dtype: torch.dtype, step: Step
) -> Prices:
    """Prices of all units that the recipe leaves open."""
    units, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    return price(model, recipe, rows, units, menu, bytes_of_units(model, units, menu), folder, device, dtype, step)


def save_prices(
    path: Path, prices: Prices, model: Model, recipe: Recipe, rows: list[Row], device: torch.device, dtype: torch.dtype
) -> None:
    write_json(path, {"identity": identity_of(model, recipe, rows, device, dtype), "prices": prices.facts()})


def load_prices(
    path: Path, model: Model, recipe: Recipe, rows: list[Row], device: torch.device, dtype: torch.dtype
) -> Prices:
    """Prices that were taken before. Raises InputError for a file that is not one, or is of something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        old, prices = {str(k): str(v) for k, v in data["identity"].items()}, Prices.from_facts(data["prices"])
    except OSError as error:
        raise InputError(f"the prices {path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no prices: `onecard pareto MODEL --prices FILE` writes them") from None
    new = identity_of(model, recipe, rows, device, dtype)
    refuse_changed(old, new, f"the prices {path} are of something else:", "Take them anew, in another file.")
    return prices
