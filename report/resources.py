"""What a process uses: peak resident memory, peak device memory, and what machine it is on."""

import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
    """Peak resident set of this process so far."""
    # Linux counts a parent's peak into the ru_maxrss of the program that it starts; this one begins anew with it.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int:
    """Peak device memory that torch's allocator took, 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def package_versions() -> dict[str, str]:
    """Versions of what a run's bytes depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_machine(device: str) -> dict[str, Any]:
    """Facts about this machine that a figure of time or memory means nothing without."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
