"""Launches of the Triton kernels (kernels.py): shapes and strides are checked, results allocated, programs counted.

Shape legend: B matrices, O outputs (rows), I inputs, C columns of a block or stretch, G groups, K tries.
"""

from typing import Any

import torch
import triton

from ..core.scheme import Scheme
from . import kernels
from .held import BLOCK_COLUMNS, Held
from .restarts import Stretch

# Rows of a program, which is one warp, with BLOCK_COLUMNS columns or fewer; with more columns it holds fewer rows. A
# thread has a register for each row of a tensor and every 32 columns. GPTQ and the scale search hold few tensors.
GPTQ_ROWS, SEARCH_ROWS = 8, 4
REFINE_ROWS, RESTART_ROWS, TABU_ROWS = 4, 2, 2
# What a program of a product computes at a time. It is the same for every shape, so that a product depends neither on
# how a batch was cut nor on a library's choice.
TILE = {"COLUMNS": 128, "OUTPUTS": 64, "INPUTS": 32, "num_warps": 8, "num_stages": 3}
# Dtypes of scales, and the widest group, that the search's kernel knows; a wider one would not fit into registers.
STORED = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SEARCHED = (torch.bfloat16, torch.float16)
WIDEST_GROUP = 512
# Left alone, the assembler spills some registers of the restarts' kernel to make room for more programs.
MANY_REGISTERS = {"maxnreg": 224}
# Products and sums are rounded one by one, as the kernels' results are defined.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def program(columns: int, most: int) -> dict[str, int]:
    """What a program holds, and its warps. `most`: the rows that a warp holds with BLOCK_COLUMNS columns. A row that a
    warp cannot hold gets twice the warps, since it holds their sums as well."""
    block = triton.next_power_of_2(columns)
    room = most * BLOCK_COLUMNS // max(block, BLOCK_COLUMNS)
    return {"ROWS": max(1, room), "BLOCK": block, "num_warps": 1 if room else 2 * block // (most * BLOCK_COLUMNS)}


def _grid(held: Held, rows: dict[str, int]) -> tuple[int, int]:
    batch, _, outputs = held.codes_BIO.shape
    return triton.cdiv(outputs, rows["ROWS"]), batch


def _tensors(held: Held) -> tuple[torch.Tensor, ...]:
    """Codes, scales, zero points and error. A symmetric scheme's zero points are never read."""
    zero = held.scale_BGO if held.zero_BGO is None else held.zero_BGO
    found = held.codes_BIO, held.scale_BGO, zero, held.error_BIO
    assert all(tensor[0].is_contiguous() for tensor in found)
    assert zero.stride(0) == held.scale_BGO.stride(0)
    return found


def _strides(held: Held) -> tuple[int, int, int]:
    return held.codes_BIO.stride(0), held.scale_BGO.stride(0), held.error_BIO.stride(0)


def _limits(scheme: Scheme) -> tuple[float, float]:
    return float(scheme.code_min), float(scheme.code_max)


def product(a_BCI: torch.Tensor, x_BIO: torch.Tensor) -> torch.Tensor:
    """a x [B, C, O], fp32; `a_BCI` may be any view."""
    batch, columns, inputs = a_BCI.shape
    outputs = x_BIO.shape[2]
    assert x_BIO[0].is_contiguous()
    out = torch.empty(batch, columns, outputs, dtype=torch.float32, device=x_BIO.device)
    grid = triton.cdiv(outputs, TILE["OUTPUTS"]), triton.cdiv(columns, TILE["COLUMNS"]), batch
    kernels.product_kernel[grid](
        a_BCI,
        x_BIO,
        out,
        columns,
        outputs,
        inputs,
        *a_BCI.stride(),
        x_BIO.stride(0),
        NATIVE=x_BIO.is_cuda,
        **TILE,
        **OPTIONS,
    )
    return out


def gptq(
    held: Held,
    order_BC: torch.Tensor,
    root_BCC: torch.Tensor,
    due_BCO: torch.Tensor | None,
    left_BCO: torch.Tensor,
) -> None:
    """As gptq._round_block."""
    columns = order_BC.shape[1]
    assert root_BCC.stride(2) == order_BC.stride(1) == 1
    assert left_BCO[0].is_contiguous()
    assert due_BCO is None or due_BCO.is_contiguous()
    rows = program(columns, GPTQ_ROWS)
    kernels.gptq_kernel[_grid(held, rows)](
        *_tensors(held),
        root_BCC,
        order_BC,
        left_BCO if due_BCO is None else due_BCO,
        left_BCO,
        left_BCO.shape[2],
        columns,
        held.width,
        *_strides(held),
        root_BCC.stride(0),
        root_BCC.stride(1),
        order_BC.stride(0),
        left_BCO.stride(0),
        *_limits(held.scheme),
        HAS_ZERO=held.zero_BGO is not None,
        HAS_DUE=due_BCO is not None,
        **rows,
        **OPTIONS,
    )


def refine(part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor, tiny: float) -> None:
    """Refits the scales of a stretch, then sweeps its codes, as refine._refit and refine._sweep. `tiny`: the least
    scale."""
    _refine(part, slope_BCO, own_BCC, tiny, None)


def sweep(part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor) -> torch.Tensor:
    """As refine._sweep: the moves [B, C, O] of a block of columns."""
    moves = torch.empty(part.codes_BIO.shape, dtype=slope_BCO.dtype, device=slope_BCO.device)
    _refine(part, slope_BCO, own_BCC, 0.0, moves)
    return moves


def _refine(
    part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor, tiny: float, moves_BCO: torch.Tensor | None
) -> None:
    _, columns, outputs = slope_BCO.shape
    assert slope_BCO[0].is_contiguous()
    assert own_BCC.stride(2) == 1
    rows = program(columns, REFINE_ROWS)
    kernels.refine_kernel[_grid(part, rows)](
        *_tensors(part),
        slope_BCO,
        own_BCC,
        slope_BCO if moves_BCO is None else moves_BCO,
        outputs,
        columns,
        part.scale_BGO.shape[1],
        part.width,
        *_strides(part),
        slope_BCO.stride(0),
        own_BCC.stride(0),
        own_BCC.stride(1),
        *_limits(part.scheme),
        tiny,
        HAS_ZERO=part.zero_BGO is not None,
        REFIT=moves_BCO is None,
        STORED=STORED[part.stored],
        **rows,
        **OPTIONS,
    )


def restart(
    part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor, stretch: Stretch, rounds: int, tiny: float
) -> None:
    """As restarts._try. `tiny`: the least scale."""
    batch, columns, outputs = slope_BCO.shape
    given = stretch.inverse_BCC, stretch.order_KBC, stretch.rank_KBC, stretch.root_KBCC
    assert slope_BCO.is_contiguous()
    assert own_BCC.stride(2) == 1
    assert all(tensor.is_contiguous() for tensor in given)
    rows = program(columns, RESTART_ROWS) | MANY_REGISTERS
    kernels.restart_kernel[_grid(part, rows)](
        *_tensors(part),
        slope_BCO,
        own_BCC,
        *given,
        batch,
        outputs,
        columns,
        part.scale_BGO.shape[1],
        part.width,
        len(stretch.order_KBC),
        rounds,
        *_strides(part),
        own_BCC.stride(0),
        own_BCC.stride(1),
        *_limits(part.scheme),
        tiny,
        HAS_ZERO=part.zero_BGO is not None,
        STORED=STORED[part.stored],
        **rows,
        **OPTIONS,
    )


def tabu(
    part: Held, slope_BCO: torch.Tensor, own_BCC: torch.Tensor, moves: int, tenure: int, least_gain: float
) -> None:
    """Makes the moves of a stretch and keeps them where J falls, as tabu.tabu_search."""
    _, columns, outputs = slope_BCO.shape
    assert slope_BCO.is_contiguous()
    assert own_BCC.stride(2) == 1
    codes, scale, _, error = _tensors(part)
    rows = program(columns, TABU_ROWS)
    kernels.tabu_kernel[_grid(part, rows)](
        codes,
        scale,
        error,
        slope_BCO,
        own_BCC,
        outputs,
        columns,
        part.width,
        moves,
        tenure,
        *_strides(part),
        own_BCC.stride(0),
        own_BCC.stride(1),
        *_limits(part.scheme),
        least_gain,
        **rows,
        **OPTIONS,
    )


def searched_scales(
    w_BOI: torch.Tensor,
    importance_BI: torch.Tensor,
    multiples: torch.Tensor,
    scheme: Scheme,
    tiny: float,
    stored: torch.dtype,
    signed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales in the dtype `stored`, zero points fp32) [B, O, G]: for each group the multiple of its range that leaves
    the least error (grid.py). `tiny`: the least scale. `signed`: as grid.signs says, for a symmetric scheme."""
    batch, outputs, inputs = w_BOI.shape
    groups, width = scheme.groups(inputs), scheme.width(inputs)
    scale = torch.empty(batch, outputs, groups, dtype=torch.float32, device=w_BOI.device)
    zero = scale if scheme.symmetric else torch.empty_like(scale)
    rows = program(width, SEARCH_ROWS)
    kernels.scale_kernel[(triton.cdiv(outputs, rows["ROWS"]), groups, batch)](
        w_BOI.contiguous(),
        importance_BI.contiguous(),
        multiples,
        scale,
        zero,
        outputs,
        groups,
        width,
        len(multiples),
        *_limits(scheme),
        tiny,
        SYMMETRIC=scheme.symmetric,
        SIGNED=signed,
        STORED=STORED[stored],
        **rows,
        **OPTIONS,
    )
    return scale.to(stored), zero
