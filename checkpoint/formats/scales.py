"""Arithmetic that several formats share: codes times scales, scales spread over blocks, scales stored in fp16.

Shape legend: O outputs, I inputs, G groups along I.
"""

import torch

# Half a step of bf16, relative to the value: the most that storing a scale as fp16 may change it.
BF16_ROUNDING = 2.0**-9


def fp16_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as fp16. Raises ValueError when fp16 changes one by more than rounding to bf16 would."""
    exact = scales.to(torch.float32)
    stored = scales.to(torch.float16)
    off = ~((stored.to(torch.float32) - exact).abs() <= BF16_ROUNDING * exact.abs())  # true for NaN, too
    if bool(off.any()):
        raise ValueError(f"has {int(off.sum())} scales like {float(exact[off][0]):.3g}, which fp16 cannot hold")
    return stored


def scaled(
    codes_OI: torch.Tensor,
    scales_OG: torch.Tensor,
    zeros_OG: torch.Tensor | None,
    group_of_I: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(code - zero) * scale [O, I] in fp32, rounded once to `dtype`.

    `group_of_I` names the group of each input; without it, groups are equal stretches of neighbouring inputs.
    """
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
    """Expand a scale so that it multiplies a weight of `shape`; it has as many axes as the weight.

    Along an axis the scale has one value, one for every index, or one for every `block[axis]` indices, of which the
    last block may be cut.
    """
    for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, want)
    return scale


def spreads(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether `spread` can expand a scale of that shape."""
    return len(scale) == len(shape) and all(
        have in (1, want, -(-want // step)) for have, want, step in zip(scale, shape, block, strict=True)
    )
