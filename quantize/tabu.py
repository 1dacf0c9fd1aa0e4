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

from ..core.scheme import Scheme
from .card import kernels_for
from .held import Held, walk

# Passes over all stretches, with a round of refinement after each.
PASSES = 2
# Moves for which a moved code rests. On the demo's sites, 4 leaves 0.5 to 1 % more error, and 8 the same.
TENURE = 6
# A smaller gain, relative to the row's mean of a^2 S_ii, counts as rounding: a row that returns to its best point has
# not improved it.
LEAST_GAIN = 1e-4


def tabu_search(held: Held, moment_BII: torch.Tensor, moves: int) -> None:
    """Make `moves` moves in each stretch, whole groups of about BLOCK_COLUMNS columns. J never rises. `moment_BII`: the
    damped moment."""
    for part, slope_BCO, own_BCC in walk(held, moment_BII):
        kernels = kernels_for(slope_BCO)
        if kernels is not None:
            kernels.tabu(part, slope_BCO, own_BCC, moves, TENURE, LEAST_GAIN)
            continue
        step_BOC = part.by_column(part.scale_BGO).transpose(1, 2).contiguous()
        slope_BOC, codes_BOC = slope_BCO.transpose(1, 2).contiguous(), part.codes_BIO.transpose(1, 2)
        steps_BOC = _search(codes_BOC, step_BOC, slope_BOC, own_BCC, moves, held.scheme)
        # J changes by tr(D S_cc D^T) - 2 tr(D G_c^T). It is computed anew: the search's running sums accumulate error.
        moved = steps_BOC * step_BOC
        change_BO = ((torch.bmm(moved, own_BCC) - 2 * slope_BOC) * moved).sum(-1)
        better = change_BO[:, None] < 0
        part.codes_BIO.add_(steps_BOC.transpose(1, 2).to(torch.int8) * better)
        part.error_BIO.sub_(torch.where(better, moved.transpose(1, 2), 0.0))


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
