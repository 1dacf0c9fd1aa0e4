"""`bits: fit`: from prices and a budget to the width of every unit, and to the recipe that says so.

The budget is what a card leaves for weights beside the context, sequences and engine of the recipe (planner/fit.py),
or so many bytes of files. What is priced are the units of the recipe's roles, but for those that its `schemes` or
`keep_modules` settle. Bytes of a width are those that the plan lays out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.assign import plan_for, schemes_of
from ..checkpoint.files import write_json
from ..checkpoint.model import Model, said_name
from ..checkpoint.paths import check_space
from ..checkpoint.workdir import refuse_changed
from ..core.device import Compute
from ..core.errors import FitError, InputError, input_error
from ..core.recipe_groups import KEEP
from ..core.rows import Row
from ..core.scheme import Scheme
from ..models.adapter import Adapter
from ..models.walk import Walk
from ..planner.candidates import Entry, bytes_at, entries_of, recipe_candidate
from ..planner.cards import Card, find_card
from ..planner.fit import Needs, Request, weight_budget_bytes
from ..planner.pricing_cost import hidden_bytes, stream_count
from ..planner.sizing import size_up
from ..planner.weights import cut_problems, device_weights
from ..recipe import Recipe, matches
from ..report.fit_card import misfit
from .allocate import Choice, allocate, chosen
from .prices import Priced, UnitPrices
from .pricing import Prices, identity_of, is_begun, price, priced_rows

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
            "gain": GAINS[self.recipe.quantizer.method],
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
    return tuple(Scheme.parse(words) for words in recipe.fit.fit_schemes if words != KEEP)


def priced_units(adapter: Adapter, recipe: Recipe) -> dict[str, list[str]]:
    """Unit -> its modules, of all whose width the recipe leaves open. Raises InputError where a width of the menu does
    not suit an input, or nothing is left to choose."""
    found: dict[str, list[str]] = {}
    problems: dict[str, None] = {}
    menu = menu_of(recipe)
    for block in range(adapter.n_blocks):
        for site, module, _, inputs in adapter.modules(block):
            settled = any(matches(pattern, module) for pattern in (*recipe.widths.keep_modules, *recipe.widths.schemes))
            if (
                site.role.value not in recipe.widths.quantize_roles
                or settled
                or site.role.value in recipe.widths.schemes
            ):
                continue
            found.setdefault(adapter.unit(module), []).append(module)
            problems |= {
                f"{scheme} does not divide the {inputs} inputs of {site.role.value} matrices": None
                for scheme in menu
                if not scheme.divides(inputs)
            }
    if not found and not problems:
        problems["quantize_roles, schemes and keep_modules leave no module whose width could be chosen"] = None
    if problems:
        raise input_error(
            f"the recipe {recipe.name} cannot be fitted to this model:", problems, "Name widths in fit_schemes that do."
        )
    return found


def bytes_of_units(
    model: Model, units: dict[str, list[str]], menu: Iterable[Scheme]
) -> dict[tuple[str, Scheme | None], int]:
    """(unit, width) -> bytes of its tensors; None: as the source has them."""
    entries = {entry.name: entry for entry in entries_of(model)}
    widths: list[Scheme | None] = [*menu, None]
    return {
        (unit, scheme): sum(bytes_at(entries[f"{module}.weight"], scheme) for module in modules)
        for unit, modules in units.items()
        for scheme in widths
    }


def request_of(recipe: Recipe) -> tuple[Request, Card] | None:
    """What the recipe asks of a card, and the card. Raises InputError for one that is not known."""
    served = recipe.card
    if served.gpu is None:
        return None
    count, card = find_card(served.gpu)
    asked = Request(
        context=served.context,
        sequences=served.sequences,
        kv_dtype=served.kv_dtype,
        engine=served.engine,
        tensor_parallel=count,
        vision=served.vision,
        batch_tokens=served.engine_batch_tokens,
    )
    return asked, card


def resolved(recipe: Recipe, modules: dict[str, list[str]], widths: dict[str, Scheme | None]) -> Recipe:
    """The recipe with the width of every unit written down: any reader of a recipe then knows what was chosen."""
    said: dict[str, str] = {}
    for unit, names in modules.items():
        words = KEEP if widths[unit] is None else str(widths[unit])
        keys = [f"{unit}.*"] if names[0].startswith(f"{unit}.") else names
        said |= dict.fromkeys(keys, words)
    return recipe.model_copy(
        update={"widths": recipe.widths.model_copy(update={"bits": 4, "schemes": recipe.widths.schemes | said})}
    )


def fit_to(model: Model, recipe: Recipe, prices: Prices, budget_bytes: int | None = None) -> Fitted:
    """The best choice within the recipe's budget, or within `budget_bytes` of files.

    Raises FitError with the least that can be had.
    """
    modules = priced_units(model.adapter, recipe)
    allowed = [*menu_of(recipe), *([None] if KEEP in recipe.fit.fit_schemes else [])]
    units = [replace(unit, widths=tuple(w for w in unit.widths if w.scheme in allowed)) for unit in prices.held]
    gain = GAINS[recipe.quantizer.method]
    meter, budget = _met(model, recipe, budget_bytes)
    local = [meter.seen(unit, modules[unit.unit]) for unit in units]
    least = [min(unit.widths, key=lambda width: width.bytes) for unit in local]
    smallest = meter.taken(_resolved_to(recipe, modules, local, least))
    room = budget - (smallest - sum(width.bytes for width in least))
    # Headers grow and shrink with the shapes in them, and cards round up what is cut: what a choice takes too much is
    # taken off the room.
    while True:
        room = max(room, sum(width.bytes for width in least))
        widths = allocate(local, room, gain).widths
        excess = meter.taken(_resolved_to(recipe, modules, local, widths)) - budget
        if excess <= 0 or room == sum(width.bytes for width in least):
            break
        room -= excess
    if excess > 0:
        widths = tuple(least)
    own = [unit.at(width.scheme) for unit, width in zip(units, widths, strict=True)]
    found = _resolved_to(recipe, modules, units, own)
    return Fitted(found, chosen(units, own, gain), tuple(units), budget, meter.request)


def refuse_unmeetable(model: Model, recipe: Recipe) -> None:
    """What fit_to would refuse whatever the prices are, before they are measured. Raises InputError or FitError."""
    _met(model, recipe, None)


@dataclass(frozen=True)
class _Meter:
    """How a budget is measured: in bytes of files, or on each card."""

    model: Model
    request: Request | None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in entries_of(self.model)}

    def taken(self, recipe: Recipe) -> int:
        """Bytes that a fitted recipe takes of the budget."""
        if self.request is None:
            return plan_for(self.model, recipe).emitted_bytes
        made = recipe_candidate(self.model, tuple(self.entries.values()), recipe)
        return made.weights.on_card(self.request.tensor_parallel, self.request.vision)

    def seen(self, unit: UnitPrices, modules: list[str]) -> UnitPrices:
        """The unit with the bytes of its widths as the budget counts them: on several cards a module is cut, by whole
        KV heads, or not."""
        request = self.request
        if request is None:
            return unit
        entries = [self.entries[f"{module}.weight"] for module in modules]

        def on_card(width: Priced) -> int:
            spread = device_weights(self.model.adapter, ((e.place, bytes_at(e, width.scheme)) for e in entries))
            return spread.on_card(request.tensor_parallel, request.vision)

        return replace(unit, widths=tuple(replace(width, bytes=on_card(width)) for width in unit.widths))


def _met(model: Model, recipe: Recipe, budget_bytes: int | None) -> tuple[_Meter, int]:
    """How the budget is measured, and the budget. Raises FitError where nothing meets it, InputError for widths that
    cannot be cut over the cards."""
    modules, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    sizes = bytes_of_units(model, modules, menu)
    allowed = [*menu, *([None] if KEEP in recipe.fit.fit_schemes else [])]
    least = resolved(recipe, modules, {unit: min(allowed, key=lambda s: sizes[unit, s]) for unit in modules})
    asked = request_of(recipe) if budget_bytes is None and recipe.fit.budget_gb is None else None
    if asked is None:
        assert budget_bytes is not None or recipe.fit.budget_gb is not None, "a recipe that is fitted has a budget"
        budget = round((recipe.fit.budget_gb or 0) * GB) if budget_bytes is None else budget_bytes
        meter = _Meter(model, None)
        smallest = meter.taken(least)
        if smallest > budget:
            raise FitError(
                f"{budget:,} bytes ({budget / GB:.4g} GB) cannot be met: the smallest checkpoint that {recipe.name} "
                f"can make of {model.name} has {smallest:,} bytes ({smallest / GB:.4g} GB). Below four bits a weight "
                "nothing is offered: take a smaller model, or more cards. Nothing was written"
            )
        kept = smallest + sum(sizes[unit, None] - min(sizes[unit, s] for s in allowed) for unit in modules)
        _refuse_needless(model, recipe, modules, kept, budget)
        return meter, budget
    request, card = asked
    problems = {
        problem: None
        for scheme in menu
        for problem in cut_problems(
            model.adapter,
            request.tensor_parallel,
            {module: scheme.group_size for names in modules.values() for module in names},
        )
    }
    if problems:
        raise input_error(
            f"{recipe.name} cannot be fitted to {recipe.card.gpu}:", problems, "Change fit_schemes or gpu."
        )
    meter = _Meter(model, request)
    budget = weight_budget_bytes(Needs.of(model.adapter), card, request)
    smallest = meter.taken(least)
    if smallest > budget:
        raise FitError(
            f"{recipe.card.gpu} leaves {budget / GB:.2f} GB for weights beside {request.context:,} tokens of context x "
            f"{request.sequences}, and the smallest checkpoint that {recipe.name} can make of {model.name} takes "
            f"{smallest / GB:.2f} GB there: a shorter context, fewer sequences, an fp8 cache, or more cards "
            "(`onecard plan` says which). Nothing was written"
        )
    dense = recipe_candidate(model, tuple(meter.entries.values()), least).dense
    _refuse_needless(model, recipe, modules, dense.on_card(request.tensor_parallel, request.vision), budget)
    return meter, budget


def _refuse_needless(model: Model, recipe: Recipe, modules: dict[str, list[str]], kept_bytes: int, budget: int) -> None:
    """Raises InputError where the best choice is to quantize nothing at all."""
    if KEEP not in recipe.fit.fit_schemes or kept_bytes > budget:
        return
    try:
        schemes_of(model.adapter, resolved(recipe, modules, dict.fromkeys(modules)))
    except InputError:
        raise InputError(
            f"{model.name} has {kept_bytes / GB:.4g} GB as it is, and there is room for {budget / GB:.4g} GB: nothing "
            f"needs to be quantized. A smaller budget, or fit_schemes without '{KEEP}', quantizes all the same"
        ) from None


def _resolved_to(
    recipe: Recipe, modules: dict[str, list[str]], units: Iterable[UnitPrices], widths: Iterable[Priced]
) -> Recipe:
    return resolved(recipe, modules, {unit.unit: width.scheme for unit, width in zip(units, widths, strict=True)})


def price_model(walk: Walk, model: Model, recipe: Recipe, rows: list[Row], folder: Path) -> Prices:
    """Prices of all units that the recipe leaves open. Raises ResourceError where the disk cannot hold the streams."""
    units, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    if not is_begun(folder):
        read_by_variants, others = priced_rows(rows, recipe)
        tokens, other_tokens = (sum(len(row.tokens) for row in part) for part in (read_by_variants, others))
        streams = stream_count(len(units), len(menu))
        check_space(
            folder, hidden_bytes(model.adapter.hidden_size, streams, tokens, other_tokens, walk.compute.dtype.itemsize)
        )
    bytes_of = bytes_of_units(model, units, menu)
    return price(walk, recipe, rows, units=units, menu=menu, bytes_of=bytes_of, folder=folder)


def save_prices(path: Path, prices: Prices, model: Model, recipe: Recipe, rows: list[Row], compute: Compute) -> None:
    write_json(path, {"identity": identity_of(model, recipe, rows, compute), "prices": prices.facts()})


def load_prices(path: Path, model: Model, recipe: Recipe, rows: list[Row], compute: Compute) -> Prices:
    """Prices that were taken before. Raises InputError for a file that is not one, or is of something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        old, prices = {str(k): str(v) for k, v in data["identity"].items()}, Prices.from_facts(data["prices"])
    except OSError as error:
        raise InputError(f"the prices {path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no prices: `onecard pareto MODEL --prices FILE` writes them") from None
    new = identity_of(model, recipe, rows, compute)
    refuse_changed(old, new, f"the prices {path} are of something else:", "Take them anew, in another file.")
    return prices


def on_its_card(model: Model, recipe: Recipe) -> dict[str, Any]:
    """How the recipe's checkpoint does on the card that it names, for the record; empty without one, or before its
    widths are chosen. Raises FitError where it does not fit."""
    asked = request_of(recipe)
    if asked is None or recipe.widths.bits == "fit":
        return {}
    request, card = asked
    facts = size_up(model, request, card, recipe).facts() | {"model": said_name(model.name)}
    if not facts["fits"]:
        raise FitError(f"{misfit(facts)}\nThe recipe {recipe.name} is for {recipe.card.gpu}: nothing was written")
    return facts
