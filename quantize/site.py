"""One site through one method: (weights, second moments, scheme) -> codes, with the error it leaves.

The batch of experts is cut so that working copies stay within a budget of memory; cutting changes no code.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.scheme import QuantizedWeight, Scheme
from .gptq import Prepared, gptq, prepare, zero_int
from .grid import absmax_scales, round_to_nearest, searched_scales
from .refine import refine


@dataclass(frozen=True)
class Method:
    """How codes are found. `name` is 'rtn' (no statistics needed) or 'gptq'."""

    name: str
    scale_search: bool = True
    damping: float = 0.01
    activation_order: bool = True
    refine_rounds: int = 0
    scale_trials: tuple[float, ...] = (1.0,)

    @property
    def needs_statistics(self) -> bool:
        return self.name == "gptq"


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


def cuts(batch: int, outputs: int, inputs: int, budget_bytes: int) -> Iterator[slice]:
    """Slices of the batch whose working set (about five fp32 weights and four moments) fits the budget."""
    one = 4 * (5 * outputs * inputs + 4 * inputs * inputs)
    step = max(1, budget_bytes // one)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _best_of(
    w_BOI: torch.Tensor,
    prepared: Prepared,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    method: Method,
) -> QuantizedWeight:
    """GPTQ and refinement once for each multiple of the scales; every row keeps the trial that leaves it least error.

    Rows are independent under the objective, and the search by the diagonal alone does not know how well GPTQ will make
    up for a scale: the objective itself decides between a few.
    """
    objective = prepared.objective
    best: QuantizedWeight | None = None
    least_BO = torch.empty(0)
    for multiple in method.scale_trials:
        tried = (scale.float() * multiple).to(scale.dtype)
        weight = gptq(w_BOI, prepared, tried, zero, scheme)
        if method.refine_rounds:
            weight = refine(weight, w_BOI, objective, method.refine_rounds)
        if len(method.scale_trials) == 1:
            return weight
        e_BOI = w_BOI - weight.dequantize(w_BOI.dtype)
        error_BO = (torch.bmm(e_BOI, objective) * e_BOI).sum(-1)
        if best is None:
            best, least_BO = weight, error_BO
            continue
        better = (error_BO < least_BO).unsqueeze(-1)
        least_BO = torch.minimum(error_BO, least_BO)
        codes = torch.where(better, weight.codes, best.codes)
        best = QuantizedWeight(codes, torch.where(better, weight.scales, best.scales), zero_int(zero), scheme)
    assert best is not None
    return best


def quantize_batch(
    w_BOI: torch.Tensor,
    moment_BII: torch.Tensor | None,
    scheme: Scheme,
    method: Method,
    scale_dtype: torch.dtype,
) -> SiteResult:
    """Quantize fp32 weights [B, O, I]; `moment_BII` fp32 is needed by gptq and by the scale search's weighting."""
    raised = diagonal = 0
    if method.needs_statistics:
        assert moment_BII is not None
        prepared = prepare(moment_BII, method.damping, method.activation_order)
        if method.scale_search:
            # Of the damped moment: an input that was never seen still must not lose its weight.
            importance = prepared.objective.diagonal(dim1=-2, dim2=-1)
            scale, zero = searched_scales(w_BOI, importance, scheme, scale_dtype)
        else:
            scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
        weight = _best_of(w_BOI, prepared, scale, zero, scheme, method)
        raised, diagonal = prepared.factor.damping_raised, prepared.factor.diagonal_fallbacks
        finite = torch.isfinite(moment_BII).flatten(1).all(-1)
        moment_BII = torch.where(finite[:, None, None], moment_BII, prepared.objective)
    else:
        scale, zero = absmax_scales(w_BOI, scheme, scale_dtype)
        weight = round_to_nearest(w_BOI, scale, zero, scheme)
    errors = relative_output_error(w_BOI, weight.dequantize(w_BOI.dtype), moment_BII)
    return SiteResult(weight, errors, raised, diagonal)
