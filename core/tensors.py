"""TensorSource: a checkpoint as names, shapes, dtypes and slices; only what a caller asks for is read."""

from collections.abc import Collection
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


class TensorSource(Protocol):
    """Anything that gives named tensors. Reads are fresh copies on the CPU, never views of a file."""

    @property
    def names(self) -> Collection[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        """The tensor `name`, or the part that `index` selects; only that part is read."""
        ...
