"""Rates of a GPU and its machine: what `onecard plan --measure` measures there, each kind of kernel for a second.

A run on a GPU is made of few kinds of work (core/card_rates.py), and each has a rate whatever the model. So nothing of
a model's size is needed, and no block is built. Instructions are timed in the solver's own kernel for the tabu search.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..core.card_rates import H100_80GB, TABU_COLUMN, TABU_MOVE, TABU_ROWS, CardRates
from ..core.rates import measure_flops
from ..core.scheme import Scheme
from ..quantize import tabu
from ..quantize.card import kernels_for
from ..quantize.held import BLOCK_COLUMNS, Held
from .machine_rates import disk_rates

SECONDS = 1.0
# Sides of the matrices that are factored, and bytes that are copied.
FACTORED, COPIED = 8192, 2**28
# Rows and moves of the search that is timed: enough for all multiprocessors.
ROWS, MOVES = 2**16, 100
SMALL_LAUNCHES, SYNCED_FILES = 1000, 20


def measure_card(device: torch.device) -> CardRates:
    """Takes about a quarter of a minute. Writes 256 MB into the current folder, and removes them. Raises OSError."""
    read, write = disk_rates(Path.cwd())
    bf16, fp32 = (measure_flops(device, dtype, SECONDS) for dtype in (torch.bfloat16, torch.float32))
    rates = replace(H100_80GB.rates.at(bf16), fp32_flops=fp32, read_bytes=read, write_bytes=write)
    x_NN = torch.eye(FACTORED, device=device)
    big, small = torch.zeros(COPIED, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    pageable = torch.zeros(COPIED, dtype=torch.uint8)
    pinned = pageable.pin_memory() if device.type == "cuda" else pageable

    def launched() -> None:
        for _ in range(SMALL_LAUNCHES):
            small.add_(1.0)

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _seconds(device, work)

    return replace(
        rates,
        factor_flops=rate(FACTORED**3 / 3, lambda: torch.linalg.cholesky_ex(x_NN)),
        warp_instructions=_instructions(device) or rates.warp_instructions,
        card_bytes=rate(2 * COPIED, big.clone),
        launches=rate(SMALL_LAUNCHES, launched),
        pinned_bytes=rate(COPIED, lambda: big.copy_(pinned, non_blocking=True)),
        pageable_bytes=rate(COPIED, lambda: big.copy_(pageable)),
        digest_bytes=rate(COPIED, lambda: hashlib.sha256(pageable.numpy().data)),
        fsyncs=_fsyncs(Path.cwd()),
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, from repeating it, after one time that does not count."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS or not count:
        finished()
        count += 1
    return (time.perf_counter() - begin) / count


def _instructions(device: torch.device) -> float | None:
    """Instructions a second, in the tabu search; None where there are no kernels."""
    generator = torch.Generator(device).manual_seed(0)
    scheme = Scheme(bits=4, group_size=BLOCK_COLUMNS, symmetric=True)
    shape = (1, BLOCK_COLUMNS, ROWS)
    held = Held(
        codes_BIO=torch.randint(-8, 8, shape, generator=generator, device=device).to(torch.int8),
        scale_BGO=torch.ones(1, 1, ROWS, device=device),
        zero_BGO=None,
        error_BIO=torch.rand(shape, generator=generator, device=device) - 0.5,
        width=BLOCK_COLUMNS,
        scheme=scheme,
        stored=torch.bfloat16,
    )
    kernels = kernels_for(held.error_BIO)
    if kernels is None:
        return None
    slope_BCO, own_BCC = held.error_BIO.clone(), torch.eye(BLOCK_COLUMNS, device=device)[None]
    warps = ROWS / TABU_ROWS
    seconds = _seconds(device, lambda: kernels.tabu(held, slope_BCO, own_BCC, MOVES, tabu.TENURE, tabu.LEAST_GAIN))
    return warps * (MOVES * TABU_MOVE + BLOCK_COLUMNS * TABU_COLUMN) / seconds


def _fsyncs(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".onecard-rate-") as file:
        begin = time.perf_counter()
        for _ in range(SYNCED_FILES):
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
        return SYNCED_FILES / (time.perf_counter() - begin)
