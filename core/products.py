"""Matrix products with fp32 sums: fp32 products on a CPU, bf16 products on the tensor cores of a GPU.

A bf16 number has 8 significant bits, so the product of two is exact in fp32. Where rows and weights are bf16, as in a
walk on a GPU, a bf16 product with fp32 sums therefore loses nothing beside an fp32 product, and is ten times as fast.

An fp32 number is cut into PARTS bf16 numbers, the larger first: each rounds what the ones before it leave. Two leave
2^-17 of the number at most, three leave nothing. Products as small as what is left are not computed. (The
splitting of Henry, Tang and Heinecke, arXiv 1904.06376.) benchmarks/moment_error.py measures the error on real rows.

Shape legend: M rows, K what is summed over, N columns; R rows of two matrices whose outer products are added up; T
rows of a quadratic form of H numbers.
"""

from typing import Any

import torch

from .device import on_cuda

# With two parts the error on real rows is a few times that of an fp32 sum, and far below what bf16 rows lose; see
# docs/benchmarks.md.
PARTS = 2
# A solve amplifies what its products lose by the condition of the matrix.
SOLVED_PARTS, SOLVED_COLUMNS = 3, 1024


def product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """fp32 a @ b [M, N] of fp32 or bf16 matrices; of stacks [B, M, K] and [B, K, N] one by one, and either may be a
    single matrix."""
    if not on_cuda(a_MK):
        return _wide(a_MK) @ _wide(b_KN)
    stacked = next((len(x) for x in (a_MK, b_KN) if x.dim() == 3), None)
    if stacked is None:
        return _sum_of_products(a_MK, b_KN)
    a_BMK, b_BKN = (x if x.dim() == 3 else x.expand(stacked, -1, -1) for x in (a_MK, b_KN))
    return torch.stack([_sum_of_products(a, b) for a, b in zip(a_BMK, b_BKN, strict=True)])


def add_outer(total_MN: torch.Tensor, a_RM: torch.Tensor, b_RN: torch.Tensor) -> None:
    """Adds the sum of the outer products of rows, a^T b, to the fp32 total in place. Rows are fp32 or bf16."""
    if not on_cuda(total_MN):
        total_MN.addmm_(_wide(a_RM).T, _wide(b_RN))
        return
    first, second = _row_parts(a_RM, b_RN)
    _add_product(total_MN, first.T, second)


def add_outers(totals_EMN: torch.Tensor, a_SM: torch.Tensor, b_SN: torch.Tensor, rows: list[int]) -> None:
    """`add_outer` for each total in turn: the first rows[0] of a and b are the first's, and so on."""
    split = 1
    if on_cuda(totals_EMN):
        a_SM, b_SN = _row_parts(a_SM, b_SN)  # bf16 from here on
        split = len(a_SM) // max(1, sum(rows))
    sizes = [split * n for n in rows]
    for total_MN, a_RM, b_RN in zip(totals_EMN, a_SM.split(sizes), b_SN.split(sizes), strict=True):
        if len(a_RM):
            add_outer(total_MN, a_RM, b_RN)


def quadratic(e_TH: torch.Tensor, metric_HH: torch.Tensor) -> torch.Tensor:
    """e M e of each row, fp32 [T], for a symmetric M in fp32; autograd goes back to the rows."""
    if not on_cuda(e_TH):
        return ((e_TH @ metric_HH) * e_TH).sum(-1)
    cost_T: torch.Tensor = _Quadratic.apply(e_TH, metric_HH)
    return cost_T


class _Quadratic(torch.autograd.Function):
    """The product with M serves the gradient, too."""

    @staticmethod
    def forward(ctx: Any, e_TH: torch.Tensor, metric_HH: torch.Tensor) -> torch.Tensor:
        weighed_TH = product(e_TH, metric_HH)
        ctx.save_for_backward(weighed_TH)
        return (weighed_TH * e_TH).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * gradients[0][:, None] * ctx.saved_tensors[0], None


def bf16_parts(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` bf16 tensors whose sum is x but for what the last leaves, the larger first; x itself where it is bf16."""
    if x.dtype == torch.bfloat16:
        return [x]
    rest, parts = x.float(), []
    for n in range(count):
        parts.append(rest.to(torch.bfloat16))
        if n + 1 < count:
            rest = rest - parts[-1]
    return parts


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def solved_from_right(right_NI: torch.Tensor, lower_II: torch.Tensor) -> torch.Tensor:
    """right (L L^T)^-1 [N, I], fp32 or fp64, for a Cholesky factor L.

    A GPU takes two triangular solves block by block: solves within SOLVED_COLUMNS columns, and products of three bf16
    parts for all else, which lose no more than fp32 products do.
    """
    if not on_cuda(right_NI):
        return torch.cholesky_solve(right_NI.T, lower_II).T
    of_lower = bf16_parts(lower_II, SOLVED_PARTS)
    turned_NI = _solved_by_blocks(right_NI, lower_II.T, [part.T for part in of_lower], upper=True)
    return _solved_by_blocks(turned_NI, lower_II, of_lower, upper=False)


def _solved_by_blocks(
    right_NI: torch.Tensor, triangle_II: torch.Tensor, parts: list[torch.Tensor], upper: bool
) -> torch.Tensor:
    """right T^-1 for a triangular T; `parts`: those of T."""
    n = len(triangle_II)
    blocks = [slice(begin, min(begin + SOLVED_COLUMNS, n)) for begin in range(0, n, SOLVED_COLUMNS)]
    out_NI = torch.empty_like(right_NI)
    of_out = [torch.empty_like(right_NI, dtype=torch.bfloat16) for _ in range(SOLVED_PARTS)]
    for block in blocks if upper else blocks[::-1]:
        before = slice(0, block.start) if upper else slice(block.stop, None)
        due = right_NI[:, block]
        if block is not blocks[0 if upper else -1]:
            pairs = _paired([part[:, before] for part in of_out], [part[before, block] for part in parts])
            due = due - _sum_of_pairs(pairs)
        own = torch.linalg.solve_triangular(triangle_II[block, block], due, upper=upper, left=False)
        out_NI[:, block] = own
        for whole, part in zip(of_out, bf16_parts(own, SOLVED_PARTS), strict=True):
            whole[:, block] = part
    return out_NI


def _pairs(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    of_a = bf16_parts(a, PARTS)
    return _paired(of_a, of_a if b is a else bf16_parts(b, PARTS))


def _paired(of_a: list[torch.Tensor], of_b: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of both that are multiplied, the smallest products first."""
    most = max(len(of_a), len(of_b))
    places = [(i, j) for i in range(len(of_a)) for j in range(len(of_b)) if i + j < most]
    return [(of_a[i], of_b[j]) for i, j in sorted(places, key=sum, reverse=True)]


def _row_parts(a_RM: torch.Tensor, b_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of both, each row's one below the other: in one product, so that the total, which is often larger than
    the rows, passes once."""
    pairs = _pairs(a_RM, b_RN)
    if len(pairs) == 1:
        return pairs[0]
    first, second = (torch.stack(each, dim=1).flatten(0, 1) for each in zip(*pairs, strict=True))
    return first, second


def _sum_of_products(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    return _sum_of_pairs(_pairs(a_MK, b_KN))


def _sum_of_pairs(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    (first, second), *others = pairs
    total_MN = torch.mm(first, second, out_dtype=torch.float32) if first.is_cuda else first.float() @ second.float()
    for a, b in others:
        _add_product(total_MN, a, b)
    return total_MN


def _add_product(total_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """Adds a bf16 product with fp32 sums in place. A CPU's fp32 gives the same products. (addmm takes an fp32 total
    beside bf16 factors from torch 2.10 on: pytorch pull request 167931.)"""
    if total_MN.is_cuda:
        torch.addmm(total_MN, a_MK, b_KN, out_dtype=torch.float32, out=total_MN)
    else:
        total_MN.addmm_(a_MK.float(), b_KN.float())
