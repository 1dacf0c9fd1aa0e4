"""Refinement after GPTQ: alternately refit scales by least squares and improve codes by coordinate descent.

Both steps lower the same quadratic J = tr(E S E^T), E = W - Q, and neither ever raises it:

- Scale of a group: J is a parabola in it, with its minimum at s + (c G) / (c S_gg c^T), where c are the group's codes
  minus the zero point and G = E S. The new scale is rounded to its stored dtype and kept only if J falls.
- Code of a column: with all others fixed, the best real value is q_j + G_j / S_jj. J is a parabola here too, so the
  nearest code is the best code.

GPTQ never revises a code. A sweep lets early columns respond to the errors of later ones. (Coordinate descent on this
objective: Behdin et al., QuantEase, arXiv 2309.01885.)

Shape legend: B experts, O outputs, I inputs, G groups; t marks a transposed matrix [B, I, O].
"""

import torch

from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from .card import kernels_for
from .gptq import BLOCK_COLUMNS
from .grid import TINY_SCALE, round_codes


def refine(weight: QuantizedWeight, w_BOI: torch.Tensor, moment_BII: torch.Tensor, rounds: int) -> QuantizedWeight:
    """Refit every scale, then sweep every column, `rounds` times. `moment_BII` must be positive definite."""
    scheme = weight.scheme
    codes_t = weight.codes.to(w_BOI.dtype).transpose(1, 2).contiguous()
    scale_BGO = weight.scales.to(w_BOI.dtype).transpose(1, 2).contiguous()
    zero_BGO = None if weight.zero_points is None else weight.zero_points.to(w_BOI.dtype).transpose(1, 2).contiguous()
    value_t = weight.dequantize(w_BOI.dtype).transpose(1, 2)
    gradient_t = torch.bmm(moment_BII, w_BOI.transpose(1, 2) - value_t)  # S is symmetric: (E S)^T = S E^T
    group = scheme.width(codes_t.shape[1])
    for _ in range(rounds):
        for g in range(scale_BGO.shape[1]):
            columns = slice(g * group, (g + 1) * group)
            c = codes_t[:, columns] if zero_BGO is None else codes_t[:, columns] - zero_BGO[:, g, None]
            slope = (c * gradient_t[:, columns]).sum(1)
            curvature = (c * torch.bmm(moment_BII[:, columns, columns], c)).sum(1)
            old = scale_BGO[:, g]
            new = old + slope / curvature.clamp_min(torch.finfo(c.dtype).tiny)
            new = torch.where(old > 0, new.clamp_min(TINY_SCALE), new.clamp_max(-TINY_SCALE))
            new = new.to(weight.scales.dtype).to(c.dtype)
            change = new - old
            change = torch.where(change * (change * curvature - 2 * slope) < 0, change, 0.0)
            scale_BGO[:, g] = old + change
            gradient_t.baddbmm_(moment_BII[:, :, columns], c * change[:, None], alpha=-1)
        _sweep(codes_t, scale_BGO, zero_BGO, gradient_t, moment_BII, weight)
    scales = scale_BGO.transpose(1, 2).contiguous().to(weight.scales.dtype)
    codes = codes_t.transpose(1, 2).contiguous().to(torch.int8)
    return QuantizedWeight(codes, scales, weight.zero_points, scheme)


def _sweep(
    codes_t: torch.Tensor,
    scale_BGO: torch.Tensor,
    zero_BGO: torch.Tensor | None,
    gradient_t: torch.Tensor,
    moment_BII: torch.Tensor,
    weight: QuantizedWeight,
) -> None:
    """One pass of coordinate descent over all columns. Changes codes and gradient in place."""
    inputs, group = codes_t.shape[1], weight.scheme.width(codes_t.shape[1])
    kernels = kernels_for(gradient_t)
    sweep_block = _sweep_block if kernels is None else kernels.sweep_block
    for begin in range(0, inputs, BLOCK_COLUMNS):
        columns = slice(begin, min(begin + BLOCK_COLUMNS, inputs))
        codes_BCO, gradient_BCO, own_BCC = codes_t[:, columns], gradient_t[:, columns], moment_BII[:, columns, columns]
        moves = sweep_block(codes_BCO, scale_BGO, zero_BGO, gradient_BCO, own_BCC, begin, group, weight.scheme)
        gradient_t.baddbmm_(moment_BII[:, :, columns], moves, alpha=-1)


def _sweep_block(
    codes_BCO: torch.Tensor,
    scale_BGO: torch.Tensor,
    zero_BGO: torch.Tensor | None,
    gradient_BCO: torch.Tensor,
    own_BCC: torch.Tensor,
    first: int,
    width: int,
    scheme: Scheme,
) -> torch.Tensor:
    """The moves [B, C, O] of the columns of a block, in turn. Changes codes in place. `own_BCC`: their own moment.
    `first`: the block's first column; `width`: the columns of a group."""
    moves = torch.empty_like(gradient_BCO)
    for j in range(moves.shape[1]):
        g = (first + j) // width
        scale = scale_BGO[:, g]
        zero = None if zero_BGO is None else zero_BGO[:, g]
        old = codes_BCO[:, j]
        value = (old if zero is None else old - zero) * scale
        slope = gradient_BCO[:, j]
        if j:
            slope = torch.baddbmm(slope[:, None], own_BCC[:, j, None, :j], moves[:, :j], alpha=-1)[:, 0]
        best = value + slope / own_BCC[:, j, j, None]
        new = round_codes(best, scale, zero, scheme)
        moves[:, j] = (new - old) * scale
        codes_BCO[:, j] = new
    return moves
