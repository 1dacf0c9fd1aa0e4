"""What one operation costs a card: the bytes that it moves, its floating-point operations, and the seconds of both."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from . import rates
from .tensors import held_bytes, tensors_in

aten = torch.ops.aten
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
# A radix sort passes over its keys and values several times.
SORT_PASSES = 8


@dataclass(frozen=True)
class Cost:
    seconds: float
    nbytes: float
    flops: float = 0.0
    # The kind of unit: a dtype, TF32, or `solver`.
    kind: str = ""


def held(tensor: torch.Tensor) -> int:
    return held_bytes(tensor)


def seconds_of_bytes(nbytes: float) -> float:
    return rates.kernel_seconds(nbytes)


def of(func: Any, name: str, inner: Any, out: Any) -> Cost:
    args, kwargs = inner
    ins = tensors_in((args, kwargs))
    outs = tensors_in(out)
    flops, solver = _flops(func, name, args, kwargs, ins, out)
    if not flops:
        nbytes = moved(name, ins, outs)
        return Cost(rates.kernel_seconds(nbytes), nbytes)
    nbytes = sum(map(held, ins)) + sum(map(held, outs))
    factor = ins[1] if name.startswith(("addmm", "baddbmm")) else ins[0]
    dtype = str(factor.dtype).removeprefix("torch.")
    if solver:
        return Cost(rates.kernel_seconds(nbytes, flops, rates.SOLVERS), nbytes, flops, "solver")
    tensor_cores = torch.backends.cuda.matmul.allow_tf32
    kind = "tf32" if dtype == "float32" and tensor_cores else dtype
    return Cost(rates.kernel_seconds(nbytes, flops, rates.product_rate(dtype, tensor_cores)), nbytes, flops, kind)


def _flops(func: Any, name: str, args: Any, kwargs: Any, ins: list[torch.Tensor], out: Any) -> tuple[float, bool]:
    """Operations, and whether a solver does them."""
    if "cholesky_ex" in name:
        return ins[0].numel() * ins[0].shape[-1] / 3, True
    if "cholesky_inverse" in name:
        return ins[0].numel() * ins[0].shape[-1] * 2.0, True  # on CUDA two solves with the identity
    if "cholesky_solve" in name:
        return 2.0 * ins[0].numel() * ins[1].shape[-1], True
    if "solve_triangular" in name or "triangular_solve" in name:
        matrix, rows = (ins[0], ins[1]) if "solve_triangular" in name.split(".")[0] else (ins[1], ins[0])
        return float(rows.numel() * matrix.shape[-1]), True
    if "linalg" in name and "vecdot" not in name and "norm" not in name:
        return ins[0].numel() * ins[0].shape[-1] * 2.0, True
    packet = func.overloadpacket
    plain = packet.__name__.rstrip("_")
    packet = getattr(aten, plain) if packet.__name__.endswith("_") and hasattr(aten, plain) else packet
    if packet not in flop_registry:
        return 0.0, False
    if plain in PRODUCTS:  # some take a dtype besides
        args, kwargs = [x for x in args if isinstance(x, torch.Tensor)], {}
    return float(flop_registry[packet](*args, **kwargs, out_val=out)), False


def moved(name: str, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> float:
    """Bytes read and written."""
    read, written = sum(map(held, ins)), sum(map(held, outs))
    match name.split(".")[0]:
        case "index" | "gather" | "index_select" | "embedding":
            return 2 * written + sum(map(held, ins[1:]))
        case "scatter" | "scatter_" | "index_put" | "index_put_" | "_index_put_impl_" | "index_copy_":
            return 3 * sum(map(held, ins[1:]))
        case "scatter_add" | "scatter_add_" | "index_add" | "index_add_":
            # Where the order is to be fixed, torch sorts the places first.
            return SORT_PASSES * sum(map(held, ins[1:]))
        case "copy_":
            return read
        case "fill_" | "zero_":
            return written
        case "sort" | "argsort" | "topk" | "kthvalue" | "_unique2":
            return (read + written) * SORT_PASSES
    return read + written
