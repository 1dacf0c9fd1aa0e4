"""Restarts: try a stretch of columns several times, with all others fixed; each row keeps the try with least error.

GPTQ is greedy, and refinement ends in the nearest local minimum. Taking the columns in another order leads to another
minimum. Rows are independent under J = tr(E S E^T), so each keeps its own try. With the other columns fixed, J over a
stretch c is a problem of the same form,

    J = tr((T - Q_c) S_cc (T - Q_c)^T) + a term without Q_c,     T = Q_c + (E S)_c S_cc^-1

so tries are chosen stretch by stretch. Over whole rows of a wide matrix the tries would differ little, since each gains
in some columns what it loses in others. Orders deviate at random from GPTQ's. The seed is fixed, and the noise is the
same for all experts, so that cutting a batch changes no code.

Shape legend: B experts, O outputs, I inputs, C columns of a stretch, K tries (the batch axis holds try after try).
"""

from dataclasses import dataclass, replace

import torch

from .card import kernels_for
from .gptq import factor, round_columns
from .grid import TINY_SCALE
from .held import Held, stretches, walk
from .refine import refine

# Passes of restarts over all stretches, each from where the last one ended.
PASSES = 2
# Standard deviation of the noise on the logarithm of the second moment, by which columns are ordered. Half and twice as
# much left 0.3 % more error on the demo's sites.
ORDER_NOISE = 0.5
# S_cc is part of a moment that is damped already, so this only has to cover rounding.
DAMPING = 1e-6


@dataclass(frozen=True)
class Stretch:
    """Everything that the tries of a stretch need besides weights and moment."""

    # S_cc^-1 [B, C, C]. Where this fails the aim is no number, and no try is better than what is held.
    inverse_BCC: torch.Tensor
    # The order of each try [K, B, C], the place of each column in it, and R of S_cc in that order [K, B, C, C]
    # (gptq.Factor.root).
    order_KBC: torch.Tensor
    rank_KBC: torch.Tensor
    root_KBCC: torch.Tensor


def prepare_restarts(objective_BII: torch.Tensor, group_size: int, tries: int) -> list[list[Stretch]]:
    """What the tries of each pass and stretch need. `objective_BII`: the damped moment.

    Stretches of equal width are prepared together: one call factors a try of all of them.
    """
    if not tries:
        return []
    generator = torch.Generator().manual_seed(0)
    columns = stretches(objective_BII.shape[-1], group_size)
    noise = [[torch.rand(tries, c.stop - c.start, generator=generator) for c in columns] for _ in range(PASSES)]
    whole = sum(c.stop - c.start == columns[0].stop for c in columns)  # all but perhaps the last
    passes: list[list[Stretch]] = [[] for _ in range(PASSES)]
    for these in (slice(0, whole), slice(whole, None)):
        if columns[these]:
            own_SBCC = torch.stack([objective_BII[:, c, c] for c in columns[these]])
            inverse_SBCC = torch.cholesky_inverse(torch.linalg.cholesky_ex(own_SBCC).L).contiguous()
            for made, drawn in zip(passes, noise, strict=True):
                made += _stretches(own_SBCC, inverse_SBCC, torch.stack(drawn[these]).to(own_SBCC))
    return passes


def _stretches(own_SBCC: torch.Tensor, inverse_SBCC: torch.Tensor, noise_SKC: torch.Tensor) -> list[Stretch]:
    """The stretches of one pass that are equally wide, S of them."""
    size = own_SBCC.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(own_SBCC.dtype).tiny).log()
    noisy_SKBC = size[:, None] + ORDER_NOISE * noise_SKC[:, :, None]
    order_SKBC = torch.argsort(noisy_SKBC, dim=-1, descending=True).contiguous()
    flat = own_SBCC.flatten(0, 1)
    roots = [factor(flat, DAMPING, order_SKBC[:, k].flatten(0, 1)).root for k in range(noise_SKC.shape[1])]
    root_SKBCC = torch.stack([root.view_as(own_SBCC) for root in roots], dim=1)
    rank_SKBC = torch.argsort(order_SKBC, dim=-1).contiguous()
    return [Stretch(*each) for each in zip(inverse_SBCC, order_SKBC, rank_SKBC, root_SKBCC, strict=True)]


def restart(held: Held, moment_BII: torch.Tensor, made: list[Stretch], rounds: int) -> None:
    """One pass over the stretches, with each try refined `rounds` times. J never rises. `moment_BII`: the damped
    moment."""
    for stretch, (part, slope_BCO, own_BCC) in zip(made, walk(held, moment_BII), strict=True):
        kernels = kernels_for(slope_BCO)
        if kernels is None:
            _try(stretch, part, slope_BCO, own_BCC, rounds)
        else:
            kernels.restart(part, slope_BCO, own_BCC, stretch, rounds, TINY_SCALE)


def _try(stretch: Stretch, part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor, rounds: int) -> None:
    """Makes all tries of a stretch at once, and keeps the best of each row."""
    count, zeros = len(stretch.order_KBC), part.zero_BGO
    value_BCO = part.value()
    aim_BCO = value_BCO + torch.bmm(stretch.inverse_BCC, slope_BCO)
    tried = replace(
        part,
        codes_BIO=part.codes_BIO.repeat(count, 1, 1),
        scale_BGO=part.scale_BGO.repeat(count, 1, 1),
        zero_BGO=None if zeros is None else zeros.repeat(count, 1, 1),
        error_BIO=aim_BCO.repeat(count, 1, 1),
    )
    round_columns(tried, stretch.order_KBC.flatten(0, 1), stretch.root_KBCC.flatten(0, 1))
    refine(tried, own_BCC.repeat(count, 1, 1), rounds)
    # J moves by tr(D S_cc D^T) - 2 tr(D (E S)_c^T) when the stretch's values move by D.
    moved = tried.value().unflatten(0, (count, -1)) - value_BCO
    change_KBO = ((own_BCC @ moved - 2 * slope_BCO) * moved).sum(2)
    least_BO, best_BO = change_KBO.nan_to_num(nan=torch.inf).min(0)

    def keep(held_BNO: torch.Tensor, tried_KBNO: torch.Tensor) -> None:
        index = best_BO[None, :, None].expand(1, *held_BNO.shape)
        chosen = tried_KBNO.view(-1, *held_BNO.shape).gather(0, index)[0]
        held_BNO.copy_(torch.where(least_BO[:, None] < 0, chosen, held_BNO))

    keep(part.codes_BIO, tried.codes_BIO)
    keep(part.scale_BGO, tried.scale_BGO)
    part.error_BIO.sub_(part.value() - value_BCO)
