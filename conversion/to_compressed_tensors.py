"""A checkpoint of integer codes as compressed-tensors. It holds every scheme and every scale."""

from typing import Any

from ..checkpoint.formats import compressed_tensors_config, compressed_tensors_write
from ..checkpoint.model import Model
from .conversion import Conversion, code_problems, coded, kept_linears, lay_out_codes, plain_config, sizes, units


def problems(model: Model) -> list[str]:
    return code_problems(model, lambda module, scheme, shape: None)


def lay_out(model: Model) -> Conversion:
    return lay_out_codes(model, coded(model), compressed_tensors_write.layout, compressed_tensors_write.pack)


def config(model: Model) -> dict[str, Any]:
    """config.json, with its quantization block."""
    schemes = coded(model)
    own = {module: unit for module, unit in units(model.adapter).items() if module in schemes}
    kept = kept_linears(model.adapter, schemes)
    block = compressed_tensors_config.quantization_config(schemes, own, sizes(model.adapter), kept)
    return plain_config(model) | {"quantization_config": block}
