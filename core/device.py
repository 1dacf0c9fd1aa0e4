"""How a run computes: its device, its dtype, its batches, and the working memory of one step.

A run on a GPU gives the same bytes each time. torch promises that for one card and one version, once it is told so
before its first work there: `_prepare_cuda`.
"""

import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import InputError

# cuBLAS reads it when its first handle is made. Both values make it deterministic (NVIDIA, cuBLAS, section 2.1.4); the
# first is the size that torch takes on a Hopper card anyway.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
# Tests send CPU tensors the GPU's way, too (`on_cuda`).
CUDA_WAY_TOO = False


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
    """The torch device for cpu, cuda, cuda:N or auto (a GPU if there is one). A GPU is made the present one, whose
    number the device names, and works deterministically from here on. Raises InputError for a missing one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"the device {name!r} is not known: cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the device {name!r} is not supported: cpu, cuda or auto")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device that this torch can use: give --device cpu, or install a CUDA build")
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return _prepare_cuda(device)


def on_cuda(x: torch.Tensor) -> bool:
    """Whether what is only for a GPU is done with this tensor. A CPU's way is the reference."""
    return x.is_cuda or CUDA_WAY_TOO


def _prepare_cuda(device: torch.device) -> torch.device:
    """Everything that torch must be told before its first work on a GPU. Raises InputError where it is too late.

    An operation without a deterministic form raises from here on; tests/test_deterministic.py holds that none is used.
    """
    chosen = os.environ.get(CUBLAS_WORKSPACE)
    if chosen is None and torch.cuda.is_initialized():
        raise InputError(
            f"this process used CUDA before {CUBLAS_WORKSPACE} was set, and its bytes would differ from run to run: "
            f"set it to {DETERMINISTIC_WORKSPACES[0]} before Python starts"
        )
    if chosen not in (None, *DETERMINISTIC_WORKSPACES):
        raise InputError(
            f"{CUBLAS_WORKSPACE} is {chosen!r}, with which cuBLAS gives other bytes in each run: unset it, or set it "
            f"to {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )
    os.environ[CUBLAS_WORKSPACE] = chosen or DETERMINISTIC_WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written, so it need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # fp32 means fp32. Where bf16 products with fp32 sums are exact enough, core/products.py takes them by name.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Triton launches on the present device, whatever its tensors' is.
    torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


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
    """Bytes that quantizing one part of a site may take: 256 MB of RAM, or three tenths of a GPU's memory.

    It follows from the card alone, never from what is free at the time, so that a resumed run cuts alike. On 80 GB it
    is 25 GB: all of Scout's experts go together, beside both versions of a block (9 GB) and the statistics of a turn,
    at most 21 GB with slopes.
    """
    if device.type == "cuda":
        return card_site_budget(torch.cuda.get_device_properties(device).total_memory)
    return 256_000_000


def card_site_budget(card_bytes: int) -> int:
    """`site_budget` of a card with so much memory."""
    return card_bytes * 3 // 10


def card_identity(device: torch.device) -> dict[str, str]:
    """Everything about a GPU that the bytes of a run depend on, beside torch's version; nothing for a CPU.

    A site is cut by the card's memory, and libraries choose their kernels by shape, by card and by version. Triton
    compiles for the card, with its own assembler.
    """
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "card": f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory} bytes",
        "CUDA": str(torch.version.cuda),
        "NVIDIA driver": _driver(),
        "version of triton": triton,
    }


def _driver() -> str:
    """The driver's version, as Linux says it; elsewhere the newest CUDA that it knows."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found[0] if found else said.strip()
