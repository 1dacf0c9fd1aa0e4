"""GPTQ (Frantar et al., arXiv 2210.17323) for a batch of experts at once.

Columns are rounded one by one in the order of falling second moment, and each makes good what the columns before it
left. Scales belong to static groups of the ORIGINAL column order and are fixed before the loop, so the stored file
needs no `g_idx`. All experts of a site go through the column loop together: one Python step per column, whatever their
number.

The paper spreads the error of each column over the later ones through the Cholesky factor of the inverse second moment.
Here the damped moment itself is factored, D = R R^T with R upper triangular: then tr(E D E^T) is the squared size of E
R, and its column j is smallest for the code nearest to

    w_j + (sum of E_i R_ij over the columns i before j) / R_jj,     E = W - Q

Both are the same rule (QuIP, Chee et al., arXiv 2307.13304, theorem 6): the paper's factor is the inverse of R. Without
an inverse there is a quarter of the work, and less rounding.

Shape legend: B experts, O outputs, I inputs, C columns of a block, G groups; columns before outputs as in held.py.
"""

from dataclasses import dataclass

import torch

from ..core.scheme import Scheme
from .card import kernels_for
from .grid import round_codes
from .held import BLOCK_COLUMNS, Held, product

# Each failed factorisation raises the damping tenfold. After this many, a matrix falls back to its diagonal.
MAX_DAMPING_STEPS = 6
# Matrices of at most this many columns are factored together. Larger ones go one by one: a call has work for a whole
# GPU, and only one matrix has copies in memory.
FACTORED_TOGETHER = 512


@dataclass(frozen=True)
class Factor:
    """The factored second moments of a batch: D = R R^T."""

    # R [B, I, I], upper triangular.
    root: torch.Tensor
    # What D has on its diagonal [B] beyond the moment's own and its share (`own_share`).
    damping: torch.Tensor
    # Which matrices could not be factored and are their own diagonal [B], damped.
    diagonal: torch.Tensor
    # How often a matrix needed ten times the damping.
    damping_raised: int
    # How many matrices fell back to their diagonal.
    diagonal_fallbacks: int


def factor(
    moment_BII: torch.Tensor, damping: float, order_BI: torch.Tensor | None = None, own_share: float = 0.0
) -> Factor:
    """Add `damping` x mean diagonal, and `own_share` of each entry of the diagonal, to each moment and factor it, its
    columns in the given order; with tenfold damping for experts where that fails.

    With J the matrix that reverses an order, J D J = L L^T gives D = (J L J) (J L J)^T, and J L J is upper triangular.
    """
    batch, n = moment_BII.shape[:2]
    device = moment_BII.device
    diagonal = moment_BII.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    # If all inputs of a site are zero, any positive diagonal will do: round-to-nearest is then optimal.
    mean = torch.where((mean > 0) & torch.isfinite(mean), mean, torch.ones_like(mean))
    order = torch.arange(n, device=device).expand(batch, n) if order_BI is None else order_BI
    backwards = order.flip(-1)
    root, added = torch.empty_like(moment_BII), mean * damping
    todo, raised = torch.arange(batch, device=device), 0
    for step in range(MAX_DAMPING_STEPS + 1):
        added[todo] = mean[todo] * damping * 10.0**step
        if n <= FACTORED_TOGETHER:
            found, good = _factored(permuted(moment_BII, backwards[todo], todo), added[todo], own_share)
            root[todo] = found
        else:
            each = [_factor_one(moment_BII[b], backwards[b], added[b], own_share, root[b]) for b in todo.tolist()]
            good = torch.cat(each)
        todo = todo[~good]
        if not len(todo):
            break
        raised += len(todo)
    fallback = torch.zeros(batch, dtype=torch.bool, device=device)
    if len(todo):
        fallback[todo], added[todo] = True, mean[todo] * max(damping, 1e-3)
        safe = own_diagonal(moment_BII[todo]) + added[todo, None]
        root[todo] = torch.diag_embed(safe.gather(1, order[todo]).sqrt())
    return Factor(root, added, fallback, raised, len(todo))


def _factor_one(
    moment_II: torch.Tensor, backwards_I: torch.Tensor, damping: torch.Tensor, own_share: float, root_II: torch.Tensor
) -> torch.Tensor:
    """Puts R of one matrix into `root_II`; whether it is sound [1]."""
    turned_II = moment_II.index_select(0, backwards_I).index_select(1, backwards_I)
    found_BII, good = _factored(turned_II[None], damping[None], own_share)
    root_II.copy_(found_BII[0])
    return good


def _factored(turned_BII: torch.Tensor, damping_B: torch.Tensor, own_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, whether it is sound [B]) of moments in reverse order, which are lost."""
    turned_BII.diagonal(dim1=-2, dim2=-1).mul_(1 + own_share).add_(damping_B[:, None])
    lower, info = torch.linalg.cholesky_ex(turned_BII)
    return lower.flip((-2, -1)), (info == 0) & torch.isfinite(lower.sum((-2, -1)))


def own_diagonal(moment_BII: torch.Tensor) -> torch.Tensor:
    """[B, I], with zeros for what is not finite."""
    diagonal = moment_BII.diagonal(dim1=-2, dim2=-1)
    return torch.where(torch.isfinite(diagonal), diagonal, 0.0)


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
        """What a squared rounding error of input i costs GPTQ, [B, I]: R_ii^2.

        That is the variance of input i given the inputs after it, which compensate for part of its error. The moment's
        diagonal would overrate inputs that others can replace.
        """
        paid = self.factor.root.diagonal(dim1=-2, dim2=-1).square()
        return torch.empty_like(paid).scatter_(1, self.order_BI, paid)


def permuted(x_BII: torch.Tensor, order_NI: torch.Tensor, which_N: torch.Tensor) -> torch.Tensor:
    """Matrices of a batch, each with its rows and columns in an order of its own."""
    return x_BII[which_N[:, None, None], order_NI[:, :, None], order_NI[:, None, :]]


def column_order(moment_BII: torch.Tensor) -> torch.Tensor:
    """[B, I]: by falling second moment."""
    return torch.argsort(moment_BII.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)


def prepare(
    moment_BII: torch.Tensor, damping: float, activation_order: bool = True, own_share: float = 0.0
) -> Prepared:
    """Order the columns by falling second moment, or not at all, and factor.

    `damping` x the diagonal's mean alone spares inputs of large scale, and overwhelms all others where such inputs make
    up the mean. `own_share` of an entry itself draws its correlations towards zero, whatever its scale: few rows
    overstate them, and texts that calibration does not resemble have others.
    """
    batch, inputs = moment_BII.shape[:2]
    if activation_order:
        order_BI = column_order(moment_BII)
    else:
        order_BI = torch.arange(inputs, device=moment_BII.device).expand(batch, inputs)
    factored = factor(moment_BII, damping, order_BI, own_share)
    damped = moment_BII.clone()
    damped.diagonal(dim1=-2, dim2=-1).mul_(1 + own_share).add_(factored.damping[:, None])
    for b in factored.diagonal.nonzero()[:, 0].tolist() if factored.diagonal_fallbacks else ():
        damped[b] = torch.diag(own_diagonal(moment_BII[b]) + factored.damping[b])
    return Prepared(order_BI, factored, damped)


def gptq(
    w_BOI: torch.Tensor,
    prepared: Prepared,
    scale_BOG: torch.Tensor,
    zero_BOG: torch.Tensor | None,
    scheme: Scheme,
) -> Held:
    """Codes for `w_BOI` (fp32 or fp64) under fixed scales; each column greedily minimises tr(E D E^T)."""
    w_BIO = w_BOI.transpose(1, 2).contiguous()
    if w_BIO.data_ptr() == w_BOI.data_ptr():  # a single row, or a single column
        w_BIO = w_BIO.clone()
    held = Held(
        codes_BIO=torch.empty(w_BIO.shape, dtype=torch.int8, device=w_BIO.device),
        scale_BGO=scale_BOG.to(w_BIO.dtype).transpose(1, 2).contiguous(),
        zero_BGO=None if zero_BOG is None else zero_BOG.to(w_BIO.dtype).transpose(1, 2).contiguous(),
        error_BIO=w_BIO,
        width=scheme.width(w_BIO.shape[1]),
        scheme=scheme,
        stored=scale_BOG.dtype,
    )
    round_columns(held, prepared.order_BI, prepared.factor.root)
    return held


def round_columns(held: Held, order_BI: torch.Tensor, root_BII: torch.Tensor) -> None:
    """GPTQ on weights that `held.error_BIO` holds; there it leaves their error, and their codes in `held.codes_BIO`.
    `root_BII`: R (Factor.root) in the order of rounding."""
    inputs = held.codes_BIO.shape[1]
    # The errors in the order of rounding: what the next columns make good is one product.
    left_BIO = torch.empty_like(held.error_BIO)
    kernels = kernels_for(left_BIO)
    round_block = _round_block if kernels is None else kernels.gptq
    for begin in range(0, inputs, BLOCK_COLUMNS):
        block = slice(begin, min(begin + BLOCK_COLUMNS, inputs))
        due = product(root_BII[:, :begin, block].transpose(1, 2), left_BIO[:, :begin]) if begin else None
        round_block(held, order_BI[:, block], root_BII[:, block, block], due, left_BIO[:, block])


def _round_block(
    held: Held,
    order_BC: torch.Tensor,
    root_BCC: torch.Tensor,
    due_BCO: torch.Tensor | None,
    left_BCO: torch.Tensor,
) -> None:
    """Rounds C columns in their order. `due_BCO`: the sum of E_i R_ij over all columns before the block. Their errors
    go into `left_BCO`."""
    each = torch.arange(len(order_BC), device=order_BC.device)[:, None]
    w_BCO, codes_BCO = held.error_BIO[each, order_BC], torch.empty_like(held.codes_BIO[:, : order_BC.shape[1]])
    group_BC = order_BC // held.width
    across = root_BCC.transpose(1, 2).contiguous()
    for j in range(order_BC.shape[1]):
        w, due = w_BCO[:, j], None if due_BCO is None else due_BCO[:, j, None]
        if j and due is not None:
            due = torch.baddbmm(due, across[:, j, None, :j], left_BCO[:, :j])
        elif j:
            due = torch.bmm(across[:, j, None, :j], left_BCO[:, :j])
        aim = w if due is None else w + due[:, 0] / root_BCC[:, j, j, None]
        scale = held.scale_BGO[each[:, 0], group_BC[:, j]]
        zero = None if held.zero_BGO is None else held.zero_BGO[each[:, 0], group_BC[:, j]]
        codes = round_codes(aim, scale, zero, held.scheme)
        codes_BCO[:, j] = codes.to(torch.int8)
        left_BCO[:, j] = w - (codes if zero is None else codes - zero) * scale
    held.codes_BIO[each, order_BC] = codes_BCO
    held.error_BIO[each, order_BC] = left_BCO
