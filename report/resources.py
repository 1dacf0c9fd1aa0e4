"""Reports a process's peak memory, its peak device memory, its package versions and its machine."""

import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "compressed-tensors",
    "bitsandbytes",
    "tokenizers",
    "datasets",
    "numpy",
)


def peak_rss_bytes() -> int:
    """Peak resident set size of this process so far, in bytes."""
    # On Linux, ru_maxrss of a started program includes its parent's peak. VmHWM starts anew with the program.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int:
    """Peak bytes that torch's allocator handed out of the present card, which core/device.py sets; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated(torch.cuda.current_device()) if torch.cuda.is_initialized() else 0


def device_name(device: "torch.device") -> str:
    """The card's name, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the bytes of a run depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """The facts about this machine that are needed to interpret a time or a memory figure."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
