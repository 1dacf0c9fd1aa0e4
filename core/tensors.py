"""TensorSource: a checkpoint as names, shapes, dtypes and slices; only what a caller asks for is read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

# safetensors' names of the dtypes that language models use for weights and scales.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,  # powers of two: scales only
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

CPU = torch.device("cpu")

# An index as between Python's brackets: integers and slices only.
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and dtype, known before it is read. `dtype` is the safetensors name, e.g. 'BF16'."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


# Gives a fresh uint8 tensor of so many bytes on the CPU.
Allocate = Callable[[int], torch.Tensor]


def pageable(nbytes: int) -> torch.Tensor:
    """Ordinary memory. The Allocate that is used unless another is given."""
    return torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True)
class Stored:
    """What was read of one tensor: its parts on the CPU as the files hold them, and how they become the tensor."""

    parts: Mapping[str, torch.Tensor]
    make: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    # Whether `make` computes wherever the parts are; otherwise on the CPU only.
    anywhere: bool = True

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on `device`. The bytes go there as they are stored, and are unpacked there if the format can.

        Parts in pinned memory are copied behind the caller's back: torch keeps the memory until the copy is done."""
        if not self.anywhere:
            return self.make(self.parts).to(device)
        return self.make({role: part.to(device, non_blocking=True) for role, part in self.parts.items()})


class TensorSource(Protocol):
    """Anything that gives named tensors. Reads are fresh copies on the CPU, never views of a file."""

    @property
    def names(self) -> Collection[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        """The tensor `name`, or the part that `index` selects; only that part is read."""
        ...

    def stored(self, name: str, index: Index = (), allocate: Allocate = pageable) -> Stored:
        """The same, not yet unpacked, in memory that `allocate` gives. May be called in several threads at once."""
        ...
