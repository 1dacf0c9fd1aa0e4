"""The output metric A of tr(A E S E^T): what errors of a matrix's outputs cost; and quantization under it.

With S alone every output counts equally, and the rows of a weight are independent. An output metric couples them: later
rows compensate for what the rounding of earlier rows did to outputs that matter. (Two-sided objectives: Tseng et al.,
Model-Preserving Adaptive Rounding, arXiv 2505.22988.) Let M be the Fisher metric of the residual stream at the block's
end (calibration/sensitivity.py):

- Outputs that are added to the residual stream there: A = M.
- Gate and up: an error (dg, du) of one token moves the residual stream by W_down (t dg + s du), with s = silu(g) and
  t = u silu'(g). Over an expert's tokens A = E[v v^T] * tile(W_down^T M W_down), v = (t, s), * elementwise.

Shape legend: B experts, O outputs, I inputs, F intermediate, P = 2 F, H hidden, R rows of tokens.
"""

from collections.abc import Callable

import torch

from ..core.products import product
from ..core.quantized_weight import QuantizedWeight
from .gptq import column_order, factor

# Damping, as a share of the mean diagonal. The metric averages over tokens: an error that it calls free still costs
# some tokens.
METRIC_DAMPING = 0.03


def swiglu_slopes(x_RI: torch.Tensor, gate_up_PI: torch.Tensor) -> torch.Tensor:
    """v = (t, s) fp32 [R, 2F]: the derivatives of silu(gate) * up by gate and by up, at these rows. Rows and weights
    are fp32 or bf16."""
    gate, up = product(x_RI, gate_up_PI.T).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    return torch.cat([up * s * (1 + gate * (1 - s)), gate * s], dim=-1)


def swiglu_metric(slopes_BPP: torch.Tensor, down_BHF: torch.Tensor, residual_HH: torch.Tensor) -> torch.Tensor:
    """A [B, P, P] of stacked gate and up, from the second moment of the slopes, fp32, which is lost, and the down
    projection, fp32 or bf16."""
    inner_BFF = product(product(down_BHF.transpose(1, 2), residual_HH), down_BHF)
    half = inner_BFF.shape[-1]
    return (
        slopes_BPP.unflatten(2, (2, half)).unflatten(1, (2, half)).mul_(inner_BFF[:, None, :, None]).view_as(slopes_BPP)
    )


def quantize_by_row_blocks(
    w_BOI: torch.Tensor, metric_BOO: torch.Tensor, blocks: int, quantize_rows: Callable[[torch.Tensor], QuantizedWeight]
) -> QuantizedWeight:
    """Minimise tr(A E S E^T) over blocks of rows, the costliest rows first.

    `quantize_rows` minimises tr(E S E^T) for the rows it is given, so rows inside a block count as independent. The
    target of a block makes good what the rows before it left. With A_rr the metric of the block and of all rows to
    come, and A_rb the metric between them and the rows b before,

        T_r = W_r + A_rr^-1 A_rb E_b,     E_b = W_b - Q_b

    GPTQ does the same for columns. As there, it takes no inverse: with A = R R^T, R upper triangular, the block's own
    rows of T are W_c + R_cc^-T R_bc^T E_b.
    """
    each = torch.arange(len(w_BOI), device=w_BOI.device)[:, None]
    # One metric for all matrices is factored once.
    metrics = metric_BOO[:1] if metric_BOO.stride(0) == 0 else metric_BOO
    orders = column_order(metrics)
    root = factor(metrics, METRIC_DAMPING, orders).root.expand_as(metric_BOO)
    order_BO = orders.expand(len(w_BOI), -1)
    outputs = w_BOI.shape[1]
    rows = -(-outputs // blocks)
    error_BOI = torch.empty_like(w_BOI)  # in the order of rounding
    found: QuantizedWeight | None = None
    for begin in range(0, outputs, rows):
        block = slice(begin, min(begin + rows, outputs))
        places = order_BO[:, block]
        own = w_BOI[each, places]
        target = own
        if begin:
            due = product(root[:, :begin, block].transpose(1, 2), error_BOI[:, :begin])
            target = own + torch.linalg.solve_triangular(root[:, block, block].transpose(1, 2), due, upper=False)
        part = quantize_rows(target)
        error_BOI[:, block] = own - part.dequantize(own.dtype)
        found = _like(part, outputs) if found is None else found
        for whole, rows_of in zip(_tensors(found), _tensors(part), strict=True):
            whole[each, places] = rows_of
    assert found is not None
    return found


def _like(part: QuantizedWeight, outputs: int) -> QuantizedWeight:
    """Room for a weight with that many outputs."""

    def room(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(len(x), outputs, x.shape[2])

    zeros = part.zero_points
    return QuantizedWeight(room(part.codes), room(part.scales), None if zeros is None else room(zeros), part.scheme)


def _tensors(weight: QuantizedWeight) -> list[torch.Tensor]:
    return [x for x in (weight.codes, weight.scales, weight.zero_points) if x is not None]
