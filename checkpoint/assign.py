"""Apply a recipe to a model: the scheme of every module, or every reason why the recipe does not fit."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.errors import InputError, input_error
from ..core.scheme import Scheme
from ..models.adapter import QUANTIZABLE, Adapter
from ..recipe import Recipe, matches
from .formats.shard_formats import shard_format
from .model import Model
from .plan import Plan, make_plan, scale_dtypes


@dataclass
class _Assignment:
    """What applying a recipe to every module found."""

    # Module -> its scheme, for modules that are quantized.
    chosen: dict[str, Scheme] = field(default_factory=dict)
    # Keys of `schemes` and patterns of `keep_modules` that decided something.
    used: set[str] = field(default_factory=set)
    # Unit -> each of its schemes -> one module that has it.
    units: dict[str, dict[Scheme | None, str]] = field(default_factory=dict)
    # Scheme and number of inputs that its group size does not divide -> the modules.
    indivisible: dict[tuple[Scheme, int], list[str]] = field(default_factory=dict)


def schemes_of(adapter: Adapter, recipe: Recipe) -> dict[str, Scheme]:
    """Canonical module name -> Scheme of every module that the recipe quantizes.

    A key of `schemes` may be a role that this model lacks, so that one recipe serves several families. Raises
    InputError with every pattern that matches nothing, every unit with several schemes (engines need one), every group
    size that does not divide the inputs, and when nothing is quantized.
    """
    found = _assign(adapter, recipe)
    problems = [*_unused(found.used, adapter, recipe), *_conflicts(found)]
    if not found.chosen and not problems:
        problems.append(
            "it keeps every module that would be quantized"
            if found.used
            else f"no module of this {adapter.family} model has a role of {', '.join(recipe.widths.quantize_roles)}"
        )
    if problems:
        raise input_error(
            f"the recipe {recipe.name} does not fit this model:", problems, "Change the recipe, or choose another."
        )
    return found.chosen


def _assign(adapter: Adapter, recipe: Recipe) -> _Assignment:
    found = _Assignment()
    for block in range(adapter.n_blocks):
        for site, module, _, inputs in adapter.modules(block):
            scheme, hits = recipe.scheme_of(site.role.value, module)
            found.used.update(hits)
            kept = [pattern for pattern in recipe.widths.keep_modules if matches(pattern, module)]
            if scheme is not None:
                found.used.update(kept)
            scheme = None if kept else scheme
            found.units.setdefault(adapter.unit(module), {}).setdefault(scheme, module)
            if scheme is None:
                continue
            if not scheme.divides(inputs):
                found.indivisible.setdefault((scheme, inputs), []).append(module)
            found.chosen[module] = scheme
    return found


def _unused(used: set[str], adapter: Adapter, recipe: Recipe) -> Iterable[str]:
    # Routers, norms and the head stay anyway, and so does what no role quantizes: whoever names one gets what he wants.
    modules = [name.rpartition(".")[0] for name in (*adapter.expected(), "lm_head.weight")]
    for pattern in recipe.widths.keep_modules:
        if pattern not in used and not any(matches(pattern, module) for module in modules):
            yield f"keep_modules pattern {pattern!r} matches no module of this model"
    roles = [role.value for role in QUANTIZABLE]
    for entry in recipe.widths.schemes:
        if entry not in used and entry not in roles:
            yield f"schemes names {entry!r}, which is no role ({', '.join(roles)}) and matches no module"


def _conflicts(found: _Assignment) -> Iterable[str]:
    for unit, schemes in found.units.items():
        if len(schemes) > 1:
            said = ", ".join(f"{module} is {scheme or 'kept'}" for scheme, module in schemes.items())
            yield f"{said}: engines fuse them ({unit}) and need one scheme"
    for (scheme, inputs), modules in found.indivisible.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield f"group_size {scheme.group_size} does not divide the {inputs} inputs of {modules[0]}{more}"


def plan_for(model: Model, recipe: Recipe) -> Plan:
    """Apply the recipe to the model and lay out what the run will write. Raises InputError."""
    if recipe.family not in (None, model.adapter.family):
        raise InputError(f"the recipe {recipe.name} is for {recipe.family}, and {model.name} is {model.adapter.family}")
    schemes, layout = schemes_of(model.adapter, recipe), shard_format(recipe.format).layout
    return make_plan(
        model.adapter,
        model.source,
        schemes,
        layout,
        recipe.max_shard_bytes,
        model.folder.file_bytes,
        scale_dtypes(model.adapter, model.source),
    )
