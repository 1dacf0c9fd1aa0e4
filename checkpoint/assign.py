"""A recipe meets a model: which module gets which scheme, or every reason why it cannot."""

from collections.abc import Callable, Iterable

from ..core.errors import InputError, input_error
from ..core.scheme import Scheme
from ..models.adapter import QUANTIZABLE, Adapter
from ..recipe import Recipe, matches
from .formats.shard_formats import shard_format
from .model import Model
from .plan import Plan, make_plan

# Of the role and the name of a module its scheme, None where it stays as it is, and which of the recipe's own entries
# said so.
SchemeOf = Callable[[str, str], tuple[Scheme | None, list[str]]]


def assign(
    adapter: Adapter,
    scheme_of: SchemeOf,
    roles: tuple[str, ...],
    entries: Iterable[str],
    keep_modules: tuple[str, ...],
    matches: Callable[[str, str], bool],
    recipe_name: str,
) -> dict[str, Scheme]:
    """Canonical module name -> Scheme, for every module that is quantized.

    `roles`: the recipe's `quantize_roles`. `entries`: of the recipe's `schemes`; one that names a role which this model
    has not is no error, so that a recipe serves several families. Raises InputError listing: a pattern that matches
    nothing, what splits a unit (the engine wants one scheme for all of it), group sizes that do not divide an input,
    and a recipe that quantizes nothing.
    """
    problems: list[str] = []
    chosen: dict[str, Scheme] = {}
    used: set[str] = set()
    units: dict[str, dict[Scheme | None, str]] = {}  # unit -> its schemes, each with a module that has it
    bad_inputs: dict[tuple[Scheme, int], list[str]] = {}
    for block in range(adapter.n_blocks):
        for site, module, _, inputs in adapter.modules(block):
            scheme, hits = scheme_of(site.role.value, module)
            used.update(hits)
            kept = [pattern for pattern in keep_modules if matches(pattern, module)]
            if scheme is not None:
                used.update(kept)
            scheme = None if kept else scheme
            units.setdefault(adapter.unit(module), {}).setdefault(scheme, module)
            if scheme is None:
                continue
            if not scheme.divides(inputs):
                bad_inputs.setdefault((scheme, inputs), []).append(module)
            chosen[module] = scheme
    problems += [
        f"keep_modules pattern {pattern!r} matches no module that would be quantized"
        for pattern in keep_modules
        if pattern not in used
    ]
    known = [role.value for role in QUANTIZABLE]
    problems += [
        f"schemes names {entry!r}, which is no role ({', '.join(known)}) and matches no module"
        for entry in entries
        if entry not in used and entry not in known
    ]
    for unit, schemes in units.items():
        if len(schemes) > 1:
            said = ", ".join(f"{module} is {scheme or 'kept'}" for scheme, module in schemes.items())
            problems.append(f"{said}: the engine fuses them ({unit}) and wants one scheme")
    for (scheme, inputs), modules in bad_inputs.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        problems.append(f"group_size {scheme.group_size} does not divide the {inputs} inputs of {modules[0]}{more}")
    if not chosen and not problems:
        problems.append(
            "it keeps every module that would be quantized"
            if used
            else f"no module of this {adapter.family} model has a role of {', '.join(roles)}"
        )
    if problems:
        raise input_error(
            f"the recipe {recipe_name} does not fit this model:", problems, "Change the recipe, or choose another."
        )
    return chosen


def schemes_of(adapter: Adapter, recipe: Recipe) -> dict[str, Scheme]:
    """Module -> Scheme of all that the recipe quantizes. Raises InputError."""
    return assign(
        adapter,
        recipe.scheme_of,
        recipe.widths.quantize_roles,
        recipe.widths.schemes,
        recipe.widths.keep_modules,
        matches,
        recipe.name,
    )


def plan_for(model: Model, recipe: Recipe) -> Plan:
    """Match the recipe to the model and lay out what will be emitted. Raises InputError."""
    if recipe.family not in (None, model.adapter.family):
        raise InputError(f"the recipe {recipe.name} is for {recipe.family}, and {model.name} is {model.adapter.family}")
    schemes, layout = schemes_of(model.adapter, recipe), shard_format(recipe.format).layout
    return make_plan(model.adapter, model.source, schemes, layout, recipe.max_shard_bytes, model.folder.file_bytes)
