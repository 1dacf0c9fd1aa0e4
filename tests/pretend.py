"""A device that is not there: tensors that pretend to lie on it, and what mixes them with others.

Values are computed on the CPU. What comes of a pretending tensor pretends, too, and so does what is made with a
`device`. On a GPU an operation that takes tensors of both kinds raises; only a number (0 axes) may come from the CPU.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from onecard.core.tensors import Stored


class Pretend(TorchFunctionMode):
    """While it is active, `mixed` gets the operations that would have raised."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.there = list(tensors.values())  # kept, so that no id is given twice
        self.mixed: list[str] = []

    def is_there(self, tensor: torch.Tensor) -> bool:
        return any(tensor is known for known in self.there)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [self.is_there(x) for x in given]
        if any(there) and any(x.ndim for x, known in zip(given, there, strict=True) if not known):
            self.mixed.append(getattr(func, "__name__", str(func)))
        if any(there) or "device" in kwargs:
            self.there += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def unpack_on_a_pretended_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, every tensor that a source unpacks wherever its parts are is unpacked so."""

    def on(stored: Stored, device: torch.device) -> torch.Tensor:
        if not stored.anywhere:
            return stored.make(stored.parts)
        with Pretend(stored.parts) as pretend:
            out = stored.make(stored.parts)
        assert pretend.mixed == []
        assert pretend.is_there(out)
        return out

    monkeypatch.setattr(Stored, "on", on)
