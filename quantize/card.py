"""The seam between the torch forms of the column and move loops and their Triton kernels: the device decides.

The CPU computes the torch form, which is the definition. A CUDA tensor of fp32 goes to the kernels where Triton is
installed, as it is with torch's CUDA builds on Linux.
"""

import importlib
import os
import shutil
from functools import cache
from types import ModuleType

import torch

from ..core.errors import ResourceError

# Tests send CPU tensors to the kernels, too, in Triton's interpreter.
CPU_TOO = False


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """launch.py, if it computes on this tensor's device and in its dtype; None for the torch form."""
    return _kernels() if (x.is_cuda or CPU_TOO) and x.dtype == torch.float32 else None


def refuse_without_compiler(device: torch.device) -> None:
    """Raises ResourceError where the kernels could not be launched: Triton makes its launcher with a C compiler, when
    the first kernel runs (its runtime/build.py)."""
    if device.type != "cuda" or _kernels() is None or os.environ.get("CC"):
        return
    if not any(map(shutil.which, ("gcc", "clang"))):
        raise ResourceError(
            "Triton needs a C compiler to launch the kernels that quantize on a GPU, and there is none: install gcc "
            "and Python's headers, or name a compiler in CC"
        )


@cache
def _kernels() -> ModuleType | None:
    """Imported on demand: Triton is not there on every machine, and loading it takes a second."""
    try:
        return importlib.import_module(".launch", __package__)
    except ModuleNotFoundError:
        return None
