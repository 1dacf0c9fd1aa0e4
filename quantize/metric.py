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
from .gptq import prepare

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
    """A [B, P, P] of stacked gate and up, from the second moment of the slopes, fp32, and the down projection, fp32 or
    bf16."""
    inner_BFF = product(product(down_BHF.transpose(1, 2), residual_HH), down_BHF)
    return slopes_BPP * inner_BFF.repeat(1, 2, 2)


def quantize_by_row_blocks(
    w_BOI: torch.Tensor, metric_BOO: torch.Tensor, blocks: int, quantize_rows: Callable[[torch.Tensor], QuantizedWeight]
) -> QuantizedWeight:
    """Minimise tr(A E S E^T) over blocks of rows, the costliest rows first.

    `quantize_rows` minimises tr(E S E^T) for the rows it is given, so rows inside a block count as independent. After
    each block the remaining rows get a new target. With E_b the error of the block and A_rb the metric between it and
    the remaining rows,

        W_r <- W_r + A_rr^-1 A_rb E_b

    GPTQ does the same for columns. Here it is computed through the factor of inv(A).
    """
    each = torch.arange(len(w_BOI), device=w_BOI.device)[:, None]
    prepared = prepare(metric_BOO, METRIC_DAMPING)
    order_BO, upper = prepared.order_BI, prepared.factor.upper
    target = w_BOI[each, order_BO]
    outputs = target.shape[1]
    rows = -(-outputs // blocks)
    parts = []
    for begin in range(0, outputs, rows):
        end = min(begin + rows, outputs)
        parts.append(quantize_rows(target[:, begin:end].contiguous()))
        if end < outputs:
            error = target[:, begin:end] - parts[-1].dequantize(target.dtype)
            corner = upper[:, begin:end, begin:end].transpose(1, 2)
            solved = torch.linalg.solve_triangular(corner, error, upper=False)
            target[:, end:].baddbmm_(upper[:, begin:end, end:].transpose(1, 2), solved, alpha=-1)
    back = torch.argsort(order_BO, dim=-1)

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors, dim=1)[each, back]

    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedWeight(
        joined([part.codes for part in parts]),
        joined([part.scales for part in parts]),
        joined(zeros) if zeros else None,
        parts[0].scheme,
    )
