"""Find the smallest changes that make a candidate fit, the least painful first.

A change is a set of steps: prompts read in smaller passes (slower to the first token), an fp8 cache, another recipe, no
vision tower. A set is offered only if no part of it would be enough. Sets are ranked by how much the answers may lose,
then by their number of steps. A shorter context, fewer sequences and more cards are not changes: sizing.py reports them
separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from .cards import Card
from .fit import Fit, Needs, Request, fit, pass_tokens
from .weights import DeviceWeights

# Tokens of a small pass: vLLM's default on small cards. Still smaller passes make reading a prompt slow.
SMALL_PASS = 2048
# The cost of each step, without a unit. Passes do not change the answers. An fp8 cache changes them a little. A recipe
# costs more the smaller it is. Without the vision tower, the model reads no pictures.
PASS_COST, KV_COST, RECIPE_COST, VISION_COST = 1, 10, 20, 60


@dataclass(frozen=True)
class Alternative:
    """Weights that could be put on the card: a recipe's result, or the checkpoint as it is."""

    name: str
    weights: DeviceWeights


@dataclass(frozen=True)
class Change:
    """A set of steps that makes the request fit."""

    # What is changed, in words.
    steps: tuple[str, ...]
    cost: int
    # The name of the weights used after the change.
    choice: str
    # The bytes after the change.
    fit: Fit


def changes(
    needs: Needs,
    card: Card,
    chosen: Alternative,
    others: Sequence[Alternative],
    request: Request,
    keep_tower: bool = False,
) -> list[Change]:
    """The minimal changes that make the request fit, cheapest first.

    `others` may replace `chosen`. They are ordered by bytes, largest first, and only those smaller than `chosen` are
    tried. With `keep_tower`, no change drops the vision tower.
    """
    own = chosen.weights.on_card(request.tensor_parallel, request.vision)
    smaller = [c for c in others if c.weights.on_card(request.tensor_parallel, request.vision) < own]
    passes = pass_tokens(card, request)
    small = SMALL_PASS if passes is None or passes > SMALL_PASS else None
    narrow = next((d for d in request.rules.kv_dtypes[1:] if request.kv_dtype == "bf16"), None)
    tower = not keep_tower and request.vision and not request.images and chosen.weights.vision_bytes > 0
    found: list[tuple[frozenset[str], Change]] = []
    for level, less, slim, blind in product(range(len(smaller) + 1), (False, True), (False, True), (False, True)):
        if (less and small is None) or (slim and narrow is None) or (blind and not tower):
            continue
        choice = smaller[level - 1] if level else chosen
        steps, cost, new = [], 0, request
        if less:
            steps, cost, new = [f"prompts in passes of {small:,}"], PASS_COST, replace(new, batch_tokens=small)
        if slim:
            steps, cost = [*steps, f"{narrow} KV cache"], cost + KV_COST
            new = replace(new, kv_dtype=str(narrow))
        if level:
            steps, cost = [*steps, f"recipe {choice.name}"], cost + RECIPE_COST + level
        if blind:
            steps, cost, new = [*steps, "no vision tower"], cost + VISION_COST, replace(new, vision=False)
        if not steps:
            continue
        made = fit(needs, card, choice.weights.on_card(new.tensor_parallel, new.vision), new)
        if made.fits:
            # All recipes count as one kind, so only the cheapest recipe that fits is offered.
            kinds = frozenset(step if not step.startswith("recipe") else "recipe" for step in steps)
            found.append((kinds, Change(tuple(steps), cost, choice.name, made)))
    least = [
        change
        for kinds, change in found
        if not any(other < kinds or (other == kinds and rival.cost < change.cost) for other, rival in found)
    ]
    return sorted(least, key=lambda change: (change.cost, len(change.steps)))
