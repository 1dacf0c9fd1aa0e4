"""Codes packed into 32-bit words without gaps, by the compressed-tensors package's own functions.

Code c of `bits` bits becomes the unsigned field c + 2^(bits-1). Fields fill a word from its lowest bits, and may cross
into the next word where `bits` does not divide 32. GPTQ packs its codes in the same way.
"""

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32

BITS_A_WORD = 32


def words_for(count: int, bits: int) -> int:
    """How many words hold `count` fields."""
    return -(-count * bits // BITS_A_WORD)


def unpack_columns(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words [W, C], packed along the first axis -> int8 codes [count, C]."""
    # clone() sets new strides, where contiguous() leaves those of a transposed single row, which the package cannot
    # view as bytes.
    rows = words.T.clone(memory_format=torch.contiguous_format)
    codes: torch.Tensor = unpack_from_int32(rows, bits, torch.Size((rows.shape[0], count)))
    return codes.T.contiguous()
