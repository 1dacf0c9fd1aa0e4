"""The verbs that read headers only: what quantizing would emit and take, and what a checkpoint is."""

from dataclasses import dataclass
from typing import Any

from .checkpoint.packed import PackedSource
from .export import Files, planned_files, weight_bytes
from .models.adapter import Role
from .planner.cost import Cost, estimate, measure_flops
from .planner.plan import Plan
from .prepare import (
    Model,
    choose_device,
    choose_dtype,
    method_of,
    open_model,
    open_source,
    plan_for,
    site_budget,
    stored_widths,
    work_of,
)
from .recipe import Recipe
from .texts import calibration_rows


@dataclass(frozen=True)
class PlanResult:
    """What `onecard plan` shows."""

    model: Model
    recipe: Recipe
    plan: Plan
    planned: Files  # what OUT will hold, in the recipe's format
    cost: Cost
    warnings: list[str]

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
            "estimated_ram_bytes": self.cost.ram_bytes,
            "estimated_device_bytes": self.cost.device_bytes,
            "estimated_disk_bytes": self.cost.disk_bytes,
        }


def plan(model_name: str, recipe: Recipe, device_name: str = "auto") -> PlanResult:
    """What quantizing would emit and take; reads headers only."""
    device = choose_device(device_name)
    dtype = choose_dtype(recipe, device)
    model = open_source(model_name)
    laid_out = plan_for(model, recipe)
    planned = planned_files(model, laid_out, recipe.format)
    method = method_of(recipe)
    cost = estimate(
        model.adapter,
        laid_out,
        work_of(recipe),
        calibration_rows(recipe, model.adapter) * recipe.calibration_row_tokens if method.needs_statistics else 0,
        recipe.evaluation_rows * recipe.evaluation_row_tokens,
        dtype.itemsize,
        measure_flops(device, dtype),
        device,
        site_budget(device),
    )
    return PlanResult(model, recipe, laid_out, planned, cost, model.adapter.faults(model.config))


def inspect(model_name: str) -> dict[str, Any]:
    """Facts of a checkpoint, original or quantized, from config.json and headers alone."""
    model = open_model(model_name)
    adapter, folder = model.adapter, model.folder
    roles: dict[str, dict[str, Any]] = {}
    for entry in stored_widths(model):
        role = roles.setdefault(entry.role, {"parameters": 0, "bytes": 0, "widths": {}})
        role["parameters"] += entry.parameters
        role["bytes"] += entry.bytes
        role["widths"][entry.width] = entry.parameters
    parameters = sum(role["parameters"] for role in roles.values())
    moe_blocks = [b for b in range(adapter.n_blocks) if any(s.role is Role.EXPERT for s in adapter.sites(b))]
    return {
        "model": model_name,
        "path": str(model.path),
        "family": adapter.family,
        "blocks": adapter.n_blocks,
        "moe_blocks": len(moe_blocks),
        "experts": adapter.n_experts,
        "experts_per_token": adapter.top_k,
        "hidden_size": adapter.hidden_size,
        "vocab_size": adapter.vocab_size,
        "vision": adapter.has_vision,
        "quantized": model.quantized,
        "format": model.source.label if isinstance(model.source, PackedSource) else None,
        "parameters": parameters,
        "file_bytes": folder.file_bytes,
        "shards": len(folder.shards),
        "bits_per_weight": folder.file_bytes * 8 / parameters,
        "roles": roles,
        "config_faults": adapter.faults(model.config),
        "warnings": model.warnings,
    }
