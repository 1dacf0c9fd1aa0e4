"""The reference correction: fit the weights to the reference stream's outputs before they are rounded.

In the quantized model a matrix reads x, which earlier blocks have moved away from what it reads in the original model.
Let t be its wanted output and W x its output. The least-squares weights, with a ridge r that keeps them near W, are

    W' = argmin E|W' x - t|^2 + r |W' - W|^2 = W + M (S + r I)^-1,     M = E[(t - W x) x^T],  S = E[x x^T]

Two targets are used:

- Inner matrices (q, k, v, gate, up): the output in the original model, t = W x_ref, so M = W E[(x_ref - x) x^T].
  GPTAQ (Li et al., arXiv 2504.02692) has this asymmetric objective; here it is solved before GPTQ, not inside it.
- Matrices whose output is added to the residual stream (down projections): the output of the whole block, so
  M = E[(h_ref - h) x^T], where h are the hidden rows that leave the block. As far as a linear map of x can, they
  correct all earlier errors: those of earlier blocks, and of this block's attention, gate and up projections.

The ridge of an expert is `strength * inputs / rows`. M is estimated from the expert's rows; the fewer rows there are
per input dimension, the more of M is noise.

Shape legend: B experts, O outputs, I inputs.
"""

import torch


def corrected(
    w_BOI: torch.Tensor, moment_BII: torch.Tensor, miss_BOI: torch.Tensor, ridge_B: torch.Tensor
) -> torch.Tensor:
    """W' [B, O, I] from the moment S and the miss M. `ridge_B` is relative to the mean diagonal of each S. A matrix
    whose solve fails keeps W."""
    mean = moment_BII.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(moment_BII.shape[-1], device=w_BOI.device, dtype=w_BOI.dtype)
    lower, info = torch.linalg.cholesky_ex(moment_BII + (ridge_B * mean)[:, None, None] * eye)
    # M (S + r I)^-1 by solving the transposed system.
    step = torch.cholesky_solve(miss_BOI.transpose(1, 2), lower).transpose(1, 2)
    good = (info == 0) & torch.isfinite(step).flatten(1).all(-1)
    return torch.where(good[:, None, None], w_BOI + step, w_BOI)
