"""Stand-ins for the Triton kernels: each launch counts as one, and costs what its bytes or its instructions take.

The project's own launch functions run; only the kernels behind them are replaced. A kernel whose loops are not
described in TRIPS fails: nothing is free by being unknown.

Each kernel is compiled for sm_90 as it is launched, which needs no GPU (benchmarks/compile_kernels.py). The
instructions of a warp are those of the PTX: of each innermost loop's body, times how often a program goes through it,
and the rest once.
A division counts as ten, since the assembler makes a routine of it. The schedulers issue half of what they
could: an estimate.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton

from onecard.quantize import card, launch

from . import rates
from .ledger import Ledger, line
from .tensors import Pretended, held_bytes

DIVISION = 10
# Shorter loops are left out: they are the ends of others.
LEAST_LOOP = 30
# Where Triton interprets, as in the tests, nothing can be compiled: so many instructions in every loop.
INTERPRETED = 200

Trips = Callable[[Mapping[str, Any]], int]


def _columns(given: Mapping[str, Any]) -> int:
    return int(given["columns"])


def _groups(given: Mapping[str, Any]) -> int:
    return int(given["groups"])


def _tries(trips: Trips, rounds: bool = False) -> Trips:
    """So often in each try, or in each round of each try."""
    return lambda given: trips(given) * given["tries"] * (given["rounds"] if rounds else 1)


# How often a program goes through each innermost loop, in the kernel's order.
TRIPS: dict[str, list[Trips]] = {
    "gptq_kernel": [_columns],
    "refine_kernel": [_groups, _columns, _groups, _columns, _groups],
    "restart_kernel": [
        _columns,
        _tries(_columns),
        _tries(_columns),
        _tries(_groups, True),
        _tries(_columns, True),
        _tries(_groups, True),
        _tries(_columns, True),
        _tries(_columns),
        _groups,
    ],
    "tabu_kernel": [lambda given: given["moves"], _columns],
    "scale_kernel": [lambda given: given["n_multiples"] + 1],
}
# Kernels that multiply on the tensor cores: their operations.
PRODUCTS: dict[str, Trips] = {
    # Three products of bf16 parts.
    "product_kernel": lambda given: 6 * given["a_ptr"].numel() * given["outputs"],
}


@dataclass(frozen=True)
class Body:
    """Instructions of a warp: of each innermost loop's body, and of all that is outside of them."""

    loops: tuple[int, ...]
    rest: int


def body_of(ptx: str) -> Body:
    labels: dict[str, int] = {}
    found: list[str] = []
    for text in map(str.strip, ptx.splitlines()):
        label = re.match(r"(\$L__\w+):", text)
        if label:
            labels[label[1]] = len(found)
        elif text and (text[0].isalpha() or text[0] == "@") and not text.startswith("ret"):
            found.append(text)
    ends = [(re.search(r"\bbra(?:\.uni)?\s+(\$L__\w+)", text), n) for n, text in enumerate(found)]
    spans = sorted({(labels[to[1]], n) for to, n in ends if to and labels[to[1]] <= n})
    inner: list[tuple[int, int]] = []
    for begin, end in spans:
        holds_others = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
        if not holds_others and not any(b <= end and begin <= e for b, e in inner):
            inner.append((begin, end))
    counts = [sum(DIVISION if "div." in text else 1 for text in found[b : e + 1]) for b, e in inner]
    loops = tuple(count for count in counts if count >= LEAST_LOOP)
    return Body(loops, len(found) - sum(e + 1 - b for b, e in inner))


def compiled(function: Any, options: Mapping[str, Any]) -> Body:
    """The kernel as it is launched with these constants and warps."""
    if not isinstance(function, triton.JITFunction):
        return Body((INTERPRETED,) * len(TRIPS[function.__name__]), INTERPRETED)
    compiler: Any = importlib.import_module("compile_kernels")  # benchmarks/compile_kernels.py
    given = {name: value for name, value in options.items() if name not in launch.OPTIONS}
    return body_of(compiler.ptx_of(compiler.Built(function.__name__, function, given), 90))


class _Kernel:
    """Takes the place of a kernel: `kernel[grid](...)` counts."""

    def __init__(self, function: Any, ledger: Ledger) -> None:
        self.function, self.ledger = function, ledger
        self.name = function.__name__
        self.names = tuple(inspect.signature(function.fn).parameters)
        self.bodies: dict[Any, Body] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._count(grid, args, options)

    def _count(self, grid: tuple[int, ...], args: Any, options: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | options
        tensors = {id(x): x for x in given.values() if isinstance(x, torch.Tensor)}.values()
        if any(not (isinstance(x, Pretended) and x.is_cuda) for x in tensors):
            self.ledger.add(f"flag mixes devices: {self.name}")
        if self.name in PRODUCTS:
            seconds = PRODUCTS[self.name](given) / (rates.BF16 * rates.TRITON_PRODUCTS)
        else:
            seconds = prod(grid) * options["num_warps"] * self._instructions(given, options) / rates.ISSUED_A_SECOND
        nbytes = sum(map(held_bytes, tensors))
        where = line()
        self.ledger.launch(max(rates.kernel_seconds(nbytes), seconds), where)
        self.ledger.add("bytes", nbytes, where)
        self.ledger.add("kernels", 1, where)

    def _instructions(self, given: Mapping[str, Any], options: dict[str, Any]) -> int:
        """Of one warp."""
        key = tuple(sorted(options.items()))
        if key not in self.bodies:
            self.bodies[key] = compiled(self.function, options)
        body, trips = self.bodies[key], [count(given) for count in TRIPS[self.name]]
        if len(body.loops) != len(trips):
            raise LookupError(f"{self.name} has {len(body.loops)} innermost loops, and TRIPS knows {len(trips)}")
        return body.rest + sum(count * times for count, times in zip(body.loops, trips, strict=True))


class _Kernels:
    """Takes the place of the module kernels.py in launch.py."""

    def __init__(self, module: Any, ledger: Ledger) -> None:
        self._module, self._ledger = module, ledger
        self._made: dict[str, _Kernel] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in TRIPS.keys() | PRODUCTS.keys():
            raise LookupError(f"{name} is neither in TRIPS nor in PRODUCTS of {__file__}: say what it costs")
        if name not in self._made:
            self._made[name] = _Kernel(getattr(self._module, name), self._ledger)
        return self._made[name]


def stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """(module, attribute, what takes its place) while a card is pretended."""
    return [(launch, "kernels", _Kernels(launch.kernels, ledger)), (card, "_kernels", lambda: launch)]


def without(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """As on a card without Triton: the torch forms."""
    return [(card, "_kernels", lambda: None)]
