"""How a run computes: its device, its dtype, its batches, and the working memory of one step."""

from dataclasses import dataclass

import torch

from .errors import InputError


@dataclass(frozen=True)
class Compute:
    """The device, the dtype of rows and dense weights there, and the most tokens that go through a block at once."""

    device: torch.device
    dtype: torch.dtype
    batch_tokens: int

    @property
    def dtype_name(self) -> str:
        """As recipes and records say it: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def checks_first(self) -> bool:
        """Whether all weights are searched for NaN before the work, rather than as they are loaded
        (checkpoint/checked.py)."""
        return self.device.type != "cuda"


def choose_device(name: str) -> torch.device:
    """The torch device for cpu, cuda, cuda:N or auto (a GPU if there is one). Raises InputError for a missing one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"the device {name!r} is not known: cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the device {name!r} is not supported: cpu, cuda or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device that this torch can use: give --device cpu, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for a recipe's `compute_dtype`: auto is float32 on a CPU and bfloat16 on a GPU."""
    if compute_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if compute_dtype == "float32" else torch.bfloat16


def choose_compute(device_name: str, compute_dtype: str, batch_tokens: int) -> Compute:
    """A recipe's `compute_dtype` and `batch_tokens` on the device of this name. Raises InputError for the device."""
    device = choose_device(device_name)
    return Compute(device=device, dtype=choose_dtype(compute_dtype, device), batch_tokens=batch_tokens)


def site_budget(device: torch.device) -> int:
    """Bytes that quantizing one part of a site may take: 256 MB of RAM, or an eighth of the GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return 256_000_000
