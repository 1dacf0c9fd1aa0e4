"""The reference correction: aim the weights at the reference stream before they are rounded.

A quantized model's block reads x, which earlier blocks have moved away from what the original model's block reads.
With t the output that is wanted of a matrix and W x what it gives, the least-squares weights, with a ridge r that
keeps them near W, are

    W' = argmin E|W' x - t|^2 + r |W' - W|^2 = W + M (S + r I)^-1,     M = E[(t - W x) x^T],  S = E[x x^T]

Two targets are used:

- inner matrices (q, k, v, gate, up): the output of the original model, t = W x_ref, so M = W E[(x_ref - x) x^T]
  (GPTAQ, Li et al., arXiv 2504.02692, gives this asymmetric objective; here it is solved before GPTQ, not inside it);
- matrices whose output is added to the residual stream (down projections): the block's whole output, so M =
  E[(h_ref - h) x^T] with h the hidden rows that leave the block. They make up, as far as a linear map of x can, for
  everything that went before them: earlier blocks, this block's attention and gate and up projections.

The ridge of an expert is `strength * inputs / rows`: M is estimated from its rows, and the fewer they are for each
direction, the more of M is noise.

Shape legend: B experts, O outputs, I inputs.
"""

import torch


def corrected(
    w_BOI: torch.Tensor, moment_BII: torch.Tensor, miss_BOI: torch.Tensor, ridge_B: torch.Tensor
) -> torch.Tensor:
    """W' [B, O, I] from S and M; `ridge_B` is relative to each S's mean diagonal. Where the solve fails: W."""
    mean = moment_BII.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(moment_BII.shape[-1], device=w_BOI.device, dtype=w_BOI.dtype)
    lower, info = torch.linalg.cholesky_ex(moment_BII + (ridge_B * mean)[:, None, None] * eye)
    # M (S + r I)^-1: solve from the right through the transposed system.
    step = torch.cholesky_solve(miss_BOI.transpose(1, 2), lower).transpose(1, 2)
    good = (info == 0) & torch.isfinite(step).flatten(1).all(-1)
    return torch.where(good[:, None, None], w_BOI + step, w_BOI)
