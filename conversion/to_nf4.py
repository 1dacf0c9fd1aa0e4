"""A checkpoint in bitsandbytes' NF4, which is no grid of integers: weights are read as dense and quantized anew."""

from typing import Any

from ..checkpoint.formats import bitsandbytes_write
from ..checkpoint.model import Model
from ..core.scheme import NF4, NF4_BLOCK, Scheme
from ..models.adapter import Role
from .conversion import Conversion, dense, kept_linears, lay_out_parts, listed, plain_config

NF4_SCHEME = Scheme(4, NF4_BLOCK, True, NF4)


def schemes_of(model: Model) -> dict[str, Scheme]:
    """The modules to quantize: those that a quantized checkpoint has quantized, or those of the recipe nf4."""
    modules = [entry for block in range(model.adapter.n_blocks) for entry in model.adapter.modules(block)]
    names = model.source.names
    return {
        module: NF4_SCHEME
        for site, module, _, _ in modules
        if (
            model.adapter.locate(f"{module}.weight", names).tensor in model.packed
            if model.packed
            else site.role is not Role.ATTENTION
        )
    }


def problems(model: Model) -> list[str]:
    shapes = model.adapter.expected()
    wrong: dict[int, list[str]] = {}
    for module in schemes_of(model):
        if not NF4_SCHEME.divides(shapes[f"{module}.weight"][1]):
            wrong.setdefault(shapes[f"{module}.weight"][1], []).append(module)
    reasons = [
        f"{listed(names)}: {inputs} inputs, and a row must be a whole number of blocks of {NF4_BLOCK}"
        for inputs, names in wrong.items()
    ]
    if any(weight.width == str(NF4_SCHEME) for weight in model.packed.values()):
        reasons.append("it is in NF4 already")
    return reasons


def warnings(model: Model) -> list[str]:
    if not model.packed:
        return []
    return [
        "NF4 is no grid of integers: no code could be kept, and its rounding error adds to that of the codes it was "
        "made from. Export the original, or quantize it with method bnb-nf4, to have NF4 of the original weights"
    ]


def lay_out(model: Model) -> Conversion:
    return lay_out_parts(
        model,
        schemes_of(model),
        bitsandbytes_write.layout,
        lambda module: bitsandbytes_write.quantize(dense(model, f"{module}.weight"), NF4_SCHEME)[0],
    )


def config(model: Model) -> dict[str, Any]:
    return config_for(model, schemes_of(model))


def config_for(model: Model, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """config.json, with bitsandbytes' quantization block; all schemes must be one."""
    block = bitsandbytes_write.quantization_config(schemes, kept_linears(model.adapter, schemes))
    return plain_config(model) | {"quantization_config": block}
