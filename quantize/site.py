"""One site through one method: (weights, second moments, scheme) -> codes, with the error it leaves.

The batch of experts is cut so that working copies stay within a budget of memory; cutting changes no code.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.method import Method
from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from . import tabu
from .gptq import BLOCK_COLUMNS, Prepared, gptq, prepare
from .grid import absmax_scales, round_to_nearest, searched_scales
from .metric import quantize_by_row_blocks
from .refine import refine
from .restarts import PASSES, Stretch, prepare_restarts, restarted

# What a move of a code costs in time, for each weight of its stretch, beside matrix products: measured on one CPU core.
MOVE_FLOPS = 700.0
# Groups wider than this get no restarts and no tabu search: a stretch of whole groups would be most of the row.
WIDEST_SEARCHED = 512


@dataclass(frozen=True)
class SiteResult:
    """Codes for a batch of equal matrices, and per matrix the relative output error tr(EHE^T) / tr(WHW^T)."""

    weight: QuantizedWeight
    output_error: list[float]
    damping_raised: int
    diagonal_fallbacks: int


def relative_output_error(w_BOI: torch.Tensor, q_BOI: torch.Tensor, moment_BII: torch.Tensor | None) -> list[float]:
    """Expected squared error of the output over its expected square; with no moment, inputs are taken as white."""

    def energy(x_BOI: torch.Tensor) -> torch.Tensor:
        y = x_BOI if moment_BII is None else torch.bmm(x_BOI, moment_BII)
        return (y * x_BOI).sum((1, 2))

    return (energy(w_BOI - q_BOI) / energy(w_BOI).clamp_min(1e-30)).tolist()


def working_bytes(outputs: int, inputs: int, metric: bool, method: Method) -> int:
    """What quantizing one matrix holds: about five fp32 weights and four moments, four output metrics if used, for each
    restart the factors of every stretch and eight times a stretch of the rows that are quantized at once, and in a
    tabu search thirteen times that stretch and of each move three numbers a row."""
    rows = -(-outputs // method.output_blocks) if metric and method.output_blocks else outputs
    stretch = min(inputs, BLOCK_COLUMNS)
    restarts = method.restarts * stretch * (PASSES * 3 * inputs + 8 * rows)
    search = rows * (13 * stretch + 3 * method.tabu_moves) * (method.tabu_moves > 0)
    return 4 * (5 * outputs * inputs + 4 * inputs * inputs + 4 * outputs * outputs * metric + max(restarts, search))


def matrix_flops(outputs: int, inputs: int, metric: bool, method: Method) -> float:
    """2 x outputs x inputs^2 for the column updates and as much for each round of refinement, 3 x inputs^3 for the
    factors; with an output metric outputs^2 x inputs and 3 x outputs^3; each pass of restarts twice the column updates
    for what a stretch changes elsewhere, and every try its stretch's own updates and factors; each pass of a tabu
    search the column updates as well, and every move the time of some 700 flops a weight: it waits for memory."""
    sweeps, stretch = 1 + method.refine_rounds, min(inputs, BLOCK_COLUMNS)
    flops = 2.0 * sweeps * outputs * inputs**2 + 3.0 * inputs**3 + metric * (outputs**2 * inputs + 3.0 * outputs**3)
    tries = method.restarts * (2.0 * sweeps * outputs * inputs * stretch + 3.0 * inputs * stretch**2)
    updates = 4.0 * outputs * inputs**2
    flops += PASSES * (tries + updates * (method.restarts > 0))
    return flops + tabu.PASSES * (updates + MOVE_FLOPS * method.tabu_moves * outputs * inputs) * (method.tabu_moves > 0)


def cuts(
    batch: int, outputs: int, inputs: int, budget_bytes: int, method: Method, metric: bool = False
) -> Iterator[slice]:
    """Slices of the batch whose working set fits the budget."""
    step = max(1, budget_bytes // working_bytes(outputs, inputs, metric, method))
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _codes(
    w_BOI: torch.Tensor,
    prepared: Prepared,
    restarts: list[list[Stretch]],
    scheme: Scheme,
    method: Method,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """GPTQ, refinement, then restarts and a tabu search, with a round of refinement after each pass."""
    if method.scale_search:
        scale, zero = searched_scales(w_BOI, prepared.importance, scheme, scale_dtype, method.signed_scales)
    else:
        scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
    weight = gptq(w_BOI, prepared, scale, zero, scheme)
    if method.refine_rounds:
        weight = refine(weight, w_BOI, prepared.objective, method.refine_rounds)
    for stretches in restarts:
        weight = restarted(weight, w_BOI, prepared.objective, stretches, method.refine_rounds)
        weight = refine(weight, w_BOI, prepared.objective, 1)
    for _ in range(tabu.PASSES if method.tabu_moves else 0):
        weight = tabu.tabu_searched(weight, w_BOI, prepared.objective, method.tabu_moves)
        weight = refine(weight, w_BOI, prepared.objective, 1)
    return weight


def quantize_batch(
    w_BOI: torch.Tensor,
    moment_BII: torch.Tensor | None,
    scheme: Scheme,
    method: Method,
    scale_dtype: torch.dtype,
    metric_BOO: torch.Tensor | None = None,
) -> SiteResult:
    """Quantize fp32 weights [B, O, I]. gptq needs the inputs' second moments, `moment_BII`, and takes what errors of
    the outputs cost, `metric_BOO`; both fp32."""
    raised = diagonal = 0
    if method.needs_statistics:
        assert moment_BII is not None
        prepared = prepare(moment_BII, method.damping, method.activation_order)
        # Both searches go over stretches of whole groups: one as wide as a row has none.
        wide = scheme.width(w_BOI.shape[-1]) > WIDEST_SEARCHED
        method = method.model_copy(update={"restarts": 0, "tabu_moves": 0}) if wide else method
        restarts = prepare_restarts(prepared.objective, scheme.width(w_BOI.shape[-1]), method.restarts)

        def quantize_rows(rows_BRI: torch.Tensor) -> QuantizedWeight:
            return _codes(rows_BRI, prepared, restarts, scheme, method, scale_dtype)

        if metric_BOO is not None and method.output_metric:
            weight = quantize_by_row_blocks(w_BOI, metric_BOO, method.output_blocks, quantize_rows)
        else:
            weight = quantize_rows(w_BOI)
        raised, diagonal = prepared.factor.damping_raised, prepared.factor.diagonal_fallbacks
        finite = torch.isfinite(moment_BII).flatten(1).all(-1)
        moment_BII = torch.where(finite[:, None, None], moment_BII, prepared.objective)
    else:
        scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
        weight = round_to_nearest(w_BOI, scale, zero, scheme)
    errors = relative_output_error(w_BOI, weight.dequantize(w_BOI.dtype), moment_BII)
    return SiteResult(weight, errors, raised, diagonal)
