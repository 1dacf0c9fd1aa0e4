"""A checkpoint of integer codes in GPTQ's layout, version 1 or 2.

Engines permute the rows of some weights for RoPE (q and k of Llama 4), and do so for `weight` only. Such weights, and
what is fused with them, are written in 16 bits.
"""

from typing import Any

from .. import __version__
from ..checkpoint.formats import gptq_write
from ..checkpoint.model import Model
from ..core.scheme import Scheme
from .conversion import Conversion, code_problems, coded, kept_linears, lay_out_codes, plain_config, sizes, units

# Written into the files' own config, too.
PERMUTED = (
    "engines permute the rows of these weights for RoPE when they load them: of `weight`, not of `qweight`, "
    "`scales` and `qzeros`. Quantized they would be garbled; they, and what is fused with them, are in 16 bits"
)


def split_schemes(model: Model) -> tuple[dict[str, Scheme], list[str]]:
    """The modules that stay integer codes, with their schemes; and those that are dequantized to 16 bits."""
    found, adapter = coded(model), model.adapter
    permuted = {adapter.unit(module) for module in found if adapter.permuted_at_load(module)}
    dequantized = [module for module in found if adapter.unit(module) in permuted]
    return {module: scheme for module, scheme in found.items() if module not in {*dequantized}}, dequantized


def problems(model: Model, version: int) -> list[str]:
    schemes, _ = split_schemes(model)

    def problem(module: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        if module not in schemes:
            return None
        if version == 1 and not scheme.symmetric:
            return "asymmetric, and readers of version 1 differ in zero points of 0: gptq-v2 holds them"
        return gptq_write.size_problem(*shape)

    reasons = code_problems(model, problem)
    return reasons or ([] if schemes else ["all that is quantized would stay in 16 bits: " + PERMUTED])


def lay_out(model: Model, version: int) -> Conversion:
    return lay_out_codes(
        model, split_schemes(model)[0], gptq_write.layout, lambda weight: gptq_write.pack(weight, version)
    )


def block(model: Model, version: int) -> dict[str, Any]:
    """The quantization block of config.json, which is also the content of quantize_config.json."""
    schemes, dequantized = split_schemes(model)
    meta: dict[str, Any] = {"quantizer": [f"onecard:{__version__}"]}
    if dequantized:
        meta["kept_in_16_bits"] = {"modules": gptq_write.expressions(dequantized, {}), "why": PERMUTED}
    return gptq_write.quantization_config(
        schemes, kept_linears(model.adapter, schemes), units(model.adapter), sizes(model.adapter), version, meta
    )


def config(model: Model, version: int) -> dict[str, Any]:
    """config.json, with its quantization block."""
    return plain_config(model) | {"quantization_config": block(model, version)}
