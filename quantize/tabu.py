"""Tabu search for the codes of a stretch of columns, with all other columns and the scales fixed.

Coordinate descent ends where changing no single code lowers J. From there each row keeps moving one code by one step.
It takes the cheapest move even if J rises, does not touch that code again for a few moves, and keeps the best point
that it passes (Glover, Tabu Search, ORSA Journal on Computing 1, 1989; on quadratics of integers: Glover, Kochenberger
and Alidaee, Management Science 44, 1998). Rows are independent under J = tr(E S E^T) and are searched in parallel. With
G = E S and a the group's scale, a step of code i changes J by

    a^2 S_ii -+ 2 a G_i,     and then     G <- G -+ a S_i

Shape legend: B experts, O outputs, I inputs, C columns of a stretch, N = B x O rows, T moves for which a code rests.
"""

import torch

from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from .card import kernels_for
from .gptq import BLOCK_COLUMNS

# Passes over all stretches, with a round of refinement after each.
PASSES = 2
# Moves for which a moved code rests. On the demo's sites, 4 leaves 0.5 to 1 % more error, and 8 the same.
TENURE = 6
# A smaller gain, relative to the row's mean of a^2 S_ii, counts as rounding: a row that returns to its best point has
# not improved it.
LEAST_GAIN = 1e-4


def tabu_searched(
    weight: QuantizedWeight, w_BOI: torch.Tensor, moment_BII: torch.Tensor, moves: int
) -> QuantizedWeight:
    """Make `moves` moves in each stretch, whole groups of about BLOCK_COLUMNS columns. J never rises. `moment_BII`: the
    damped moment."""
    scheme, inputs = weight.scheme, w_BOI.shape[-1]
    codes = weight.codes.clone()
    error_BOI = w_BOI - weight.dequantize(w_BOI.dtype)
    group = scheme.width(inputs)
    width = max(1, BLOCK_COLUMNS // group) * group
    for begin in range(0, inputs, width):
        columns = slice(begin, min(begin + width, inputs))
        groups = slice(begin // group, columns.stop // group)
        step = weight.scales[:, :, groups].to(w_BOI.dtype).repeat_interleave(group, dim=-1)
        own = moment_BII[:, columns, columns]
        slope = torch.bmm(error_BOI, moment_BII[:, :, columns])
        steps = _search(codes[:, :, columns], step, slope, own, moves, scheme)
        # J changes by tr(D S_cc D^T) - 2 tr(D G_c^T). It is computed anew: the search's running sums accumulate error.
        moved = steps * step
        change_BO = ((torch.bmm(moved, own) - 2 * slope) * moved).sum(-1)
        steps = torch.where(change_BO[:, :, None] < 0, steps, 0.0)
        codes[:, :, columns] += steps.to(torch.int8)
        error_BOI[:, :, columns] -= steps * step
    return QuantizedWeight(codes, weight.scales, weight.zero_points, scheme)


def _search(
    codes_BOC: torch.Tensor,
    step_BOC: torch.Tensor,
    slope_BOC: torch.Tensor,
    moment_BCC: torch.Tensor,
    moves: int,
    scheme: Scheme,
) -> torch.Tensor:
    """The steps [B, O, C] that each code has moved at the best point that its row passed."""
    square_BOC = step_BOC.square() * moment_BCC.diagonal(dim1=-2, dim2=-1)[:, None]
    gain_BO = LEAST_GAIN * square_BOC.mean(-1)
    kernels = kernels_for(step_BOC)
    if kernels is not None:
        code, slope = codes_BOC.to(step_BOC.dtype).contiguous(), 2 * step_BOC * slope_BOC
        return kernels.tabu_steps(code, step_BOC, slope, square_BOC, gain_BO, moment_BCC, moves, TENURE, scheme)
    batch, outputs, columns = codes_BOC.shape
    rows, device = batch * outputs, codes_BOC.device
    code, step = codes_BOC.to(step_BOC.dtype).flatten(0, 1), step_BOC.flatten(0, 1)
    moment = moment_BCC.reshape(batch * columns, columns)
    first_N1 = (torch.arange(batch, device=device) * columns).repeat_interleave(outputs)[:, None]
    # One step up costs `up - slope`, one step down `down + slope`; it costs infinity at the ends of the range.
    slope, double = 2 * step * slope_BOC.flatten(0, 1), 2 * step
    square, gain_N1 = square_BOC.flatten(0, 1), gain_BO.view(-1, 1)
    up = square.masked_fill(code >= scheme.code_max, torch.inf)
    down = square.masked_fill(code <= scheme.code_min, torch.inf)
    rise, cost_NC = torch.empty_like(slope), torch.empty_like(slope)
    now_N1 = best_N1 = step.new_zeros(rows, 1)  # change of J since the start
    best_at_N1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
    places, signs = torch.zeros(rows, moves, dtype=torch.long, device=device), step.new_zeros(rows, moves)
    for k in range(moves):
        torch.sub(up, slope, out=rise)
        torch.add(down, slope, out=cost_NC)
        torch.minimum(rise, cost_NC, out=cost_NC)
        if k:
            # A resting code may still move if its row reaches a new best point by that.
            resting_NT = places[:, max(0, k - TENURE) : k]
            cost_NT = cost_NC.gather(1, resting_NT)
            cost_NC.scatter_(1, resting_NT, cost_NT.masked_fill(now_N1 + cost_NT >= best_N1 - gain_N1, torch.inf))
        cost_N1, place_N1 = cost_NC.min(1, keepdim=True)
        stuck_N1 = torch.isinf(cost_N1)
        sign_N1 = torch.where(rise.gather(1, place_N1) <= cost_N1, 1.0, -1.0).masked_fill(stuck_N1, 0.0)
        places[:, k : k + 1], signs[:, k : k + 1] = place_N1, sign_N1
        value_N1, own_N1 = code.gather(1, place_N1) + sign_N1, square.gather(1, place_N1)
        code.scatter_(1, place_N1, value_N1)
        up.scatter_(1, place_N1, own_N1.masked_fill(value_N1 >= scheme.code_max, torch.inf))
        down.scatter_(1, place_N1, own_N1.masked_fill(value_N1 <= scheme.code_min, torch.inf))
        change_NC = moment.index_select(0, (first_N1 + place_N1)[:, 0]).mul_(double)
        slope.addcmul_(change_NC, sign_N1 * step.gather(1, place_N1), value=-1)
        now_N1 = now_N1 + cost_N1.masked_fill(stuck_N1, 0.0)
        better_N1 = now_N1 < best_N1 - gain_N1
        best_N1, best_at_N1 = torch.where(better_N1, now_N1, best_N1), best_at_N1.masked_fill(better_N1, k + 1)
    signs.masked_fill_(torch.arange(moves, device=device) >= best_at_N1, 0.0)
    return torch.zeros_like(step).scatter_add_(1, places, signs).view(batch, outputs, columns)
