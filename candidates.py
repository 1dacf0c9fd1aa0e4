"""What could be put on a card: what each recipe would emit of an original, or a checkpoint as it lies there.

Bytes are those of the stored tensors, from headers and recipes alone.
"""

import re
from dataclasses import dataclass
from math import prod

from .core.errors import InputError
from .core.tensors import TORCH_DTYPES
from .planner.changes import Choice
from .planner.plan import Plan, Width, tally
from .planner.weights import DeviceWeights, device_weights, planned_weights
from .prepare import Model, plan_for, stored_weights
from .recipe import Recipe, load_recipe, recipe_names

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Candidate:
    """Something that could be put on the card. `groups`: module -> group size, where it is quantized; `widths` by role,
    for the engines' remarks; `dense`: the same, unpacked to the original's dtype."""

    name: str
    note: str | None
    weights: DeviceWeights
    dense: DeviceWeights
    groups: dict[str, int]
    widths: tuple[Width, ...]
    symmetric: bool
    file_bytes: int
    unpacked: bool  # whether transformers unpacks it when it is loaded

    def choice(self, dequantizes: bool) -> Choice:
        return Choice(self.name, self.dense if dequantizes and self.unpacked else self.weights)


def recipe_candidate(model: Model, recipe: Recipe, plan: Plan) -> Candidate:
    """What a run with the recipe would emit."""
    adapter = model.adapter
    groups = {module: scheme.group_size for module, scheme in plan.schemes.items()}
    weights = planned_weights(adapter, plan)
    symmetric = all(scheme.symmetric for scheme in plan.schemes.values())
    dense = _dense(model)
    return Candidate(
        recipe.name, recipe.note, weights, dense, groups, plan.widths, symmetric, plan.emitted_bytes, unpacked=True
    )


def own_candidate(model: Model) -> Candidate:
    """The checkpoint as it lies there."""
    stored = stored_weights(model)
    weights = device_weights(model.adapter, ((name, entry.bytes) for name, entry in stored.items()))
    groups = {}
    for name, entry in stored.items():
        found = re.search(r"group (\d+)", entry.width)
        if found:
            groups[name.removesuffix(".weight")] = int(found[1])
    symmetric = not any("asymmetric" in entry.width for entry in stored.values())
    widths = tally(stored.values())
    unpacked = model.quantized and getattr(model.source, "label", "").startswith("compressed-tensors")
    file_bytes = model.folder.file_bytes
    return Candidate(AS_IT_IS, None, weights, _dense(model), groups, widths, symmetric, file_bytes, unpacked)


def _dense(model: Model) -> DeviceWeights:
    adapter, source = model.adapter, model.source

    def size(name: str, shape: tuple[int, ...]) -> int:
        return prod(shape) * TORCH_DTYPES[source.info(adapter.locate(name, source.names).tensor).dtype].itemsize

    return device_weights(adapter, ((name, size(name, shape)) for name, shape in adapter.expected().items()))


def candidates_of(model: Model, recipe: Recipe | None, plan: Plan | None) -> list[Candidate]:
    """What could be put on a card, the most bytes first: of an original what every shipped recipe that suits it would
    emit, and it itself; of a quantized checkpoint it alone."""
    if model.quantized:
        return [own_candidate(model)]
    found = [own_candidate(model)]
    if recipe is not None:
        found.append(recipe_candidate(model, recipe, plan or plan_for(model, recipe)))
    # The family's own recipes first: of two of one size the first is kept. The demo's recipe is for its texts.
    shipped = sorted((load_recipe(name) for name in recipe_names() if name != "demo"), key=lambda r: r.family is None)
    for each in shipped:
        if each.family in (None, model.adapter.family) and (recipe is None or each.name != recipe.name):
            try:
                made = recipe_candidate(model, each, plan_for(model, each))
            except InputError:
                continue  # it does not suit this model: its groups, or its roles
            if all(made.weights.total_bytes != other.weights.total_bytes for other in found):
                found.append(made)
    return sorted(found, key=lambda c: -c.weights.total_bytes)
