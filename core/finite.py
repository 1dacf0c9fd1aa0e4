"""Numbers that are not finite: found by one reduction, and told as the fault of one model at one place.

A walk stops at the first hidden row, logit or moment that is NaN or infinite. What comes after it would be NaN too, and
NaN looks like agreement: the likeliest token of two rows of NaN is the same.
"""

import torch

from .errors import NonfiniteError, OnecardError, UnusableModelError


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether every number of the tensors, all on one device, is finite: a pass over each, and one synchronisation on a
    GPU. A tensor on the meta device has no numbers."""
    return all_true([flag for tensor in tensors for flag in finite_flags(tensor)])


def finite_flags(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Scalars on the tensor's device that are all True if every number is finite; nothing waits for them."""
    if not tensor.numel() or tensor.is_meta:
        return []
    return [torch.isfinite(end) for end in torch.aminmax(tensor.detach())]


def row_flags(rows: torch.Tensor) -> list[torch.Tensor]:
    """As `finite_flags`, for rows [..., H] that a norm reads next: the sum of a row's squares must be finite, too. A
    norm makes zeros of the row where it is not."""
    if not rows.numel() or rows.is_meta:
        return []
    peak = _peak(rows)
    return [torch.isfinite(peak * peak * rows.shape[-1])]


def score_flags(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """As `finite_flags`, for the inputs [..., D] of an attention: its scores must be finite, too, whatever the order of
    their sums. Some kernels of torch make finite numbers of scores that are NaN."""
    if q.is_meta:
        return []
    return [torch.isfinite(_peak(q) * _peak(k) * q.shape[-1]), *finite_flags(v)]


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, an fp32 scalar; NaN if there is one."""
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low, high).float()


def all_true(flags: list[torch.Tensor]) -> bool:
    """One synchronisation on a GPU, for all flags."""
    return not flags or bool(torch.stack(flags).all())


def count_nonfinite(tensor: torch.Tensor) -> str:
    """How many of the numbers are not finite, for a message."""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    if not nan + inf:
        return "numbers whose products float32 cannot hold"
    return f"{nan:,} NaN and {inf:,} Inf among {tensor.numel():,} numbers"


def nonfinite_error(original: bool, where: str) -> OnecardError:
    """The error that ends a computation. `where`: what is not finite, and in which block, half and expert.

    The original's own numbers make it unusable as input. Those of a quantized model are a result, and a bad one.
    """
    if original:
        return UnusableModelError(
            f"the original model's own numbers are not finite: {where}. It cannot be measured or quantized. Its "
            "weights are damaged, or of another model than its config.json says: fetch it again"
        )
    return NonfiniteError(
        f"the quantized model's numbers are not finite: {where}. A finished checkpoint is damaged there, or was made "
        "so: `onecard check` reads every value. In a run, keep what is named as it is (keep_modules) or choose another "
        "method, and start anew with --overwrite"
    )


def check_finite(original: bool, where: str, *tensors: torch.Tensor) -> None:
    """Raises what `nonfinite_error` gives unless all numbers are finite."""
    if not all_finite(*tensors):
        raise nonfinite_error(original, where)


def first_nonfinite(*stacks: torch.Tensor) -> int | None:
    """The first entry along axis 0 that is not finite in one of the stacks, which all have as many entries; None if all
    are finite. Entries are looked at one by one only where some number is not."""
    if all_finite(*stacks):
        return None
    return next((n for n in range(len(stacks[0])) if not all_finite(*(stack[n] for stack in stacks))), None)
