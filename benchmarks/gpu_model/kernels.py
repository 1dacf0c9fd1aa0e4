"""Stand-ins for the Triton kernels: each launch counts as one, and costs what its bytes or its instructions take.

The project's own launch functions run; only the kernels behind them are replaced. A kernel whose work is not described
in WORK fails: nothing is free by being unknown. Instructions of an inner step are an estimate from the compiled PTX of
sm_90 (`instructions`): a division counts as ten, since the assembler makes a routine of it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from onecard.quantize import card, launch

from . import rates
from .ledger import Ledger, line
from .tensors import Pretended, held_bytes


@dataclass(frozen=True)
class Work:
    """`steps`: of one program, from the kernel's arguments. `instructions`: of one warp in one step."""

    steps: Callable[[Mapping[str, Any]], int]
    instructions: float


# PTX instructions of the loop's body with 32 rows (columns loops) or 4 rows (searches) of 128 columns a program.
WORK: dict[str, Work] = {
    "gptq_kernel": Work(lambda given: given["columns"], 520),
    "sweep_kernel": Work(lambda given: given["columns"], 560),
    "tabu_kernel": Work(lambda given: given["moves"], 260),
    "scale_kernel": Work(lambda given: given["n_multiples"] + 1, 150),
}


@dataclass(frozen=True)
class _Kernel:
    """Takes the place of a kernel: `kernel[grid](...)` counts."""

    name: str
    names: tuple[str, ...]
    ledger: Ledger
    grid: tuple[int, ...] = ()

    def __getitem__(self, grid: Any) -> "_Kernel":
        return _Kernel(self.name, self.names, self.ledger, grid if isinstance(grid, tuple) else (grid,))

    def __call__(self, *args: Any, **options: Any) -> None:
        given = dict(zip(self.names, args, strict=False)) | options
        tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
        if any(not (isinstance(x, Pretended) and x.is_cuda) for x in tensors):
            self.ledger.add(f"flag mixes devices: {self.name}")
        work = WORK[self.name]
        warps = prod(self.grid) * options.get("num_warps", 4)
        issued = warps * work.steps(given) * work.instructions
        a_second = rates.MULTIPROCESSORS * rates.SCHEDULERS * rates.CLOCK * rates.ISSUED
        nbytes = sum(map(held_bytes, tensors))
        where = line()
        self.ledger.launch(max(rates.kernel_seconds(nbytes), issued / a_second), where)
        self.ledger.counts["bytes", where] += nbytes
        self.ledger.counts["kernels", where] += 1


class _Kernels:
    """Takes the place of the module kernels.py in launch.py."""

    def __init__(self, module: Any, ledger: Ledger) -> None:
        self._module, self._ledger = module, ledger

    def __getattr__(self, name: str) -> Any:
        if name not in WORK:
            raise LookupError(f"{name} has no entry in WORK of {__file__}: say what it costs")
        function = getattr(self._module, name)
        return _Kernel(name, tuple(inspect.signature(function.fn).parameters), self._ledger)


def stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """(module, attribute, what takes its place) while a card is pretended."""
    return [(launch, "kernels", _Kernels(launch.kernels, ledger)), (card, "_kernels", lambda: launch)]


def without(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """As on a card without Triton: the torch forms."""
    return [(card, "_kernels", lambda: None)]
