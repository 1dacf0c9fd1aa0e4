"""What every reader of a format gives, and the arithmetic that they share.

A format's file has a `find`, which looks at names, shapes and dtypes alone and says which dense weights a folder holds,
in which parts, and every contradiction; and pure functions that turn the parts of one weight into that weight. Nobody
here knows what a weight is for, and nothing of a checkpoint is executed: its config block is data, and so are its JSON
parts.

Some formats hold integer codes and no more than that: of those a weight can be had as the codes it is, for another
format to hold.

Shape legend: O outputs, I inputs, G groups along I, W words of 32 bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...core.scheme import QuantizedWeight, Scheme
from ...core.tensors import TensorInfo

# Parts by what they are to the format -> the dense weight, fp32 before it is rounded to the dtype.
Decode = Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]
# Parts by what they are to the format -> the same weight as codes. Raises ValueError when they contradict the scheme.
Codes = Callable[[Mapping[str, torch.Tensor]], QuantizedWeight]
# What a scale may be stored in, and so what a dense weight is read as.
FLOATS = ("BF16", "F16", "F32")
BITS_A_WORD = 32
# Half a step of bf16, relative: what rounding a scale to fp16 may change at most.
BF16_ROUNDING = 2.0**-9


@dataclass(frozen=True)
class StoredWeight:
    """One dense weight that is kept in parts.

    `info`: what it reads as. `width`: its scheme in words, e.g. 'int4 group 128'. `parts`: what a part is to the format
    -> its stored name. `by_expert`: those parts whose first axis is the weight's (fused experts), so that one expert is
    read without the others. `scheme` and `codes`: of a 2-D weight of integer codes in groups of neighbouring inputs;
    None of all others (NF4, fp8, groups in an order of their own).
    """

    info: TensorInfo
    width: str
    parts: dict[str, str]
    decode: Decode
    by_expert: frozenset[str] = frozenset()
    scheme: Scheme | None = None
    codes: Codes | None = None


@dataclass
class Reading:
    """What `find` saw. `weights`: dense weights by their name. `aside`: stored tensors that are neither a weight nor a
    part of one (scales of activations). `problems` refuse the checkpoint; `warnings` go into the record."""

    label: str
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def integer_scheme(bits: int, group_size: int, symmetric: bool) -> Scheme | None:
    """The Scheme of codes that a format stores; None where ours have no such width or group."""
    try:
        return Scheme(bits, group_size, symmetric)
    except ValueError:
        return None


def fp16_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as fp16. Raises ValueError for those that fp16 changes by more than bf16 would round."""
    exact = scales.to(torch.float32)
    stored = scales.to(torch.float16)
    off = ~((stored.to(torch.float32) - exact).abs() <= BF16_ROUNDING * exact.abs())  # a NaN is off too
    if bool(off.any()):
        raise ValueError(f"has {int(off.sum())} scales like {float(exact[off][0]):.3g}, which fp16 cannot hold")
    return stored


def missing(stem: str, suffixes: tuple[str, ...], infos: Mapping[str, TensorInfo]) -> str | None:
    """'has no scales and no qzeros', or None when every companion is there."""
    lacking = [suffix for suffix in suffixes if stem + suffix not in infos]
    return f"has no {' and no '.join(s.lstrip('._') for s in lacking)}" if lacking else None


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold `count` fields without a gap."""
    return -(-count * bits // BITS_A_WORD)


def unpack_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words [R, W] -> unsigned fields int32 [R, count]: field j lies at bits `bits * j` of the row, lowest first,
    and may cross from one word into the next (widths that do not divide 32)."""
    if BITS_A_WORD % bits == 0:
        shifts = torch.arange(0, BITS_A_WORD, bits, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]
    # 32 fields fill `bits` words exactly; one word more lets the last field look past the end.
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    padded = torch.nn.functional.pad(unsigned, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    padded = torch.nn.functional.pad(padded, (0, 1))
    fields = []
    for start in range(0, BITS_A_WORD * bits, bits):
        word, offset = divmod(start, BITS_A_WORD)
        both = padded[..., word] | (padded[..., word + 1] << BITS_A_WORD)  # 64 bits; a sign is masked away below
        fields.append((both >> offset) & ((1 << bits) - 1))
    return torch.stack(fields, -1).flatten(1)[:, :count].to(torch.int32)


def scaled(
    codes_OI: torch.Tensor,
    scales_OG: torch.Tensor,
    zeros_OG: torch.Tensor | None,
    group_of_I: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(code - zero) * scale in fp32, rounded once to `dtype`. Groups are equal stretches of inputs unless `group_of_I`
    names each input's group."""
    if group_of_I is not None:
        codes = codes_OI.to(torch.float32)
        if zeros_OG is not None:
            codes = codes - zeros_OG.to(torch.float32)[:, group_of_I]
        return (codes * scales_OG.to(torch.float32)[:, group_of_I]).to(dtype)
    grouped = codes_OI.unflatten(-1, (scales_OG.shape[-1], -1)).to(torch.float32)
    if zeros_OG is not None:
        grouped = grouped - zeros_OG.to(torch.float32).unsqueeze(-1)
    return (grouped * scales_OG.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """A scale with as many axes as the weight -> one that multiplies it: along an axis it has one value, one for every
    index, or one for every `block[axis]` of them (the last block may be cut)."""
    for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, want)
    return scale


def spreads(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether `spread` can."""
    return len(scale) == len(shape) and all(
        have in (1, want, -(-want // step)) for have, want, step in zip(scale, shape, block, strict=True)
    )
