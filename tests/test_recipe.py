"""Recipes and the list of known families: one list, and the words of the shipped recipes follow it."""

from typing import get_args, get_type_hints

import pytest

from onecard.models.families import ADAPTERS
from onecard.models.known import FAMILIES, MODEL_TYPES
from onecard.recipe import Recipe, load_recipe


def test_the_known_families_are_those_of_the_adapters_and_of_recipes() -> None:
    assert {name: adapter.family for name, adapter in ADAPTERS.items()} == MODEL_TYPES
    assert set(FAMILIES) == set(MODEL_TYPES.values())
    literal, _ = get_args(get_type_hints(Recipe)["family"])
    assert set(get_args(literal)) == set(FAMILIES)


@pytest.mark.parametrize("name", ["rtn-int4", "nf4"])
def test_a_recipe_for_every_family_names_them(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.family is None
    assert "any family" not in recipe.description
    assert [words for words in FAMILIES.values() if words not in recipe.description] == []
