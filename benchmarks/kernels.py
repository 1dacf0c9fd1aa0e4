"""Compile the Triton kernels for cards that are not at hand, and list what limits them.

    python benchmarks/kernels.py [--cards 80 89 90 100 120]

Needs `triton` and no GPU: Triton's own compiler and the assembler of its wheel do it. For each kernel and card: the
registers of a thread, bytes spilled, shared memory, and the warps that an SM can hold. Ends with 1 when a kernel
spills, or leaves an SM fewer than 8 warps.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onecard.quantize import kernels, launch
from onecard.quantize.gptq import BLOCK_COLUMNS

# Triton's wheel has two assemblers, and takes the newer one from this card on.
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NEWER_FROM = 90
LEAST_WARPS = 8
REGISTERS = 65536  # of an SM, on every card here
# Compute capability -> (the most warps of an SM, bytes of shared memory that programs share).
CARDS = {80: (64, 164 * 1024), 89: (48, 100 * 1024), 90: (64, 228 * 1024), 100: (64, 228 * 1024), 120: (48, 100 * 1024)}
# Arguments that are fp32 numbers.
LIMITS = ("code_min", "code_max", "tiny")
FLOAT, INT8, INT32 = "*fp32", "*i8", "*i32"


@dataclass(frozen=True)
class Built:
    """A kernel as it is launched: the types of its arguments, and what is known when it is compiled."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int


def _signature(function: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Every argument's type: `pointers`, fp32 for limits of codes, and 32-bit integers."""
    found = {}
    for name in function.arg_names:
        if name in constants:
            found[name] = "constexpr"
        elif name in pointers:
            found[name] = pointers[name]
        else:
            found[name] = "fp32" if name in LIMITS else FLOAT if name.endswith("_ptr") else "i32"
    return found


def built() -> list[Built]:
    columns = {"BLOCK": BLOCK_COLUMNS}
    found = []
    for zero in (False, True):
        constants: dict[str, Any] = columns | {"HAS_ZERO": zero, "ROWS": launch.COLUMN_ROWS}
        asymmetric = ", zero points" if zero else ""
        pointers = {"group_ptr": INT32, "codes_ptr": INT8}
        gptq = _signature(kernels.gptq_kernel, pointers, constants)
        found.append(Built(f"gptq{asymmetric}", kernels.gptq_kernel, gptq, constants, launch.COLUMN_WARPS))
        sweep = _signature(kernels.sweep_kernel, {}, constants)
        found.append(Built(f"sweep{asymmetric}", kernels.sweep_kernel, sweep, constants, launch.COLUMN_WARPS))
    constants = columns | {"ROWS": launch.MOVE_ROWS}
    tabu = _signature(kernels.tabu_kernel, {}, constants)
    found.append(Built("tabu", kernels.tabu_kernel, tabu, constants, launch.MOVE_ROWS))
    for symmetric in (True, False):
        constants = columns | {"SYMMETRIC": symmetric, "IN_BF16": True, "ROWS": launch.SEARCH_ROWS}
        search = _signature(kernels.scale_kernel, {}, constants)
        name = "scale search" if symmetric else "scale search, zero points"
        found.append(Built(name, kernels.scale_kernel, search, constants, launch.SEARCH_ROWS))
    return found


@dataclass(frozen=True)
class Limits:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int  # that an SM holds at a time


def compiled(kernel: Built, card: int) -> Limits:
    source = ASTSource(
        kernel.function,
        kernel.signature,
        {(kernel.function.arg_names.index(k),): v for k, v in kernel.constants.items()},
    )
    options = {"num_warps": kernel.warps, **launch.OPTIONS}
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    ptx = made.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        assembler = PTXAS / ("ptxas-blackwell" if card >= NEWER_FROM else "ptxas")
        command = [assembler, "-v", f"--gpu-name={target[1]}", "--fmad=false", path, "-o", Path(folder) / "out"]
        said = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    shared = int(made.metadata.shared)
    most, memory = CARDS[card]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32)
    by_memory = memory // (shared + 1024) * kernel.warps
    return Limits(registers, spilled, shared, min(most, by_registers // kernel.warps * kernel.warps, by_memory))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", choices=tuple(CARDS), default=tuple(CARDS))
    bad = 0
    print("| kernel | card | registers | spilled bytes | shared bytes | warps an SM |\n|---|---|---|---|---|---|")
    for kernel in built():
        for card in parser.parse_args().cards:
            found = compiled(kernel, card)
            bad += found.spilled_bytes > 0 or found.warps < LEAST_WARPS
            print(
                f"| {kernel.name} | sm_{card} | {found.registers} | {found.spilled_bytes} | {found.shared_bytes} | "
                f"{found.warps} |",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
