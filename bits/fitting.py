"""`bits: fit`: choose the width of every unit from prices and a budget, and write the choice into a recipe.

The budget is either a size of the checkpoint's files, or the memory that a card leaves for weights beside the recipe's
context, sequences and engine (planner/fit.py). Priced are the units in the recipe's `quantize_roles`, except those
whose width `schemes` or `keep_modules` already sets. The planner's layout gives the bytes of each width.
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

# Each method's error divided by the error of the quantizer used for pricing, with the whole model rounded. Methods aim
# at the reference and search, so they leave less. Measured on the embedded model and on a small Qwen3-MoE
# (benchmarks/fit.py). A value that is too high overstates the predicted KL and changes few choices.
GAINS = {"rtn": 1.0, "fast": 0.79, "balanced": 0.7, "best": 0.68}
GB = 10**9


@dataclass(frozen=True)
class Fitted:
    """The widths chosen for a model. `recipe` names them module by module. `request` is None for a budget of files."""

    recipe: Recipe
    choice: Choice
    units: tuple[UnitPrices, ...]
    budget_bytes: int
    request: Request | None

    def facts(self, adapter: Adapter) -> dict[str, Any]:
        """Data for the record. Each unit has its block, and its name within the block (`kind`)."""
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
    """Unit -> its modules, for every unit whose width the recipe leaves open.

    Raises InputError if a scheme of the menu does not divide a matrix's inputs, or if no unit is left to choose for.
    """
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
        problems["quantize_roles, schemes and keep_modules leave no module to choose a width for"] = None
    if problems:
        raise input_error(
            f"the recipe {recipe.name} cannot be fitted to this model:",
            problems,
            "Change fit_schemes, quantize_roles, schemes or keep_modules.",
        )
    return found


def bytes_of_units(
    model: Model, units: dict[str, list[str]], menu: Iterable[Scheme]
) -> dict[tuple[str, Scheme | None], int]:
    """(unit, width) -> bytes of the unit's tensors. Width None keeps them as they are in the source."""
    entries = {entry.name: entry for entry in entries_of(model)}
    widths: list[Scheme | None] = [*menu, None]
    return {
        (unit, scheme): sum(bytes_at(entries[f"{module}.weight"], scheme) for module in modules)
        for unit, modules in units.items()
        for scheme in widths
    }


def request_of(recipe: Recipe) -> tuple[Request, Card] | None:
    """The recipe's request and its card; None if the recipe names no card. Raises InputError for an unknown card."""
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
    """The recipe with every unit's width in `schemes`, so that any reader of a recipe sees the choice."""
    said: dict[str, str] = {}
    for unit, names in modules.items():
        words = KEEP if widths[unit] is None else str(widths[unit])
        keys = [f"{unit}.*"] if names[0].startswith(f"{unit}.") else names
        said |= dict.fromkeys(keys, words)
    return recipe.model_copy(
        update={"widths": recipe.widths.model_copy(update={"bits": 4, "schemes": recipe.widths.schemes | said})}
    )


def fit_to(model: Model, recipe: Recipe, prices: Prices, budget_bytes: int | None = None) -> Fitted:
    """The best choice within `budget_bytes` of files, or within the recipe's budget if that is None.

    Raises FitError, which states the smallest possible size, or InputError if nothing needs to be quantized.
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
    # The sum over units is not exact: header sizes depend on the shapes in them, and a tensor cut over cards rounds up.
    # Shrink the room by each choice's excess until one fits.
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
    """Raise fit_to's errors that do not depend on prices, before any are measured: InputError or FitError."""
    _met(model, recipe, None)


@dataclass(frozen=True)
class _Meter:
    """Counts bytes against the budget: bytes of files if `request` is None, else bytes on each card."""

    model: Model
    request: Request | None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in entries_of(self.model)}

    def taken(self, recipe: Recipe) -> int:
        """Bytes of the budget that a fitted recipe uses."""
        if self.request is None:
            return plan_for(self.model, recipe).emitted_bytes
        made = recipe_candidate(self.model, tuple(self.entries.values()), recipe)
        return made.weights.on_card(self.request.tensor_parallel, self.request.vision)

    def seen(self, unit: UnitPrices, modules: list[str]) -> UnitPrices:
        """The unit with each width's bytes as the budget counts them.

        Over several cards a module is split, split by whole KV heads, or copied to each.
        """
        request = self.request
        if request is None:
            return unit
        entries = [self.entries[f"{module}.weight"] for module in modules]

        def on_card(width: Priced) -> int:
            spread = device_weights(self.model.adapter, ((e.place, bytes_at(e, width.scheme)) for e in entries))
            return spread.on_card(request.tensor_parallel, request.vision)

        return replace(unit, widths=tuple(replace(width, bytes=on_card(width)) for width in unit.widths))


def _met(model: Model, recipe: Recipe, budget_bytes: int | None) -> tuple[_Meter, int]:
    """The meter, and the budget in bytes.

    Raises FitError if no choice meets the budget. Raises InputError if a width cannot be split over the cards, or if
    nothing needs to be quantized.
    """
    modules, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    sizes = bytes_of_units(model, modules, menu)
    allowed = [*menu, *([None] if KEEP in recipe.fit.fit_schemes else [])]
    least = resolved(recipe, modules, {unit: min(allowed, key=lambda s: sizes[unit, s]) for unit in modules})
    asked = request_of(recipe) if budget_bytes is None and recipe.fit.budget_gb is None else None
    if asked is None:
        assert budget_bytes is not None or recipe.fit.budget_gb is not None, "a fitted recipe has a budget"
        budget = round((recipe.fit.budget_gb or 0) * GB) if budget_bytes is None else budget_bytes
        meter = _Meter(model, None)
        smallest = meter.taken(least)
        if smallest > budget:
            raise FitError(
                f"{budget:,} bytes ({budget / GB:.4g} GB) are too few: the smallest checkpoint that {recipe.name} "
                f"can make of {model.name} has {smallest:,} bytes ({smallest / GB:.4g} GB). onecard has no width below "
                "four bits a weight: take a smaller model, or more cards. Nothing was written"
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
            f"{request.sequences}. The smallest checkpoint that {recipe.name} can make of {model.name} takes "
            f"{smallest / GB:.2f} GB there. Choose a shorter context, fewer sequences, an fp8 cache, or more cards: "
            "`onecard plan` says which would fit. Nothing was written"
        )
    dense = recipe_candidate(model, tuple(meter.entries.values()), least).dense
    _refuse_needless(model, recipe, modules, dense.on_card(request.tensor_parallel, request.vision), budget)
    return meter, budget


def _refuse_needless(model: Model, recipe: Recipe, modules: dict[str, list[str]], kept_bytes: int, budget: int) -> None:
    """Raises InputError if all open units fit unquantized and the recipe quantizes nothing else."""
    if KEEP not in recipe.fit.fit_schemes or kept_bytes > budget:
        return
    try:
        schemes_of(model.adapter, resolved(recipe, modules, dict.fromkeys(modules)))
    except InputError:
        raise InputError(
            f"{model.name} takes {kept_bytes / GB:.4g} GB as it is, and the budget is {budget / GB:.4g} GB: nothing "
            f"needs to be quantized. To quantize it anyway, lower the budget or remove '{KEEP}' from fit_schemes"
        ) from None


def _resolved_to(
    recipe: Recipe, modules: dict[str, list[str]], units: Iterable[UnitPrices], widths: Iterable[Priced]
) -> Recipe:
    return resolved(recipe, modules, {unit.unit: width.scheme for unit, width in zip(units, widths, strict=True)})


def price_model(walk: Walk, model: Model, recipe: Recipe, rows: list[Row], folder: Path) -> Prices:
    """Measure the prices of every unit whose width the recipe leaves open; `folder` holds the pass's state.

    Raises ResourceError if the disk cannot hold the streams.
    """
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
    """Read prices that save_prices wrote.

    Raises InputError if the file holds no prices, or prices of another model, recipe, texts or compute type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        old, prices = {str(k): str(v) for k, v in data["identity"].items()}, Prices.from_facts(data["prices"])
    except OSError as error:
        raise InputError(f"the prices {path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no prices: `onecard pareto MODEL --prices FILE` writes them") from None
    new = identity_of(model, recipe, rows, compute)
    refuse_changed(old, new, f"the prices {path} do not belong to this run:", "Measure new ones into another file.")
    return prices


def on_its_card(model: Model, recipe: Recipe) -> dict[str, Any]:
    """Sizing facts of the recipe's checkpoint on the recipe's card, for the record.

    Empty if the recipe names no card or its widths are not chosen yet. Raises FitError if the checkpoint does not fit.
    """
    asked = request_of(recipe)
    if asked is None or recipe.widths.bits == "fit":
        return {}
    request, card = asked
    facts = size_up(model, request, card, recipe).facts() | {"model": said_name(model.name)}
    if not facts["fits"]:
        raise FitError(f"{misfit(facts)}\nThe recipe {recipe.name} is for {recipe.card.gpu}: nothing was written")
    return facts
