"""The seam between the torch forms of the column and move loops and their Triton kernels: the device decides.

The CPU computes the torch form, which is the definition. A CUDA tensor of fp32 goes to the kernels where Triton is
installed, as it is with torch's CUDA builds on Linux.
"""

import importlib
from functools import cache
from types import ModuleType

import torch

# Tests send CPU tensors to the kernels, too, in Triton's interpreter.
CPU_TOO = False


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """launch.py, if it computes on this tensor's device and in its dtype; None for the torch form."""
    return _kernels() if (x.is_cuda or CPU_TOO) and x.dtype == torch.float32 else None


@cache
def _kernels() -> ModuleType | None:
    """Imported on demand: Triton is not there on every machine, and loading it takes a second."""
    try:
        return importlib.import_module(".launch", __package__)
    except ModuleNotFoundError:
        return None
