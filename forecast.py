"""The verbs that read headers only: what quantizing would emit and take, and what a checkpoint is."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bits.fitting import menu_of, priced_units
from .calibration.texts import calibration_rows
from .checkpoint.assign import plan_for
from .checkpoint.model import Model, open_headers, unquantized
from .checkpoint.plan import Plan
from .conversion.exporters import Files
from .conversion.run_output import planned_files, weight_bytes
from .core.card_rates import ASSUMED, H100_80GB, AssumedCard, CardRates
from .core.device import Compute, choose_compute, choose_dtype
from .core.errors import InputError, ResourceError
from .core.rates import Rates, keep_rates, kept_rates, measure_flops, uniform
from .core.recipe_groups import Serving
from .eval.card_rates import measure_card
from .eval.machine_rates import measure_rates, rates_key
from .models.adapter import Adapter
from .planner.cards import find_card
from .planner.cost import Cost, Machine, estimate
from .planner.fit import Needs, Request
from .planner.pricing_cost import PricingCost, pricing_cost
from .planner.sizing import Sizing, size_up
from .planner.work import MethodCosts, Tokens
from .recipe import Recipe


@dataclass(frozen=True)
class PlanResult:
    """What `onecard plan` shows."""

    model: Model
    recipe: Recipe
    plan: Plan
    planned: Files  # what OUT will hold, in the recipe's format
    cost: Cost
    warnings: list[str]
    rates: Rates | CardRates
    rates_from: str
    # Only of a recipe with `bits: fit`; its plan is then about the smallest possible.
    pricing: PricingCost | None = None

    @property
    def emitted_bytes(self) -> int:
        return weight_bytes(self.planned)

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "model": self.model.name,
            "recipe": self.recipe.name,
            **self.plan.facts(),
            "format": self.recipe.format,
            "emitted_bytes": self.emitted_bytes,
            "files": dict(self.planned),
            "role_bytes": self.plan.role_bytes,
            "estimated_seconds": self.cost.seconds,
            "estimated_seconds_by": self.cost.seconds_by,
            "time_is_a_model": self.cost.is_a_model,
            "rates": asdict(self.rates),
            "rates_from": self.rates_from,
            "estimated_ram_bytes": self.cost.ram_bytes,
            "estimated_device_bytes": self.cost.device_bytes,
            "estimated_disk_bytes": self.cost.disk_bytes,
            **self.cost.rows.facts(),
            **(self.pricing.facts() if self.pricing is not None else {}),
        }


@dataclass(frozen=True)
class CardWish:
    """A card and what it has to hold. None: what the recipe says, or else its default (recipe.Serving)."""

    # As planner/cards.py has them, e.g. h100-80gb or 2xl40s. None, and no recipe's: all cards are tabled.
    gpu: str | None = None
    # Tokens of each sequence.
    context: int | None = None
    sequences: int | None = None
    # bf16, fp8, or llama.cpp's q8_0.
    kv_dtype: str | None = None
    # vllm, transformers or llama.cpp.
    engine: str | None = None
    # Cards that share the model. None: those of `gpu`.
    tensor_parallel: int | None = None
    vision: bool = True
    # Images of one request.
    images: int = 0
    # Tokens of one pass over prompts. None: the engine's own.
    batch_tokens: int | None = None
    # Share of the card that the engine takes. None: the engine's own.
    memory_share: float | None = None
    # Sliding and chunked layers keep every token, as without vLLM's hybrid KV cache manager.
    keep_local: bool = False

    def request(self, recipe: Recipe | None, cards: int) -> Request:
        """The question for the planner, about `cards` cards of one kind."""
        served = Serving() if recipe is None else recipe.card
        return Request(
            context=self.context or served.context,
            sequences=self.sequences or served.sequences,
            kv_dtype=self.kv_dtype or served.kv_dtype,
            engine=self.engine or served.engine,
            tensor_parallel=self.tensor_parallel or cards,
            vision=self.vision and served.vision,
            images=self.images,
            batch_tokens=self.batch_tokens or served.engine_batch_tokens,
            memory_share=self.memory_share,
            frees=False if self.keep_local else None,
        )


@dataclass(frozen=True)
class Forecast:
    """Whether a model fits a card; and with a recipe, what quantizing emits and takes."""

    sizing: Sizing
    quantizing: PlanResult | None

    @property
    def fits(self) -> bool | None:
        """None where no card was named."""
        return self.sizing.fits

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return self.sizing.facts() | (self.quantizing.line() if self.quantizing is not None else {})


def plan_on_card(
    model_name: str,
    recipe: Recipe | None,
    wish: CardWish,
    device_name: str = "auto",
    measure: bool = False,
    assume: str | None = None,
) -> Forecast:
    """Whether the model fits the card of `wish`, or else the recipe's; reads headers only. Raises InputError."""
    gpu = wish.gpu or (recipe.card.gpu if recipe is not None else None)
    many, card = find_card(gpu) if gpu else (1, None)
    parallel = wish.tensor_parallel
    if parallel is not None and many > 1 and parallel != many:
        raise InputError(f"--gpu {gpu} names {many} cards and --tensor-parallel {parallel}: give one of them")
    asked = wish.request(recipe, many)
    quantizing = plan(model_name, recipe, device_name, measure, assume) if recipe is not None else None
    opened = quantizing.model if quantizing is not None else open_headers(model_name)
    if wish.context is None and (recipe is None or recipe.card.gpu is None):
        asked = replace(asked, context=min(asked.context, Needs.of(opened.adapter).most_context))
    return Forecast(size_up(opened, asked, card, quantizing.recipe if quantizing is not None else None), quantizing)


def plan(
    model_name: str, recipe: Recipe, device_name: str = "auto", measure: bool = False, assume: str | None = None
) -> PlanResult:
    """What quantizing would emit and take; reads headers only.

    With `measure`, this machine's rates are measured first and kept. Without, kept rates for this very work are used if
    there are any. `assume`: of another machine, one of core/card_rates.ASSUMED.
    """
    assumed = None if assume is None else ASSUMED[assume]
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens) if assumed is None else None
    model = unquantized(open_headers(model_name))
    laid_out = plan_for(model, recipe)
    rates: Rates | CardRates
    if compute is not None:
        rates, rates_from, notes = rates_for(model.adapter, laid_out, recipe, compute, measure)
        machine = Machine.of(compute)
    else:
        assert assumed is not None
        rates, rates_from, notes = assumed.rates, f"assumed of a machine with {assume}, not measured", []
        machine = machine_of(assumed, recipe)
    tokens = calibration_rows(recipe, model.adapter) * recipe.texts.calibration_row_tokens
    row = recipe.texts.calibration_row_tokens
    evaluated = recipe.texts.evaluation_rows * recipe.texts.evaluation_row_tokens
    cost = cost_of(model.adapter, laid_out, recipe, rates, machine, Tokens(tokens, evaluated, row))
    warnings = model.adapter.faults(model.config) + model.warnings + notes
    planned = planned_files(model, laid_out, recipe.format)
    pricing = None
    if recipe.widths.bits == "fit":
        units = list(priced_units(model.adapter, recipe))
        priced = recipe.fit.price_rows * min(recipe.fit.price_row_tokens, recipe.texts.calibration_row_tokens)
        menu = len(menu_of(recipe))
        plain = rates if isinstance(rates, Rates) else rates.by_kind_of_work
        pricing = pricing_cost(model.adapter, units, menu, priced, tokens, machine.itemsize, plain)
    return PlanResult(model, recipe, laid_out, planned, cost, warnings, rates, rates_from, pricing)


def machine_of(card: AssumedCard, recipe: Recipe) -> Machine:
    """A machine with a card that is not at hand, for this recipe."""
    dtype = choose_dtype(recipe.compute_dtype, torch.device("cuda"))
    return Machine.assumed(card, dtype.itemsize, recipe.batch_tokens)


def cost_of(
    adapter: Adapter, plan: Plan, recipe: Recipe, rates: Rates | CardRates, machine: Machine, tokens: Tokens
) -> Cost:
    """The estimate for so many tokens; round-to-nearest reads none for calibration."""
    method = MethodCosts.of(recipe)
    read = tokens if method.statistics else replace(tokens, calibration=0)
    return estimate(adapter, plan, method, read, machine, rates)


def rates_for(
    adapter: Adapter, plan: Plan, recipe: Recipe, compute: Compute, measure: bool
) -> tuple[Rates | CardRates, str, list[str]]:
    """(rates, where they come from, notes for the user). Raises ResourceError if the disk cannot be measured."""
    on_card = compute.device.type == "cuda"
    key = rates_key(adapter, recipe, compute)
    if measure:
        try:
            rates: Rates | CardRates = (
                measure_card(compute.device) if on_card else measure_rates(adapter, plan, recipe, compute)
            )
        except OSError as error:
            raise ResourceError(
                f"the disk of {Path.cwd()} could not be measured ({error.strerror}): run --measure in the folder that "
                "OUT will lie in"
            ) from error
        note = keep_rates(key, rates)
        return rates, "measured here now", [note] if note else []
    kept: Rates | CardRates | None
    kept, note = kept_rates(key, CardRates) if on_card else kept_rates(key, Rates)
    notes = [note] if note else []
    if kept is not None:
        return kept, "kept from --measure on this machine", notes
    flops = measure_flops(compute.device, compute.dtype)
    if on_card:
        return H100_80GB.rates.at(flops), "assumed of an H100, scaled by one matrix product measured now", notes
    return uniform(flops), "one matrix product measured now; --measure does better", notes
