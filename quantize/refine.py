"""Refinement after GPTQ: refit scales by least squares and improve codes by coordinate descent, stretch by stretch.

Both steps lower the same quadratic J = tr(E S E^T), E = W - Q, and neither ever raises it. With G = E S the slope:

- Scale of a group: J is a parabola in it, with its minimum at s + (c G) / (c S_gg c^T), where c are the group's codes
  minus the zero point. The new scale is rounded to its stored dtype and kept only if J falls.
- Code of a column: with all others fixed, the best real value is q_j + G_j / S_jj. J is a parabola here too, so the
  nearest code is the best code.

GPTQ never revises a code. A sweep lets early columns respond to the errors of later ones. (Coordinate descent on this
objective: Behdin et al., QuantEase, arXiv 2309.01885.) The scales of a stretch are refitted right before its sweep:
both then need the slope once, and the product E S is most of a round's work.

Shape legend: B experts, O outputs, I inputs, C columns of a stretch, G groups (held.py).
"""

import torch

from .card import kernels_for
from .grid import TINY_SCALE, round_codes
from .held import BLOCK_COLUMNS, Held, walk


def refine(held: Held, moment_BII: torch.Tensor, rounds: int) -> None:
    """Go over all stretches `rounds` times. `moment_BII` must be positive definite."""
    for _ in range(rounds):
        for part, slope_BCO, own_BCC in walk(held, moment_BII):
            _improve(part, slope_BCO, own_BCC)


def _improve(part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor) -> None:
    """Refits the scales of a stretch, then sweeps its codes. Changes `slope_BCO`, too."""
    kernels, columns = kernels_for(slope_BCO), slope_BCO.shape[1]
    if kernels is not None and columns <= BLOCK_COLUMNS:
        kernels.refine(part, slope_BCO, own_BCC, TINY_SCALE)
        return
    _refit(part, slope_BCO, own_BCC)
    for begin in range(0, columns, BLOCK_COLUMNS):  # more than one block where a group is wider
        block = slice(begin, min(begin + BLOCK_COLUMNS, columns))
        own = own_BCC[:, block, block]
        inner = part.part(block) if columns > BLOCK_COLUMNS else part
        if kernels is None:
            moves = _sweep(inner, slope_BCO[:, block], own)
        else:
            moves = kernels.sweep(inner, slope_BCO[:, block], own)
        if block.stop < columns:
            slope_BCO.baddbmm_(own_BCC[:, :, block], moves, alpha=-1)


def _refit(part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor) -> None:
    """The least-squares scale of each group in turn."""
    for g in range(part.scale_BGO.shape[1]):
        columns = slice(g * part.width, (g + 1) * part.width)
        c = part.codes_BIO[:, columns].to(slope_BCO.dtype)
        if part.zero_BGO is not None:
            c -= part.zero_BGO[:, g, None]
        spread = torch.bmm(own_BCC[:, :, columns], c)
        slope = (c * slope_BCO[:, columns]).sum(1)
        curvature = (c * spread[:, columns]).sum(1)
        old = part.scale_BGO[:, g]
        new = old + slope / curvature.clamp_min(torch.finfo(c.dtype).tiny)
        new = torch.where(old > 0, new.clamp_min(TINY_SCALE), new.clamp_max(-TINY_SCALE))
        new = new.to(part.stored).to(c.dtype)
        change = new - old
        better = change * (change * curvature - 2 * slope) < 0
        change = torch.where(better, change, 0.0)[:, None]
        old.copy_(torch.where(better, new, old))
        part.error_BIO[:, columns] -= c * change
        slope_BCO.sub_(spread.mul_(change))


def _sweep(part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor) -> torch.Tensor:
    """One pass of coordinate descent over the columns of a block, in turn: what their values moved by [B, C, O].
    `slope_BCO` stays as it is."""
    moves, zeros = torch.empty_like(slope_BCO), part.zero_BGO
    codes_BCO = part.codes_BIO.to(slope_BCO.dtype)
    for j in range(moves.shape[1]):
        g = j // part.width
        scale = part.scale_BGO[:, g]
        zero = None if zeros is None else zeros[:, g]
        old = codes_BCO[:, j]
        value = (old if zero is None else old - zero) * scale
        slope = slope_BCO[:, j]
        if j:
            slope = torch.baddbmm(slope[:, None], own_BCC[:, j, None, :j], moves[:, :j], alpha=-1)[:, 0]
        new = round_codes(value + slope / own_BCC[:, j, j, None], scale, zero, part.scheme)
        moves[:, j] = (new - old) * scale
        codes_BCO[:, j] = new
    part.codes_BIO.copy_(codes_BCO)
    part.error_BIO.sub_(moves)
    return moves
