"""How fast a CPU is at each kind of work that a run consists of; rates are measured once, kept, and looked up again.

`onecard plan --measure` keeps rates in `$XDG_CACHE_HOME/onecard/rates.json` (`~/.cache` without that variable). The key
names machine, device, threads, versions, and what was measured: another width of model or another method has other
rates. The file holds JSON numbers. A damaged one is ignored with a note, and nothing that a run writes depends on it.
This module measures a matrix product and nothing else; eval/machine_rates.py measures the rest. A GPU's rates are of
other kinds (card_rates.py), and are kept in the same file.
"""

import json
import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .json_text import json_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Kind = TypeVar("Kind", bound=DataclassInstance)

# Sequential rate of a plain NVMe disk; a network disk is slower, a warm page cache faster.
DISK_BYTES_PER_SECOND = 1e9
SCHEMA = 2
# The newest entries are kept, one for each machine and model: a file of some ten kilobytes.
MOST_KEPT = 64


@dataclass(frozen=True)
class Rates:
    """Operations a second by kind of work, counted as planner/work.py counts them, and bytes a second."""

    # Rows through a block.
    forward_flops: float
    # Second moments, which are plain matrix products.
    product_flops: float
    # Quantizing a matrix.
    solve_flops: float
    # Logits of both models and their KL.
    head_flops: float
    read_bytes: float
    write_bytes: float


def uniform(flops_per_second: float) -> Rates:
    """One rate for all computing, and a plain disk."""
    flops = (flops_per_second,) * 4
    return Rates(*flops, DISK_BYTES_PER_SECOND, DISK_BYTES_PER_SECOND)


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Operations a second of a square matrix product, repeated for `seconds`; a multiply-add counts two."""
    n = 4096 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)  # a run's own random numbers stay as they are
    a = torch.randn(n, n, generator=generator, device=device, dtype=torch.float32).to(dtype)
    a @ a
    count = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - begin)


def first_guess(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates for the first ETA of a run, in a tenth of a second. Kept ones are not looked up, so that nothing that a run
    does can depend on them."""
    return uniform(measure_flops(device, dtype, 0.05))


def rates_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or ""
    # A relative path in this variable must be ignored (XDG Base Directory Specification).
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "onecard" / "rates.json"


def kept_rates(key: str, kind: "type[Kind]") -> "tuple[Kind | None, str | None]":
    """The rates under `key`, if there are any; and a note for the user if the file cannot be read. `kind`: Rates, or
    CardRates for the key of a GPU."""
    path = rates_file()
    if not path.is_file():
        return None, None
    damaged = f"{path} is damaged and left out: `onecard plan --measure` writes it anew"
    try:
        kept = _entries(path)
    except (OSError, ValueError, RecursionError):
        return None, damaged
    if key not in kept:
        return None, None
    entry = kept[key]
    names = {field.name for field in fields(kind)}
    if not isinstance(entry, dict) or set(entry) != names or not all(map(_is_rate, entry.values())):
        return None, damaged
    return kind(**{name: float(value) for name, value in entry.items()}), None


def keep_rates(key: str, rates: "DataclassInstance") -> str | None:
    """Write the rates under `key`; returns a note for the user if that fails. The file is written beside the old one
    and renamed, so no reader sees half a file."""
    path = rates_file()
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError):
        kept = _entries(path)
    kept = {other: value for other, value in kept.items() if other != key} | {key: asdict(rates)}
    text = json_text({"schema": SCHEMA, "rates": dict(list(kept.items())[-MOST_KEPT:])}, indent=2)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        return f"the rates could not be kept in {path} ({error.strerror})"
    return None


def _entries(path: Path) -> dict[str, Any]:
    """All entries of the file. Raises ValueError if it is damaged."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not isinstance(value.get("rates"), dict):
        raise ValueError("no rates")
    return dict(value["rates"])


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
