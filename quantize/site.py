"""Quantize one site by one method: (weights, second moments, scheme) -> codes, and the error that they leave.

`batch_slices` cuts the batch of experts so that working copies fit into a memory budget. Cutting changes no code.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.finite import all_finite
from ..core.method import Method
from ..core.products import product
from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from . import tabu
from .gptq import Prepared, gptq, prepare
from .grid import absmax_scales, round_to_nearest, searched_scales
from .held import BLOCK_COLUMNS
from .metric import quantize_by_row_blocks
from .refine import refine
from .restarts import PASSES, Stretch, prepare_restarts, restart

# Time of one move of the tabu search per weight of its stretch, in flops of matrix products; measured on a CPU core.
MOVE_FLOPS = 700.0
# Wider groups get no restarts and no tabu search: a stretch of whole groups would be most of the row.
WIDEST_SEARCHED = 512


@dataclass(frozen=True)
class SiteResult:
    """Codes for a batch of matrices of one shape."""

    weight: QuantizedWeight
    # Per matrix, the relative output error tr(E S E^T) / tr(W S W^T).
    output_error: list[float]
    # How often a matrix needed ten times the damping, and how many fell back to their diagonal (gptq.Factor).
    damping_raised: int
    diagonal_fallbacks: int


def relative_output_error(
    w_BOI: torch.Tensor, found: QuantizedWeight | torch.Tensor, moment_BII: torch.Tensor | None
) -> list[float]:
    """Per matrix, the expected squared error of the output over its expected square. Without a moment, inputs count as
    uncorrelated with equal variance. `found`: the quantized weights [B, O, I]."""

    whole, error = [], []
    for b in range(len(w_BOI)):  # one by one, since it needs copies
        w_OI, moment_II = w_BOI[b], None if moment_BII is None else moment_BII[b]
        whole.append(_energy(w_OI, moment_II))
        q_OI = found[b] if isinstance(found, torch.Tensor) else found.item(b, slice(None)).dequantize(w_OI.dtype)
        error.append(_energy(w_OI - q_OI, moment_II) / whole[-1].clamp_min(1e-30))
    if w_BOI.dtype != torch.float64 and not all_finite(torch.stack(whole + error)):  # too large squares for fp32
        moment = None if moment_BII is None else moment_BII.double()
        wide = found.double() if isinstance(found, torch.Tensor) else found
        return relative_output_error(w_BOI.double(), wide, moment)
    return list(torch.stack(error).tolist())


def _energy(x_OI: torch.Tensor, moment_II: torch.Tensor | None) -> torch.Tensor:
    """tr(x S x^T)."""
    if moment_II is None:
        return x_OI.square().sum()
    return (product(x_OI, moment_II) if x_OI.dtype == torch.float32 else x_OI @ moment_II).mul_(x_OI).sum()


def working_bytes(batch: int, outputs: int, inputs: int, metric: bool, method: Method) -> int:
    """Bytes in use while a batch of matrices is quantized, with the weights, moments and metrics that are given. All
    numbers are fp32, but for codes, which are bytes. tests/test_working_set.py counts them.

    It is the most of five steps. Large matrices are factored one by one, with three copies of one. The searches hold
    the factor and the damped moment, and restarts the factors of their tries; preparing those holds one pass twice.
    GPTQ adds two copies of the rows that are quantized together, and their codes. The torch form of a search has
    instead of one of these copies 13 of a stretch, and three numbers a row and move, for tabu; 8 of each try for
    restarts. Row blocks add their metric's factor, the errors and codes of all rows, and three copies of a block's
    rows. The error that is left takes four copies of one matrix. A stretch's slopes, and what its change makes of them,
    are two of its copies.
    """
    blocks = method.output_blocks if metric and method.output_blocks > 1 else 1
    rows, stretch = -(-outputs // blocks), min(inputs, BLOCK_COLUMNS)
    weight, moment, outer, together = outputs * inputs, inputs**2, outputs**2 * metric, rows * inputs
    tries = method.restarts * stretch * inputs
    held = 2 * moment + PASSES * tries
    search = rows * max((13 * stretch + 3 * method.tabu_moves) * (method.tabu_moves > 0), 8 * stretch * method.restarts)
    block = 4 * together // 3 + max(together, search) + 2 * stretch * rows  # with scales of groups of 32
    if blocks > 1:
        block += outer + 5 * weight // 4 + 3 * together
    steps = (
        batch * moment + 3 * moment,
        batch * (held + tries + 6 * stretch * inputs * (method.restarts > 0)),
        (batch * (held + outer) + 3 * outer) * metric,
        batch * (held + block),
        batch * (held + weight // 4) + 4 * weight,
    )
    return 4 * (batch * (weight + moment + outer) + max(steps))


def matrix_flops(outputs: int, inputs: int, metric: bool, method: Method) -> float:
    """Floating-point operations to quantize one matrix.

    2 x outputs x inputs^2 for the column updates and again for each round of refinement; 3 x inputs^3 for the factors.
    An output metric adds outputs^2 x inputs and 3 x outputs^3. Each pass of restarts adds twice the column updates, for
    what a stretch changes elsewhere, and for every try the updates and factors of its stretch. Each pass of a tabu
    search also adds the column updates, and for every move the time of some 700 flops per weight, since it waits for
    memory.
    """
    sweeps, stretch = 1 + method.refine_rounds, min(inputs, BLOCK_COLUMNS)
    flops = 2.0 * sweeps * outputs * inputs**2 + 3.0 * inputs**3 + metric * (outputs**2 * inputs + 3.0 * outputs**3)
    tries = method.restarts * (2.0 * sweeps * outputs * inputs * stretch + 3.0 * inputs * stretch**2)
    updates = 4.0 * outputs * inputs**2
    flops += PASSES * (tries + updates * (method.restarts > 0))
    return flops + tabu.PASSES * (updates + MOVE_FLOPS * method.tabu_moves * outputs * inputs) * (method.tabu_moves > 0)


def batch_slices(
    batch: int, outputs: int, inputs: int, budget_bytes: int, method: Method, metric: bool = False
) -> Iterator[slice]:
    """Slices of a batch of matrices, each with a working set within the budget, or of one matrix."""
    step = batch
    while step > 1 and working_bytes(step, outputs, inputs, metric, method) > budget_bytes:
        step -= 1
    step = -(-batch // -(-batch // step))  # as many parts, alike in size
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _searched_codes(
    w_BOI: torch.Tensor,
    prepared: Prepared,
    restarts: list[list[Stretch]],
    scheme: Scheme,
    method: Method,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """Codes by GPTQ and refinement, then restarts and tabu search, with a round of refinement after each pass."""
    if method.scale_search:
        scale, zero = searched_scales(w_BOI, prepared.importance, scheme, scale_dtype, method.signed_scales)
    else:
        scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
    held = gptq(w_BOI, prepared, scale, zero, scheme)
    refine(held, prepared.objective, method.refine_rounds)
    for stretches in restarts:
        restart(held, prepared.objective, stretches, method.refine_rounds)
        refine(held, prepared.objective, 1)
    for _ in range(tabu.PASSES if method.tabu_moves else 0):
        tabu.tabu_search(held, prepared.objective, method.tabu_moves)
        refine(held, prepared.objective, 1)
    return held.weight()


def quantize_batch(
    w_BOI: torch.Tensor,
    moment_BII: torch.Tensor | None,
    scheme: Scheme,
    method: Method,
    scale_dtype: torch.dtype,
    metric_BOO: torch.Tensor | None = None,
) -> SiteResult:
    """Quantize fp32 weights [B, O, I].

    A calibrated method needs the second moments of the inputs, `moment_BII`, and can use the cost of output errors,
    `metric_BOO`; both are fp32. `scale_dtype`: the stored dtype of scales.
    """
    raised = diagonal = 0
    if method.needs_statistics:
        assert moment_BII is not None
        prepared = prepare(moment_BII, method.damping, method.activation_order, method.correlation_damping)
        # Both searches work on stretches of whole groups, and a very wide group has no such stretch.
        wide = scheme.width(w_BOI.shape[-1]) > WIDEST_SEARCHED
        method = method.model_copy(update={"restarts": 0, "tabu_moves": 0}) if wide else method
        restarts = prepare_restarts(prepared.objective, scheme.width(w_BOI.shape[-1]), method.restarts)

        def quantize_rows(rows_BRI: torch.Tensor) -> QuantizedWeight:
            return _searched_codes(rows_BRI, prepared, restarts, scheme, method, scale_dtype)

        if metric_BOO is not None and method.output_metric:
            weight = quantize_by_row_blocks(w_BOI, metric_BOO, method.output_blocks, quantize_rows)
        else:
            weight = quantize_rows(w_BOI)
        raised, diagonal = prepared.factor.damping_raised, prepared.factor.diagonal_fallbacks
        if diagonal:  # a moment that is not finite is among them
            finite = torch.isfinite(moment_BII).flatten(1).all(-1)
            moment_BII = torch.where(finite[:, None, None], moment_BII, prepared.objective)
    else:
        scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
        weight = round_to_nearest(w_BOI, scale, zero, scheme)
    errors = relative_output_error(w_BOI, weight, moment_BII)
    return SiteResult(weight, errors, raised, diagonal)
