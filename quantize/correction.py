"""The reference correction: fit the weights to the reference stream's outputs before they are rounded.

In the quantized model a matrix reads x, which earlier blocks have moved away from what it reads in the original model.
Let t be its wanted output and W x its output. The least-squares weights, with a ridge r that keeps them near W, are

    W' = argmin E|W' x - t|^2 + r |W' - W|^2 = W + M (S + r I)^-1,     M = E[(t - W x) x^T],  S = E[x x^T]

Two targets are used:

- Inner matrices (q, k, v, gate, up): the output in the original model, t = W x_ref. Then M = W D with
  D = E[(x_ref - x) x^T], and W' = W + W (D (S + r I)^-1): the solve is one of I rows, not of O.
  GPTAQ (Li et al., arXiv 2504.02692) has this asymmetric objective; here it is solved before GPTQ, not inside it.
- Matrices whose output is added to the residual stream (o and the downs): the output of the whole half, so
  M = E[(h_ref - h) x^T], where h are the hidden rows that leave the half. As far as a linear map of x can, they
  correct all earlier errors: those of earlier blocks, and of this half's other matrices. x is what multiplies W there:
  a routing weight that multiplies the expert's output is part of it.

Where a token meets k experts, each would make good the whole miss. So each takes a k-th of its step: the loss is convex
in all steps together, and a mean of points that are each no worse than W is no worse than W.

The ridge of an expert is `strength * inputs / rows`. M is estimated from the expert's rows; the fewer rows there are
per input dimension, the more of M is noise.

Shape legend: B experts, O outputs, I inputs.
"""

import torch

from ..core.products import product, solved_from_right


def corrected(
    w_BOI: torch.Tensor, moment_BII: torch.Tensor, miss_BOI: torch.Tensor, ridge_B: torch.Tensor, at_once: int = 1
) -> torch.Tensor:
    """W' [B, O, I] from the moment S and the miss M. `ridge_B` is relative to the mean diagonal of each S. `at_once`:
    how many of the matrices each token meets. A matrix whose solve fails keeps W."""
    step_BOI, good_B = _solved(moment_BII, miss_BOI, ridge_B)
    return torch.where(good_B[:, None, None], w_BOI + step_BOI / at_once, w_BOI)


def corrected_for_inputs(
    w_BOI: torch.Tensor, moment_BII: torch.Tensor, shift_BII: torch.Tensor, ridge_B: torch.Tensor
) -> torch.Tensor:
    """As `corrected` for the miss W D of an inner matrix, from D, `shift_BII`."""
    step_BII, good_B = _solved(moment_BII, shift_BII, ridge_B)
    return torch.where(good_B[:, None, None], w_BOI + product(w_BOI, step_BII), w_BOI)


def _solved(
    moment_BII: torch.Tensor, right_BNI: torch.Tensor, ridge_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(right (S + r I)^-1, whether that could be solved [B])."""
    mean = moment_BII.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    ridged_BII = moment_BII.clone()
    ridged_BII.diagonal(dim1=-2, dim2=-1).add_((ridge_B * mean)[:, None])
    lower, info = torch.linalg.cholesky_ex(ridged_BII)
    each = [solved_from_right(right_NI, lower_II) for right_NI, lower_II in zip(right_BNI, lower, strict=True)]
    step = torch.stack(each)
    return step, (info == 0) & torch.isfinite(step).flatten(1).all(-1)
