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

from dataclasses import dataclass

import torch

from ..core.quantized_weight import QuantizedWeight
from .gptq import BLOCK_COLUMNS, Prepared, factor, gptq, permuted
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
    """Neighbouring columns and their groups, with everything that the tries need besides the weights."""

    columns: slice
    groups: slice
    moment_BCC: torch.Tensor
    inverse_BCC: torch.Tensor
    # Of B x K problems.
    tries: Prepared

    @property
    def count(self) -> int:
        return len(self.tries.order_BI) // len(self.moment_BCC)


def prepare_restarts(objective_BII: torch.Tensor, group_size: int, tries: int) -> list[list[Stretch]]:
    """The stretches of each pass: whole groups of about BLOCK_COLUMNS columns. `objective_BII`: the damped moment."""
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
    """One pass over the stretches, with each try refined `rounds` times. J never rises. `moment_BII`: the damped
    moment."""
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
    """For each row the try that lowers J most, or the held codes if none does. K and B of `tried_KBON` are one axis."""
    least_BO, best_BO = change_KBO.nan_to_num(nan=torch.inf).min(0)
    chosen = tried_KBON.view(-1, *held_BON.shape).gather(0, best_BO[None, :, :, None].expand(1, *held_BON.shape))[0]
    return torch.where((least_BO < 0).unsqueeze(-1), chosen, held_BON)
