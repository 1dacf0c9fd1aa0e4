"""A recipe meets a model: which module gets which scheme, or every reason why it cannot."""

from collections.abc import Callable

from ..core.errors import input_error
from ..core.scheme import Scheme
from ..models.adapter import Adapter


def assign(
    adapter: Adapter,
    scheme: Scheme,
    roles: tuple[str, ...],
    keep_modules: tuple[str, ...],
    matches: Callable[[str, str], bool],
    recipe_name: str,
) -> dict[str, Scheme]:
    """Canonical module name -> Scheme, for every module that is quantized.

    Raises InputError listing: a keep pattern that matches nothing, a pattern that splits a unit (the engine wants one
    scheme for all of it), group sizes that do not divide an input, and a recipe that quantizes nothing.
    """
    problems: list[str] = []
    chosen: dict[str, Scheme] = {}
    used: set[str] = set()
    kept_units: dict[str, list[str]] = {}
    bad_inputs: dict[int, list[str]] = {}
    for block in range(adapter.n_blocks):
        for site, module, _, inputs in adapter.modules(block):
            if site.role.value not in roles:
                continue
            hit = [pattern for pattern in keep_modules if matches(pattern, module)]
            used.update(hit)
            if hit:
                kept_units.setdefault(adapter.unit(module), []).append(module)
                continue
            if not scheme.divides(inputs):
                bad_inputs.setdefault(inputs, []).append(module)
            chosen[module] = scheme
    for pattern in keep_modules:
        if pattern not in used:
            problems.append(f"keep_modules pattern {pattern!r} matches no module that would be quantized")
    for module in chosen:
        unit = adapter.unit(module)
        if unit in kept_units:
            left = kept_units.pop(unit)
            problems.append(
                f"keep_modules keeps {left[0]} and not {module}: the engine fuses them ({unit}) and wants one scheme"
            )
    for inputs, modules in bad_inputs.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        problems.append(f"group_size {scheme.group_size} does not divide the {inputs} inputs of {modules[0]}{more}")
    if not chosen and not problems and used:
        problems.append("keep_modules keeps every module that would be quantized")
    elif not chosen and not problems:
        problems.append(f"no module of this {adapter.family} model has a role of {', '.join(roles)}")
    if problems:
        raise input_error(
            f"the recipe {recipe_name} does not fit this model:", problems, "Change the recipe, or choose another."
        )
    return chosen
