"""Tensors without values that say that they lie on a card.

A Pretended wraps a tensor on the meta device and claims to be on 'cuda' or on the CPU. Small ones may wrap a CPU tensor
with values, where the code asks for some: counts of rows. A few facts about values are known without them (`truth`):
what isfinite gives is true, and two numbers that are compared differ. So masks choose all rows, or none.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .ledger import Ledger

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Pretended(torch.Tensor):
    """`inner`: a tensor of the same shape. `said`: the device that it claims."""

    inner: torch.Tensor
    said: torch.device
    truth: bool | None
    pinned: bool
    ledger: Ledger
    # What counts an operation, while a model is being counted: a thread of the project's own has no mode.
    counting: ClassVar[Callable[..., Any] | None] = None

    @staticmethod
    def __new__(cls, inner: torch.Tensor, said: torch.device, ledger: Ledger, pinned: bool = False) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=False,
        )
        made.inner, made.said, made.truth, made.pinned, made.ledger = inner, said, None, pinned, ledger
        if said.type == "cuda":
            storage = inner.untyped_storage()
            ledger.hold(storage._cdata, storage.nbytes())
            weakref.finalize(made, ledger.release, storage._cdata)
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.said

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.said.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.said.type == "cpu"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def is_pinned(self, *_: Any) -> bool:
        return self.pinned

    def record_stream(self, _: Any) -> None: ...

    def get_device(self) -> int:
        return 0 if self.is_cuda else -1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretended":
        copied = self.detach().clone()
        if getattr(self, "_is_param", False):
            copied._is_param = True
        copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied  # type: ignore[return-value]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.said})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert cls.counting is not None, f"{func} outside the counting mode"
        return cls.counting(func, types, args, kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a kernel touches: an expanded axis counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 else 1
    return count * tensor.element_size()


def parts(value: Any) -> list[Any]:
    """What lies in a call's arguments or result: in tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        return [part for each in value for part in parts(each)]
    if isinstance(value, dict):
        return [part for each in value.values() for part in parts(each)]
    return [value]


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [part for part in parts(value) if isinstance(part, torch.Tensor)]


def changed(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """With each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        made = [changed(each, change) for each in value]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, dict):
        return {key: changed(each, change) for key, each in value.items()}
    return value
