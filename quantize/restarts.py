"""Several tries at a stretch of columns, all others fixed; every row keeps the one that leaves it least error.

GPTQ is greedy, and refinement ends in the nearest minimum. Columns taken in another order end in another one. Rows
are independent under J = tr(E S E^T), and so each keeps its own try; with the other columns fixed, J over a stretch c
is a problem of the same kind,

    J = tr((T - Q_c) S_cc (T - Q_c)^T) + what Q_c cannot change,     T = Q_c + (E S)_c S_cc^-1

so the choice is made stretch by stretch. Over whole rows the tries of a wide matrix would differ by little, since what
one gains in some columns it loses in others. Orders depart at random from GPTQ's; the seed is fixed, and the noise is
the same for all experts, so that cutting a batch changes no code.

Shape legend: B experts, O outputs, I inputs, C columns of a stretch, K tries (batch entries try by try).
"""

from dataclasses import dataclass

import torch

from ..core.quantized_weight import QuantizedWeight
from .gptq import BLOCK_COLUMNS, Prepared, factor, gptq, permuted
from .refine import refine

# A restart is made this many times over, from where the last one ended.
PASSES = 2
# How far, in the logarithm of the second moment, an order may depart from the falling one. Half and twice as much left
# 0.3 % more error on the demo's sites.
ORDER_NOISE = 0.5
# S_cc is a part of the damped moment: no more than rounding needs to be made up for.
DAMPING = 1e-6


@dataclass(frozen=True)
class Stretch:
    """Neighbouring columns, their groups, and what the tries at them need but for the weights."""

    columns: slice
    groups: slice
    moment_BCC: torch.Tensor
    inverse_BCC: torch.Tensor
    tries: Prepared  # of B x K problems

    @property
    def count(self) -> int:
        return len(self.tries.order_BI) // len(self.moment_BCC)


def prepare_restarts(objective_BII: torch.Tensor, group_size: int, tries: int) -> list[list[Stretch]]:
    """For each pass the stretches, whole groups of about BLOCK_COLUMNS columns. `objective_BII`: the damped moment."""
    if not tries:
        return []
    generator = torch.Generator().manual_seed(0)
    inputs = objective_BII.shape[-1]
    width = max(1, BLOCK_COLUMNS // group_size) * group_size
    return [
        [
            _stretch(objective_BII, begin, min(begin + width, inputs), group_size, tries, generator)
            for begin in range(0, inputs, width)
        ]
        for _ in range(PASSES)
    ]


def _stretch(
    objective_BII: torch.Tensor, begin: int, end: int, group_size: int, tries: int, generator: torch.Generator
) -> Stretch:
    own = objective_BII[:, begin:end, begin:end].contiguous()
    noise_KC = ORDER_NOISE * torch.rand(tries, end - begin, generator=generator).to(own)
    size = own.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(own.dtype).tiny).log()
    order = torch.argsort((size + noise_KC[:, None]).flatten(0, 1), dim=-1, descending=True)
    again = own.repeat(tries, 1, 1)
    # Where this fails the aim is no number, and no try is better than what is held.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(own).L)
    prepared = Prepared(order, factor(permuted(again, order), DAMPING), again)
    return Stretch(slice(begin, end), slice(begin // group_size, -(-end // group_size)), own, inverse, prepared)


def restarted(
    weight: QuantizedWeight, w_BOI: torch.Tensor, moment_BII: torch.Tensor, stretches: list[Stretch], rounds: int
) -> QuantizedWeight:
    """One pass over the stretches, each try refined `rounds` times. J never rises. `moment_BII`: the damped one."""
    scheme, zeros = weight.scheme, weight.zero_points
    codes, scales = weight.codes.clone(), weight.scales.clone()
    error_BOI = w_BOI - weight.dequantize(w_BOI.dtype)

    for stretch in stretches:
        columns, groups, count = stretch.columns, stretch.groups, stretch.count
        zero = None if zeros is None else zeros[:, :, groups]
        held = QuantizedWeight(codes[:, :, columns], scales[:, :, groups], zero, scheme)
        value = held.dequantize(w_BOI.dtype)
        slope = torch.bmm(error_BOI, moment_BII[:, :, columns])
        aim = (value + torch.bmm(slope, stretch.inverse_BCC)).repeat(count, 1, 1)
        zero_again = None if zero is None else zero.repeat(count, 1, 1)
        tried = gptq(aim, stretch.tries, held.scales.repeat(count, 1, 1), zero_again, scheme)
        tried = refine(tried, aim, stretch.tries.objective, rounds)
        # J moves by tr(D S_cc D^T) - 2 tr(D (E S)_c^T) when the stretch's values move by D.
        moved = tried.dequantize(w_BOI.dtype).unflatten(0, (count, -1)) - value
        change_KBO = ((moved @ stretch.moment_BCC - 2 * slope) * moved).sum(-1)
        codes[:, :, columns] = _best(held.codes, tried.codes, change_KBO)
        scales[:, :, groups] = _best(held.scales, tried.scales, change_KBO)
        now = QuantizedWeight(codes[:, :, columns], scales[:, :, groups], zero, scheme)
        error_BOI[:, :, columns] -= now.dequantize(w_BOI.dtype) - value
    return QuantizedWeight(codes, scales, zeros, scheme)


def _best(held_BON: torch.Tensor, tried_KBON: torch.Tensor, change_KBO: torch.Tensor) -> torch.Tensor:
    """Of each row the try that lowers J most, or what is held where none does. K and B of `tried_KBON` are one axis."""
    least_BO, best_BO = change_KBO.nan_to_num(nan=torch.inf).min(0)
    chosen = tried_KBON.view(-1, *held_BON.shape).gather(0, best_BO[None, :, :, None].expand(1, *held_BON.shape))[0]
    return torch.where((least_BO < 0).unsqueeze(-1), chosen, held_BON)
