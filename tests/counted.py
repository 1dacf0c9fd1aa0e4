"""What benchmarks/gpu_cost.py counted in the real code, and the planner's model of the same runs."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hollow import MAVERICK, QWEN3, SCOUT
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import Model
from onecard.core.card_rates import H100_80GB
from onecard.core.shipped_recipes import recipe_text
from onecard.core.yaml_file import parse_yaml
from onecard.forecast import machine_of
from onecard.planner.cost import times_of
from onecard.planner.memory import compute_bytes
from onecard.planner.work import MethodCosts, RunWork, Tokens
from onecard.recipe import Recipe

COUNTED = json.loads((Path(__file__).parents[1] / "benchmarks" / "gpu_cost.json").read_text(encoding="utf-8"))
# As benchmarks/gpu_cost.py counts them: a published model, and the shipped recipe whose method is exchanged.
MODELS = {
    "scout": (SCOUT, "llama4-scout-h100"),
    "qwen3-30b-a3b": (QWEN3, "qwen3-30b-a3b-24gb"),
    "maverick": (MAVERICK, "llama4-scout-h100"),
}
ENTRIES = [
    (model, method, int(tokens))
    for model in MODELS
    for method, by_tokens in COUNTED.get(model, {}).items()
    for tokens in sorted(by_tokens, key=int)
]
EVALUATED = 128 * 2048


@cache
def recipe_of(model: str, method: str) -> Recipe:
    shipped = MODELS[model][1]
    given = parse_yaml(shipped, recipe_text(shipped), "")
    given = {key: value for key, value in given.items() if key not in ("tasks", "gpu", "context")}
    return Recipe.model_validate(given | {"method": method, "tasks": []})


def work_of(source: Model, model: str, method: str, tokens: Tokens) -> RunWork:
    recipe = recipe_of(model, method)
    read = tokens if recipe.quantizer.needs_statistics else replace(tokens, calibration=0)
    return RunWork.of(source.adapter, plan_for(source, recipe), MethodCosts.of(recipe), read, 2)


@dataclass(frozen=True)
class Beside:
    """A counted run, and what the planner says of it. Peaks without the rows that wait on the card."""

    counted: dict[str, Any]
    seconds: dict[str, float]  # by kind of stage
    peak_bytes: int

    @property
    def counted_peak_bytes(self) -> int:
        return int(self.counted["device_peak_bytes"] - self.counted.get("rows_on_device_bytes", 0))


def beside(source: Model, model: str, method: str, tokens: int) -> Beside:
    work = work_of(source, model, method, Tokens(tokens, EVALUATED))
    machine = machine_of(H100_80GB, recipe_of(model, method))
    return Beside(
        counted=COUNTED[model][method][str(tokens)],
        seconds=times_of(work, H100_80GB.rates, machine.batch_tokens).by_kind(),
        peak_bytes=compute_bytes(work, machine.site_budget_bytes),
    )
