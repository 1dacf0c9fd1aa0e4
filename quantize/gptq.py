"""GPTQ (Frantar et al., arXiv 2210.17323) for a batch of experts at once.

Columns are rounded one by one in the order of falling second moment. The error of each column is spread over the
columns to come, through the Cholesky factor of the inverse second moment. Scales belong to static groups of the
ORIGINAL column order and are fixed before the loop, so the stored file needs no `g_idx`. All experts of a site go
through the column loop together: one Python step per column, whatever the number of experts.

Shape legend: B experts, O outputs, I inputs, G groups; t marks a transposed weight [B, I, O] (a column is contiguous).
"""

from dataclasses import dataclass

import torch

from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from .card import kernels_for
from .grid import round_codes

# Columns between two updates of all later columns (the paper's lazy batch). 128 keeps the small updates in the cache.
BLOCK_COLUMNS = 128
# Each failed factorisation raises the damping tenfold. After this many, a matrix falls back to its diagonal.
MAX_DAMPING_STEPS = 6


@dataclass(frozen=True)
class Factor:
    """The factored second moments of a batch."""

    # U [B, I, I], upper triangular, with inv(D) = U^T U.
    upper: torch.Tensor
    # D [B, I, I], the damped second moment, positive definite.
    damped: torch.Tensor
    # How often a matrix needed ten times the damping.
    damping_raised: int
    # How many matrices fell back to their diagonal.
    diagonal_fallbacks: int


def factor(moment_BII: torch.Tensor, damping: float) -> Factor:
    """Add `damping` x mean diagonal to each moment and factor it, with tenfold damping for experts where that fails."""
    n = moment_BII.shape[-1]
    diagonal = moment_BII.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    # If all inputs of a site are zero, any positive diagonal will do: round-to-nearest is then optimal.
    mean = torch.where((mean > 0) & torch.isfinite(mean), mean, torch.ones_like(mean))
    eye = torch.eye(n, device=moment_BII.device, dtype=moment_BII.dtype)
    upper, objective = torch.empty_like(moment_BII), torch.empty_like(moment_BII)
    todo = torch.arange(len(moment_BII), device=moment_BII.device)
    raised = 0
    for step in range(MAX_DAMPING_STEPS + 1):
        damped = moment_BII[todo] + (mean[todo] * damping * 10.0**step)[:, None, None] * eye
        lower, info = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(lower)
        factored, info_inverse = torch.linalg.cholesky_ex(inverse, upper=True)
        good = (info == 0) & (info_inverse == 0) & torch.isfinite(factored).flatten(1).all(-1)
        upper[todo[good]], objective[todo[good]] = factored[good], damped[good]
        todo = todo[~good]
        if not len(todo):
            break
        raised += len(todo)
    if len(todo):
        safe = torch.where(torch.isfinite(diagonal[todo]), diagonal[todo], 0.0) + mean[todo, None] * max(damping, 1e-3)
        upper[todo], objective[todo] = torch.diag_embed(safe.rsqrt()), torch.diag_embed(safe)
    return Factor(upper, objective, raised, len(todo))


@dataclass(frozen=True)
class Prepared:
    """What GPTQ needs besides the weights."""

    # The order in which columns are rounded.
    order_BI: torch.Tensor
    # In that order.
    factor: Factor
    # The damped moment [B, I, I] in the original order; every later step minimises with it.
    objective: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """What a squared rounding error of input i costs GPTQ, [B, I]: 1 / U_ii^2.

        That is the variance of input i given the inputs after it, which compensate for part of its error. The moment's
        diagonal would overrate inputs that others can replace.
        """
        paid = self.factor.upper.diagonal(dim1=-2, dim2=-1).square().reciprocal()
        return torch.empty_like(paid).scatter_(1, self.order_BI, paid)


def permuted(x_BII: torch.Tensor, order_BI: torch.Tensor) -> torch.Tensor:
    """Each matrix with its rows and columns in its own order."""
    each = torch.arange(len(x_BII), device=x_BII.device)
    return x_BII[each[:, None, None], order_BI[:, :, None], order_BI[:, None, :]]


def prepare(moment_BII: torch.Tensor, damping: float, activation_order: bool = True) -> Prepared:
    """Order the columns by falling second moment, or not at all, and factor."""
    batch, inputs = moment_BII.shape[:2]
    if activation_order:
        order_BI = torch.argsort(moment_BII.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    else:
        order_BI = torch.arange(inputs, device=moment_BII.device).expand(batch, inputs)
    factored = factor(permuted(moment_BII, order_BI), damping)
    return Prepared(order_BI, factored, permuted(factored.damped, torch.argsort(order_BI, dim=-1)))


def zero_int(zero_BOG: torch.Tensor | None) -> torch.Tensor | None:
    return None if zero_BOG is None else zero_BOG.to(torch.int8)


def gptq(
    w_BOI: torch.Tensor,
    prepared: Prepared,
    scale_BOG: torch.Tensor,
    zero_BOG: torch.Tensor | None,
    scheme: Scheme,
) -> QuantizedWeight:
    """Codes for `w_BOI` (fp32 or fp64) under fixed scales; each column greedily minimises tr(E moment E^T)."""
    batch, _, inputs = w_BOI.shape
    order_BI = prepared.order_BI
    each = torch.arange(batch, device=w_BOI.device)
    upper = prepared.factor.upper
    wt = w_BOI.transpose(1, 2)[each[:, None], order_BI].contiguous()  # [B, I, O], permuted: a copy of our own
    group_BI = order_BI // scheme.width(inputs)
    scale_BGO = scale_BOG.to(wt.dtype).transpose(1, 2).contiguous()
    zero_BGO = None if zero_BOG is None else zero_BOG.to(wt.dtype).transpose(1, 2).contiguous()
    codes_t = torch.empty(wt.shape, dtype=torch.int8, device=wt.device)
    kernels = kernels_for(wt)
    round_block = _round_block if kernels is None else kernels.gptq_block
    for begin in range(0, inputs, BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, inputs)
        codes_t[:, begin:end], errors = round_block(
            wt[:, begin:end], upper[:, begin:end, begin:end], scale_BGO, zero_BGO, group_BI[:, begin:end], scheme
        )
        if end < inputs:
            wt[:, end:].baddbmm_(upper[:, begin:end, end:].transpose(1, 2), errors, alpha=-1)
    codes_BOI = torch.empty(w_BOI.shape, dtype=torch.int8, device=w_BOI.device)
    back = torch.argsort(order_BI, dim=-1)
    codes_BOI.copy_(codes_t[each[:, None], back].transpose(1, 2))
    return QuantizedWeight(codes_BOI, scale_BOG, zero_int(zero_BOG), scheme)


def _round_block(
    wt_BCO: torch.Tensor,
    upper_BCC: torch.Tensor,
    scale_BGO: torch.Tensor,
    zero_BGO: torch.Tensor | None,
    group_BC: torch.Tensor,
    scheme: Scheme,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8, errors) [B, C, O] of C columns, in their order. `group_BC`: the group of each.

    Each column collects the errors of the earlier ones. Spreading each error over the later ones at once, as the kernel
    does in registers, would write as much as this reads.
    """
    each = torch.arange(len(wt_BCO), device=wt_BCO.device)
    errors, codes_BCO = torch.empty_like(wt_BCO), torch.empty(wt_BCO.shape, dtype=torch.int8, device=wt_BCO.device)
    feedback = upper_BCC.transpose(1, 2).contiguous()
    for j in range(wt_BCO.shape[1]):
        w_BO = wt_BCO[:, j]
        if j:
            w_BO = torch.baddbmm(w_BO[:, None], feedback[:, j, None, :j], errors[:, :j], alpha=-1)[:, 0]
        scale = scale_BGO[each, group_BC[:, j]]
        zero = None if zero_BGO is None else zero_BGO[each, group_BC[:, j]]
        codes = round_codes(w_BO, scale, zero, scheme)
        codes_BCO[:, j] = codes.to(torch.int8)
        value = (codes if zero is None else codes - zero) * scale
        errors[:, j] = (w_BO - value) / upper_BCC[:, j, j, None]
    return codes_BCO, errors
