"""GGUF's blocks of 32 weights that hold our codes without rounding them again: Q4_0, Q4_1 and Q8_0.

    Q4_0   d fp16, 16 bytes: weight j is (low nibble of byte j) - 8 times d, weight j + 16 its high nibble     18 bytes
    Q4_1   d fp16, m fp16, 16 bytes alike: weight = nibble x d + m                                             20 bytes
    Q8_0   d fp16, 32 bytes: weight = int8 x d                                                                 34 bytes

Symmetric int4 is Q4_0, asymmetric int4 is Q4_1, and symmetric int8 is Q8_0. A group of 64 or 128 becomes two or four
blocks with the same scale, and a row with one scale becomes as many blocks as it has: also exact, but larger. Codes
never change. Only scales may, because they are stored as fp16 instead of bf16:

- A bf16 scale of 2^-17 to 65504 is exact in fp16. A scale that fp16 would change by more than bf16 rounds is refused,
  and so is a non-finite one. (Our own quantizer makes none: its least scale is 2^-14.)
- Q4_1's m is -(8 + zero point) x d, up to 12 bits in fp16's 11: an error of up to 2^-11 of m, or 0.0073 of a step.

Specification: ggml `ggml-common.h` (block_q4_0, block_q4_1, block_q8_0), `ggml-quants.c` (dequantize_row_*).
Shape legend: O outputs, I inputs, N blocks along I, G groups along I.
"""

import torch

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from ..formats.scales import fp16_scales

BLOCK = 32
HALF = BLOCK // 2
# Bytes of one block.
BLOCK_BYTES = {"Q4_0": 2 + HALF, "Q4_1": 4 + HALF, "Q8_0": 2 + BLOCK}


def kind_of(scheme: Scheme, inputs: int) -> str:
    """The block type for codes of `scheme` in rows of `inputs`. Raises ValueError when there is none."""
    group = inputs // scheme.groups(inputs)
    if group % BLOCK:
        raise ValueError(f"groups of {group} are no whole blocks of {BLOCK}")
    if scheme.bits == 8 and not scheme.symmetric:
        raise ValueError("no block type has int8 codes with zero points")
    return "Q8_0" if scheme.bits == 8 else "Q4_0" if scheme.symmetric else "Q4_1"


def pack(weight: QuantizedWeight) -> torch.Tensor:
    """One 2-D weight -> its blocks, uint8 [O, N * bytes per block]. Raises ValueError for a scale that fp16 cannot
    hold."""
    scheme, (outputs, inputs) = weight.scheme, weight.codes.shape
    kind = kind_of(scheme, inputs)
    blocks_a_group = inputs // scheme.groups(inputs) // BLOCK
    d_ON = fp16_scales(weight.scales).repeat_interleave(blocks_a_group, -1)
    heads = [d_ON]
    if weight.zero_points is not None:
        zero_ON = weight.zero_points.repeat_interleave(blocks_a_group, -1).to(torch.float32)
        # Computed from the stored fp16 scale, so that its rounding does not shift the weights.
        heads.append(((scheme.code_min - zero_ON) * d_ON.to(torch.float32)).to(torch.float16))
    if not bool(torch.isfinite(heads[-1]).all()):
        raise ValueError("has groups whose least value is past 65504, which fp16 cannot hold")
    blocks_ONB = weight.codes.unflatten(-1, (-1, BLOCK))
    if scheme.bits == 4:
        unsigned = (blocks_ONB - scheme.code_min).view(torch.uint8)
        codes = unsigned[..., :HALF] | (unsigned[..., HALF:] << 4)
    else:
        codes = blocks_ONB.contiguous().view(torch.uint8)
    head = torch.stack(heads, -1).view(torch.uint8)
    blocks = torch.cat([head, codes], -1).reshape(outputs, -1)
    assert blocks.shape[1] == inputs // BLOCK * BLOCK_BYTES[kind]
    return blocks


def unpack(blocks: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """The inverse of pack, bit for bit when fp16 holds every scale exactly.

    A scale of zero keeps no zero point, since every code then means the same weight. Raises ValueError when blocks of
    one group differ in their scales.
    """
    kind = "Q8_0" if scheme.bits == 8 else "Q4_0" if scheme.symmetric else "Q4_1"
    inputs = blocks.shape[1] // BLOCK_BYTES[kind] * BLOCK
    assert kind == kind_of(scheme, inputs)
    parts = blocks.unflatten(-1, (-1, BLOCK_BYTES[kind]))
    n_heads = 2 if kind == "Q4_1" else 1
    heads = parts[..., : 2 * n_heads].contiguous().view(torch.float16)
    rest = parts[..., 2 * n_heads :]
    if scheme.bits == 4:
        unsigned = torch.cat([rest & 0xF, rest >> 4], -1)
        codes = unsigned.to(torch.int8) + scheme.code_min
    else:
        codes = rest.contiguous().view(torch.int8)
    grouped = heads.unflatten(1, (scheme.groups(inputs), -1))
    if not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
        raise ValueError("blocks of one group have different scales")
    d_OG = grouped[:, :, 0, 0]
    zero = None
    if kind == "Q4_1":
        d, m = d_OG.to(torch.float32), grouped[:, :, 0, 1].to(torch.float32)
        steps = torch.where(d == 0, 0.0, torch.round(m / torch.where(d == 0, 1.0, d)))
        zero = (scheme.code_min - steps).clamp(scheme.code_min, scheme.code_max).to(torch.int8)
    return QuantizedWeight(codes.flatten(-2), d_OG.to(scale_dtype).contiguous(), zero, scheme)
