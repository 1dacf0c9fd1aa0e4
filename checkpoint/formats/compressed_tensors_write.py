"""compressed-tensors `pack-quantized`: the int4/int8 weight-only layout that vLLM and transformers load.

A Linear `[out, in]` becomes `weight_packed` int32 `[out, ceil(in * bits / 32)]` (code + 2^(bits-1) as an unsigned
field, element j of a word at bits `bits * j`), `weight_scale` `[out, in / group]` in the model's dtype and
`weight_shape` int64 `[2]`; asymmetric adds `weight_zero_point`, packed the same way along out. Packing is a pair of
pure functions. The config block is built and validated by the compressed-tensors package's own classes.

Specification: compressed-tensors, `compressors/pack_quantized` (the reader that the tests hold this against).
"""

import torch

from ...core.scheme import QuantizedWeight, Scheme
from .stored_weight import unpack_fields

PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def layout(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of the tensors that store one weight."""
    per_word = 32 // scheme.bits
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        PACKED: ("I32", (outputs, inputs // per_word)),
        SCALE: (model_dtype, (outputs, scheme.groups(inputs))),
        SHAPE: ("I64", (2,)),
    }
    if not scheme.symmetric:
        stored[ZERO] = ("I32", (-(-outputs // per_word), scheme.groups(inputs)))
    return stored


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [R, C] -> int32 words [R, ceil(C * bits / 32)], little end first; missing fields are zero bits."""
    per_word = 32 // bits
    missing = -codes.shape[1] % per_word
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    fields = torch.nn.functional.pad(unsigned, (0, missing)).unflatten(1, (-1, per_word))
    words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=codes.device)
    for j in range(per_word):
        words |= fields[:, :, j] << (bits * j)
    return words


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of pack_words: int32 [R, W] -> int8 codes [R, columns]."""
    return (unpack_fields(words, bits, columns) - (1 << (bits - 1))).to(torch.int8)


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One 2-D QuantizedWeight -> its stored tensors by suffix, on the CPU."""
    bits = weight.scheme.bits
    stored = {
        PACKED: pack_words(weight.codes, bits).cpu(),
        SCALE: weight.scales.cpu().contiguous(),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        stored[ZERO] = pack_words(weight.zero_points.T.contiguous(), bits).T.contiguous().cpu()
    return stored
