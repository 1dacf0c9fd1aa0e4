"""Compile the Triton kernels for cards that are not at hand, and list what limits them.

    python benchmarks/compile_kernels.py [--cards 80 89 90 100 120]

Needs `triton` and no GPU: Triton's own compiler and the assembler of its wheel do it. For each kernel and card: the
registers of a thread, bytes spilled, shared memory, and the warps that an SM can hold. Ends with 1 when a kernel
spills, or leaves an SM fewer than 8 warps.

(It is not called kernels.py: transformers imports a module of that name wherever it finds one, and a script's folder is
searched first.)
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
from onecard.quantize.held import BLOCK_COLUMNS
from onecard.quantize.site import WIDEST_SEARCHED

# Triton's wheel has two assemblers, and takes the newer one from this card on.
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NEWER_FROM = 90
LEAST_WARPS = 8
REGISTERS = 65536  # of an SM, on every card here
# Compute capability -> (the most warps of an SM, the most programs, bytes of shared memory that programs share).
CARDS = {
    80: (64, 32, 164 * 1024),
    89: (48, 24, 100 * 1024),
    90: (64, 32, 228 * 1024),
    100: (64, 32, 228 * 1024),
    120: (48, 24, 100 * 1024),
}
# What a launch tells the compiler.
COMPILER = ("num_warps", "num_stages", "maxnreg")
# Arguments that are fp32 numbers.
LIMITS = ("code_min", "code_max", "tiny", "least_gain")
# Pointers to anything but fp32.
POINTERS = {"codes_ptr": "*i8", "order_ptr": "*i64", "rank_ptr": "*i64"}
# Integers that no power of two divides, or that are 1 or more of anything; all others are sizes and strides of Scout's,
# multiples of 16. Triton compiles a launch for what it knows of its arguments.
ODD = ("groups", "moves", "tenure", "tries", "rounds", "batch", "n_multiples")


@dataclass(frozen=True)
class Built:
    """A kernel as it is launched: the types of its arguments, and what is known when it is compiled."""

    name: str
    function: Any
    # With the compiler's options.
    given: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in self.given.items() if name not in COMPILER}

    def signature(self) -> dict[str, str]:
        """Every argument's type."""
        found = {}
        for name in self.function.arg_names:
            if name in self.constants:
                found[name] = "constexpr"
            elif name.endswith("_ptr"):
                found[name] = POINTERS.get(name, "*fp32")
            else:
                found[name] = "fp32" if name in LIMITS else "i32"
        return found

    def multiples_of_16(self) -> dict[tuple[int], list[list[Any]]]:
        """The arguments that are, as pointers and most sizes of a launch are."""
        names = self.signature().items()
        return {
            (n,): [["tt.divisibility", 16]]
            for n, (name, kind) in enumerate(names)
            if kind.startswith("*") or (kind == "i32" and name not in ODD)
        }


def built() -> list[Built]:
    """Every kernel for stretches of 128 columns, with and without zero points, and for the widest it is launched
    for."""
    found = [
        Built("product for slopes", kernels.product_kernel, launch.TILE | {"a_stride_i": 1, "NATIVE": True}),
        Built("product for GPTQ", kernels.product_kernel, launch.TILE | {"a_stride_c": 1, "NATIVE": True}),
    ]
    for zero in (False, True):
        also = ", zero points" if zero else ""
        gptq = {"HAS_ZERO": zero, "HAS_DUE": True} | launch.program(BLOCK_COLUMNS, launch.GPTQ_ROWS)
        found.append(Built(f"GPTQ{also}", kernels.gptq_kernel, gptq))
        sweep = {"HAS_ZERO": zero, "REFIT": True, "STORED": "bf16"} | launch.program(BLOCK_COLUMNS, launch.REFINE_ROWS)
        found.append(Built(f"refinement{also}", kernels.refine_kernel, sweep))
    for columns in (BLOCK_COLUMNS, WIDEST_SEARCHED):
        wide = "" if columns == BLOCK_COLUMNS else f", group of {columns}"
        for zero in (False, True):
            also = ", zero points" if zero else ""
            tries = {"HAS_ZERO": zero, "STORED": "bf16"} | launch.program(columns, launch.RESTART_ROWS)
            tries |= launch.MANY_REGISTERS
            found.append(Built(f"restarts{wide}{also}", kernels.restart_kernel, tries))
        found.append(Built(f"tabu search{wide}", kernels.tabu_kernel, launch.program(columns, launch.TABU_ROWS)))
        for symmetric in (True, False):
            search = {"SYMMETRIC": symmetric, "SIGNED": symmetric, "STORED": "bf16"}
            also = "" if symmetric else ", zero points"
            found.append(
                Built(
                    f"scale search{wide}{also}",
                    kernels.scale_kernel,
                    search | launch.program(columns, launch.SEARCH_ROWS),
                )
            )
    return found


@dataclass(frozen=True)
class Limits:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int  # that an SM holds at a time


def _made(kernel: Built, card: int) -> Any:
    constants = {(kernel.function.arg_names.index(k),): v for k, v in kernel.constants.items()}
    source = ASTSource(kernel.function, kernel.signature(), constants, kernel.multiples_of_16())
    options = launch.OPTIONS | {name: kernel.given[name] for name in COMPILER if name in kernel.given}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def ptx_of(kernel: Built, card: int) -> str:
    return str(_made(kernel, card).asm["ptx"])


def compiled(kernel: Built, card: int) -> Limits:
    warps, made = kernel.given["num_warps"], _made(kernel, card)
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
    most, programs, memory = CARDS[card]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps * warps
    by_memory = memory // (shared + 1024) * warps
    return Limits(registers, spilled, shared, min(most, programs * warps, by_registers, by_memory))


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
