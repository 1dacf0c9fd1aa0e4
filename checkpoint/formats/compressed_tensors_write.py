"""compressed-tensors `pack-quantized`, written: the int4/int8 weight-only layout that vLLM and transformers load.

A Linear `[out, in]` becomes `weight_packed` int32 `[out, ceil(in * bits / 32)]` (code + 2^(bits-1) as an unsigned
field, element j of a word at bits `bits * j`), `weight_scale` `[out, in / group]` in the model's dtype, and
`weight_shape` int64 `[2]`. An asymmetric scheme adds `weight_zero_point`, packed in the same way along the outputs. The
compressed-tensors package packs the words; the tests build them bit by bit from the specification.

Specification: compressed-tensors, `compressors/pack_quantized`.
"""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from ...core.device import on_cuda
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
        PACKED: _words(weight.codes, bits).cpu(),
        SCALE: weight.scales.cpu().contiguous(),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        stored[ZERO] = _words(weight.zero_points.T, bits).T.contiguous().cpu()
    return stored


def _words(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of int8 codes. On a CPU the package packs them. It adds fields by scatter_add_, which sorts all of a
    matrix's indices once torch is deterministic on a GPU: there fields that divide a word are shifted into it."""
    if not on_cuda(codes_OI) or 32 % bits or codes_OI.shape[1] % (32 // bits):
        return pack_to_int32(codes_OI, bits)
    each, zero = 32 // bits, 1 << (bits - 1)
    word_OW = torch.zeros(len(codes_OI), codes_OI.shape[1] // each, dtype=torch.int32, device=codes_OI.device)
    for j in range(each):
        word_OW |= (codes_OI[:, j::each].to(torch.int32) + zero) << (bits * j)
    return word_OW
