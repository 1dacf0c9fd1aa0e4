"""Grids: the scale of a group, and the code of a value.

Values of a group are rounded independently here, without order or error feedback (that is gptq.py). Scales are rounded
to their stored dtype BEFORE codes are chosen, so that codes are right for the scale that an engine reads.

Shape legend: B experts, O outputs, I inputs, G groups, g group size (I = G * g).
"""

import torch

from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from .card import kernels_for

# The search tries these multiples of absmax / 8. 8/7 = 1.143 clips nothing. Below 0.6, more than a third of the range
# is clipped, which never won on trained weights. 36 steps of 0.016: a finer grid changed the demo's KL by under 1 %.
SEARCH_STEPS = 36
SEARCH_LOW, SEARCH_HIGH = 0.6, 1.16
MULTIPLES: list[float] = torch.linspace(SEARCH_LOW, SEARCH_HIGH, SEARCH_STEPS).tolist()
# On a CPU the search takes 2^18 values (1 MB) at a time, so that its temporaries stay in the cache.
SEARCH_ELEMENTS = 2**18
# The scale of a group of zeros, whose codes are zero; it avoids a division by zero. It is the least normal fp16 number,
# which engines that read fp16 scales do not flush to zero.
TINY_SCALE = 2.0**-14


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the stored dtype, never to zero."""
    return scale.clamp_min(TINY_SCALE).to(dtype)


def round_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Nearest signed codes, as floats: clamp(round(w / scale) + zero)."""
    codes = torch.div(w, scale).round_()
    if zero is not None:
        codes.add_(zero)
    return codes.clamp_(scheme.code_min, scheme.code_max)


def absmax_scales(w_BOI: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [B, O, G] and zero points from the range alone: absmax / 2^(bits-1), or min-max when asymmetric.

    The symmetric scale maps the largest magnitude to code -8 and clips +8 to 7, as Meta's own int4 Scout does.
    """
    w_BOGg = w_BOI.unflatten(-1, (scheme.groups(w_BOI.shape[-1]), -1))
    if scheme.symmetric:
        return _stored(w_BOGg.abs().amax(-1) / -scheme.code_min, dtype), None
    low, high = w_BOGg.amin(-1).clamp_max(0), w_BOGg.amax(-1).clamp_min(0)
    return _affine(low, high, scheme, dtype)


def _affine(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _stored((high - low) / (scheme.code_max - scheme.code_min), dtype)
    zero = torch.round(scheme.code_min - low / scale.float()).clamp_(scheme.code_min, scheme.code_max)
    return scale, zero


def signs(w_BOI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """+1 or -1 per group [B, O, G]: the sign of the scale that maps its largest magnitude to the code -2^(bits-1).

    The symmetric grid has one more level below zero than above. A negative scale mirrors it at no cost, since every
    reader multiplies code and scale. llama.cpp's Q4_0 does the same.
    """
    w_BOGg = w_BOI.unflatten(-1, (scheme.groups(w_BOI.shape[-1]), -1))
    largest = w_BOGg.gather(-1, w_BOGg.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest > 0, -1.0, 1.0).to(w_BOI.dtype)


def searched_scales(
    w_BOI: torch.Tensor, importance_BI: torch.Tensor, scheme: Scheme, dtype: torch.dtype, signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales that minimise sum_i importance_i (w_i - dequantized_i)^2 in each group, by exhaustive search.

    `importance_BI`: the cost of a squared error of each input (gptq.Prepared.importance). `signed`: also choose the
    sign of a symmetric scheme's scale.
    """
    kernels, signed = kernels_for(w_BOI), signed and scheme.symmetric
    if kernels is not None and dtype in kernels.SEARCHED and scheme.width(w_BOI.shape[-1]) <= kernels.WIDEST_GROUP:
        multiples = torch.tensor(MULTIPLES, device=w_BOI.device)
        scale, zero = kernels.searched_scales(w_BOI, importance_BI, multiples, scheme, TINY_SCALE, dtype, signed)
        return scale, None if scheme.symmetric else zero
    if signed:
        sign_BOG = signs(w_BOI, scheme)
        turned_BOI = (w_BOI.unflatten(-1, (scheme.groups(w_BOI.shape[-1]), -1)) * sign_BOG.unsqueeze(-1)).flatten(-2)
        scale, _ = searched_scales(turned_BOI, importance_BI, scheme, dtype)
        return scale * sign_BOG.to(dtype), None
    parts = []
    step = max(1, SEARCH_ELEMENTS // w_BOI.shape[-1]) if w_BOI.device.type == "cpu" else w_BOI.shape[1]
    for w_OI, d_I in zip(w_BOI, importance_BI, strict=True):
        parts += [_search(rows, d_I, scheme, dtype) for rows in w_OI.split(step)]
    groups = (*w_BOI.shape[:2], -1)
    scale = torch.cat([s for s, _ in parts]).view(groups)
    zeros = [z for _, z in parts if z is not None]
    return scale, torch.cat(zeros).view(groups) if zeros else None


def _search(
    w_OI: torch.Tensor, importance_I: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    w_OGg = w_OI.unflatten(-1, (scheme.groups(w_OI.shape[-1]), -1))
    d_Gg = importance_I.unflatten(-1, (scheme.groups(importance_I.shape[-1]), -1))
    best_error = torch.full(w_OGg.shape[:-1], torch.inf, device=w_OI.device, dtype=w_OI.dtype)
    best_scale, best_zero = absmax_scales(w_OI, scheme, dtype)
    peak = w_OGg.abs().amax(-1) / -scheme.code_min
    low, high = w_OGg.amin(-1).clamp_max(0), w_OGg.amax(-1).clamp_min(0)
    for multiple in MULTIPLES:
        if scheme.symmetric:
            scale, zero = _stored(peak * multiple, dtype), None
        else:
            scale, zero = _affine(low * multiple, high * multiple, scheme, dtype)
        s = scale.to(w_OI.dtype).unsqueeze(-1)
        z = None if zero is None else zero.unsqueeze(-1)
        codes = round_codes(w_OGg, s, z, scheme)
        codes = codes if z is None else codes.sub_(z)
        error = codes.mul_(s).sub_(w_OGg).square_().mul_(d_Gg).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def round_to_nearest(
    w_BOI: torch.Tensor, scale_BOG: torch.Tensor, zero_BOG: torch.Tensor | None, scheme: Scheme
) -> QuantizedWeight:
    """Round every value to its nearest code, given the scales."""
    w_BOGg = w_BOI.unflatten(-1, (scheme.groups(w_BOI.shape[-1]), -1))
    z = None if zero_BOG is None else zero_BOG.unsqueeze(-1)
    codes = round_codes(w_BOGg, scale_BOG.float().unsqueeze(-1), z, scheme).flatten(-2)
    zero = None if zero_BOG is None else zero_BOG.to(torch.int8)
    return QuantizedWeight(codes.to(torch.int8), scale_BOG, zero, scheme)
