"""Scan: every weight is looked at as it is read, where no pass over the checkpoint has done so before.

A pass that reads 217 GB to look for NaN takes minutes on a machine that quantizes them in ten. What is read is on the
device anyway: a look costs one reduction there.
"""

from collections.abc import Iterable

import torch

from ..core.finite import nonfinite_error


class Scan:
    """What the weights that were read show. `zeros`: the canonical matrices that are all zeros, with those that are
    known."""

    def __init__(self, zeros: Iterable[str] = ()) -> None:
        self.zeros = set(zeros)
        self._ends: dict[str, torch.Tensor] = {}

    def look(self, name: str, weight: torch.Tensor) -> None:
        """Takes the smallest and the largest value; nothing waits for them."""
        low, high = torch.aminmax(weight.detach())
        self._ends[name] = torch.stack([low, high, torch.full_like(low, weight.ndim > 1)])

    def refuse_nonfinite(self, original: bool) -> None:
        """Judges what was looked at since the last time, with one synchronisation. Raises UnusableModelError or
        NonfiniteError for a weight that is not finite."""
        names, self._ends, ends = list(self._ends), {}, list(self._ends.values())
        if not names:
            return
        found = torch.stack([end.double() for end in ends]).cpu()
        finite = torch.isfinite(found).all(1).tolist()
        if not all(finite):
            raise nonfinite_error(original, f"the weight {names[finite.index(False)]}")
        zero = (found[:, :2] == 0).all(1) & (found[:, 2] == 1)
        self.zeros.update(name for name, is_zero in zip(names, zero.tolist(), strict=True) if is_zero)
