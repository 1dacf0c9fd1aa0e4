"""`bits: fit` on published cards: the budget comes from the plan, and the chosen widths use it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hollow import QWEN3, SCOUT, published, write_hollow
from onecard.bits.fitting import bytes_of_units, fit_to, menu_of, priced_units
from onecard.bits.prices import Priced, UnitPrices
from onecard.bits.pricing import Prices
from onecard.checkpoint.model import Model, open_model
from onecard.core.errors import FitError, InputError
from onecard.planner.candidates import entries_of, recipe_candidate
from onecard.planner.cards import find_card
from onecard.planner.fit import Needs, Request, weight_budget_bytes
from onecard.recipe import Recipe


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def get(name: str) -> Model:
        return open_model(str(write_hollow(tmp_path_factory.mktemp("hollow") / name, published(name))))

    return get


def card_recipe(**fields: Any) -> Recipe:
    given = {
        "name": "card",
        "description": "x",
        "bits": "fit",
        "gpu": "h100-80gb",
        "context": 131_072,
        "quantize_roles": ["expert", "shared_expert", "mlp", "attention"],
    }
    return Recipe.model_validate(given | fields)


def made_up(model: Model, recipe: Recipe) -> Prices:
    """Made-up prices: attention costs most for each weight, and later blocks less than earlier ones."""
    units, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    sizes = bytes_of_units(model, units, menu)
    roles = {m: s.role.value for b in range(model.adapter.n_blocks) for s, m, _, _ in model.adapter.modules(b)}
    errors = dict(zip(menu, (0.11, 0.1, 0.09, 0.006), strict=False))
    found = []
    for number, (unit, modules) in enumerate(units.items()):
        widths = [Priced(s, sizes[unit, s], e, (0.5 + number % 7) * e**2) for s, e in errors.items()]
        widths.append(Priced(None, sizes[unit, None], 0.0, 0.0))
        found.append(UnitPrices.fitted(unit, roles[modules[0]], 1, widths))
    return Prices(tuple(found), {}, 1, 1)


@pytest.mark.parametrize(("gpu", "cards"), [("h100-80gb", 1), ("2x l40s", 2), ("2x h100-80gb", 2), ("4x l40s", 4)])
def test_scout_on_cards(hollow: Callable[[str], Model], gpu: str, cards: int) -> None:
    """The budget is what the plan leaves for weights. On every card the choice stays within it and uses it."""
    model = hollow(SCOUT)
    recipe = card_recipe(gpu=gpu, context=8192 if "l40s" in gpu else 131_072)
    fitted = fit_to(model, recipe, made_up(model, recipe))
    request = Request(context=recipe.card.context, tensor_parallel=cards)
    budget = weight_budget_bytes(Needs.of(model.adapter), find_card(gpu)[1], request)
    assert fitted.budget_bytes == budget
    made = recipe_candidate(model, entries_of(model), fitted.recipe).weights.on_card(cards)
    assert made <= budget
    assert made > 0.97 * budget


def test_a_card_that_is_too_small(hollow: Callable[[str], Model]) -> None:
    model = hollow(SCOUT)
    recipe = card_recipe()
    prices = made_up(model, recipe)
    with pytest.raises(FitError, match=r"rtx-4090 leaves .* GB there\. Choose a shorter context"):
        fit_to(model, recipe.changed(gpu="rtx-4090"), prices)


def test_widths_that_cannot_be_cut(hollow: Callable[[str], Model]) -> None:
    """768 inputs of an expert's down projection over four cards are 192: no groups of 128."""
    model, recipe = hollow(QWEN3), card_recipe(gpu="4x rtx-4090", context=8192)
    with pytest.raises(InputError, match=r"192 inputs .* group size 128"):
        fit_to(model, recipe, made_up(model, recipe))
