"""Launches of the Triton kernels (kernels.py): shapes and strides are checked, results allocated, programs counted.

Shape legend: B matrices, O outputs (rows), I inputs, C columns of a block, G groups.
"""

from typing import Any

import torch
import triton

from ..core.scheme import Scheme
from . import kernels

# Rows of a program. A row takes one register of each thread of a warp for every 32 columns.
COLUMN_ROWS, COLUMN_WARPS = 32, 4
MOVE_ROWS = 4  # and warps
SEARCH_ROWS = 4  # and warps
# Dtypes of scales, and the widest group, that the search's kernel knows; a wider one would not fit into registers.
STORED = (torch.bfloat16, torch.float16)
WIDEST_GROUP = 512
# Products and sums are rounded one by one, as the kernels' results are defined.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def _grid(outputs: int, batch: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(outputs, rows), batch


def gptq_block(
    wt_BCO: torch.Tensor,
    upper_BCC: torch.Tensor,
    scale_BGO: torch.Tensor,
    zero_BGO: torch.Tensor | None,
    group_BC: torch.Tensor,
    scheme: Scheme,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8, errors) [B, C, O] of a block of columns. `wt_BCO` may be a slice of a matrix along its columns."""
    batch, columns, outputs = wt_BCO.shape
    assert wt_BCO[0].is_contiguous()
    assert upper_BCC.stride(2) == 1
    found = torch.empty(batch, columns, outputs, dtype=torch.int8, device=wt_BCO.device)
    errors = torch.empty(batch, columns, outputs, dtype=wt_BCO.dtype, device=wt_BCO.device)
    kernels.gptq_kernel[_grid(outputs, batch, COLUMN_ROWS)](
        wt_BCO,
        upper_BCC,
        scale_BGO,
        zero_BGO if zero_BGO is not None else scale_BGO,
        group_BC.to(torch.int32).contiguous(),
        found,
        errors,
        outputs,
        columns,
        scale_BGO.shape[1],
        wt_BCO.stride(0),
        upper_BCC.stride(0),
        upper_BCC.stride(1),
        float(scheme.code_min),
        float(scheme.code_max),
        HAS_ZERO=zero_BGO is not None,
        ROWS=COLUMN_ROWS,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=COLUMN_WARPS,
        **OPTIONS,
    )
    return found, errors


def sweep_block(
    codes_BCO: torch.Tensor,
    scale_BGO: torch.Tensor,
    zero_BGO: torch.Tensor | None,
    gradient_BCO: torch.Tensor,
    moment_BCC: torch.Tensor,
    first: int,
    width: int,
    scheme: Scheme,
) -> torch.Tensor:
    """The moves [B, C, O] of one sweep over a block; `codes_BCO` changes in place. All but the scales may be slices of
    whole matrices along their columns. `first`: the block's first column; `width`: the columns of a group."""
    batch, columns, outputs = codes_BCO.shape
    assert codes_BCO[0].is_contiguous()
    assert gradient_BCO[0].is_contiguous()
    assert moment_BCC.stride(2) == 1
    moves = torch.empty(batch, columns, outputs, dtype=gradient_BCO.dtype, device=gradient_BCO.device)
    kernels.sweep_kernel[_grid(outputs, batch, COLUMN_ROWS)](
        codes_BCO,
        scale_BGO,
        zero_BGO if zero_BGO is not None else scale_BGO,
        gradient_BCO,
        moment_BCC,
        moves,
        outputs,
        columns,
        scale_BGO.shape[1],
        first,
        width,
        codes_BCO.stride(0),
        gradient_BCO.stride(0),
        moment_BCC.stride(0),
        moment_BCC.stride(1),
        float(scheme.code_min),
        float(scheme.code_max),
        HAS_ZERO=zero_BGO is not None,
        ROWS=COLUMN_ROWS,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=COLUMN_WARPS,
        **OPTIONS,
    )
    return moves


def tabu_steps(
    code_BOC: torch.Tensor,
    step_BOC: torch.Tensor,
    slope_BOC: torch.Tensor,
    square_BOC: torch.Tensor,
    gain_BO: torch.Tensor,
    moment_BCC: torch.Tensor,
    moves: int,
    tenure: int,
    scheme: Scheme,
) -> torch.Tensor:
    """The steps [B, O, C] that each code has moved at the best point that its row passed (tabu.py). Contiguous inputs,
    but for `moment_BCC`, which may be a slice of whole matrices."""
    batch, outputs, columns = code_BOC.shape
    rows = (code_BOC, step_BOC, slope_BOC, square_BOC, gain_BO)
    assert all(tensor.is_contiguous() for tensor in rows)
    assert moment_BCC.stride(2) == 1
    steps = torch.empty_like(step_BOC)
    kernels.tabu_kernel[_grid(outputs, batch, MOVE_ROWS)](
        *rows,
        moment_BCC,
        steps,
        outputs,
        columns,
        moves,
        tenure,
        moment_BCC.stride(0),
        moment_BCC.stride(1),
        float(scheme.code_min),
        float(scheme.code_max),
        ROWS=MOVE_ROWS,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=MOVE_ROWS,
        **OPTIONS,
    )
    return steps


def searched_scales(
    w_BOI: torch.Tensor,
    importance_BI: torch.Tensor,
    multiples: torch.Tensor,
    scheme: Scheme,
    tiny: float,
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales in the dtype `stored`, zero points fp32) [B, O, G]: for each group the multiple of its range that leaves
    the least error (grid.py). `tiny`: the least scale."""
    batch, outputs, inputs = w_BOI.shape
    groups, width = scheme.groups(inputs), scheme.width(inputs)
    scale = torch.empty(batch, outputs, groups, dtype=torch.float32, device=w_BOI.device)
    zero = torch.empty_like(scale)
    kernels.scale_kernel[(triton.cdiv(outputs, SEARCH_ROWS), groups, batch)](
        w_BOI.contiguous(),
        importance_BI.contiguous(),
        multiples,
        scale,
        zero,
        outputs,
        groups,
        width,
        len(multiples),
        float(scheme.code_min),
        float(scheme.code_max),
        tiny,
        SYMMETRIC=scheme.symmetric,
        IN_BF16=stored == torch.bfloat16,
        ROWS=SEARCH_ROWS,
        BLOCK=triton.next_power_of_2(width),
        num_warps=SEARCH_ROWS,
        **OPTIONS,
    )
    return scale.to(stored), zero
