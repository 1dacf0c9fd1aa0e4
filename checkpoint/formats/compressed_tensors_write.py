"""compressed-tensors `pack-quantized`, written: the int4/int8 weight-only layout that vLLM and transformers load.

A Linear `[out, in]` becomes `weight_packed` int32 `[out, ceil(in * bits / 32)]` (code + 2^(bits-1) as an unsigned
field, element j of a word at bits `bits * j`), `weight_scale` `[out, in / group]` in the model's dtype, and
`weight_shape` int64 `[2]`. An asymmetric scheme adds `weight_zero_point`, packed in the same way along the outputs. The
compressed-tensors package packs the words; the tests build them bit by bit from the specification.

Specification: compressed-tensors, `compressors/pack_quantized`.
"""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from .packing import words_for

PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def layout(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of the tensors that store one weight."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        PACKED: ("I32", (outputs, words_for(inputs, scheme.bits))),
        SCALE: (model_dtype, (outputs, scheme.groups(inputs))),
        SHAPE: ("I64", (2,)),
    }
    if not scheme.symmetric:
        stored[ZERO] = ("I32", (words_for(outputs, scheme.bits), scheme.groups(inputs)))
    return stored


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One 2-D QuantizedWeight -> its stored tensors by suffix, on the CPU."""
    bits = weight.scheme.bits
    stored = {
        PACKED: pack_to_int32(weight.codes, bits).cpu(),
        SCALE: weight.scales.cpu().contiguous(),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        stored[ZERO] = pack_to_int32(weight.zero_points.T, bits).T.contiguous().cpu()
    return stored
