"""The column and move loops as Triton kernels, for CUDA. The torch forms in gptq.py, refine.py and tabu.py define what
they compute.

A loop over columns is thousands of launches in torch, and one here. A program holds some rows of one matrix with all
columns of a block in registers. What the columns share (the block of a factor or of a moment) is read row by row and
stays in the card's first-level cache. Products and sums are rounded as IEEE says, one by one: fused multiply-adds are
off, and divisions are exact. So a result depends neither on how many rows a program holds nor on how a batch was cut.

With `TRITON_INTERPRET=1` every kernel runs on the CPU (tests/test_kernels.py). benchmarks/kernels.py compiles them
without a GPU and lists registers, spills and occupancy.

Shape legend: B matrices, O outputs (rows), C columns of a block, G groups; t marks a transposed matrix [B, C, O].
"""

import triton
import triton.language as tl

# Half-even rounding: adding and subtracting 1.5 x 2^23 leaves the nearest integer. It holds for magnitudes up to 2^22.
ROUNDING = tl.constexpr(12582912.0)
SAFE = tl.constexpr(1048576.0)


@triton.jit
def _nearest(value, scale, zero, code_min, code_max):
    """Nearest codes, as grid.round_codes gives them. A value far outside the range is clamped before it is rounded, as
    well: rounding would need more bits."""
    steps = tl.div_rn(value, scale)
    steps = tl.minimum(tl.maximum(steps, -SAFE), SAFE)
    codes = (steps + ROUNDING) - ROUNDING + zero
    return tl.minimum(tl.maximum(codes, code_min), code_max)


@triton.jit
def gptq_kernel(
    w_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    codes_ptr,
    errors_ptr,
    outputs,
    columns,
    groups,
    w_stride,
    upper_stride_b,
    upper_stride_i,
    code_min,
    code_max,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds the columns of a block in turn; each error is spread over the block's later columns.

    w [B, C, O], upper [B, C, C], scale and zero [B, G, O], group int32 [B, C] -> codes int8 and errors [B, C, O].
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    w = tl.load(w_ptr + b * w_stride + at[None, :] * outputs + rows[:, None], mask=mask, other=0.0)
    upper_b = upper_ptr + b * upper_stride_b
    for j in range(columns):
        here = (at == j)[None, :]
        w_j = tl.sum(tl.where(here, w, 0.0), axis=1)
        group = tl.load(group_ptr + b * columns + j)
        place = (b * groups + group) * outputs + rows
        scale = tl.load(scale_ptr + place, mask=there, other=1.0)
        zero = tl.load(zero_ptr + place, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(scale)
        codes = _nearest(w_j, scale, zero, code_min, code_max)
        upper = tl.load(upper_b + j * upper_stride_i + at, mask=at < columns, other=0.0)
        own = tl.sum(tl.where(at == j, upper, 0.0), axis=0)
        error = tl.div_rn(w_j - (codes - zero) * scale, own)
        later = (at > j)[None, :]
        w = tl.where(later, w - error[:, None] * upper[None, :], w)
        out = (b * columns + j) * outputs + rows
        tl.store(codes_ptr + out, codes.to(tl.int8), mask=there)
        tl.store(errors_ptr + out, error, mask=there)


@triton.jit
def sweep_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    gradient_ptr,
    moment_ptr,
    moves_ptr,
    outputs,
    columns,
    groups,
    first,
    width,
    codes_stride,
    gradient_stride,
    moment_stride_b,
    moment_stride_i,
    code_min,
    code_max,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coordinate descent over the columns of a block, in turn.

    codes fp32 [B, C, O] in place, scale and zero [B, G, O], gradient [B, C, O], moment [B, C, C] -> moves [B, C, O].
    `first`: the block's first column in the matrix; `width`: the columns of a group.
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    place = at[None, :] * outputs + rows[:, None]
    slope = tl.load(gradient_ptr + b * gradient_stride + place, mask=mask, other=0.0)
    old = tl.load(codes_ptr + b * codes_stride + place, mask=mask, other=0.0)
    moment_b = moment_ptr + b * moment_stride_b
    for j in range(columns):
        here = (at == j)[None, :]
        slope_j = tl.sum(tl.where(here, slope, 0.0), axis=1)
        old_j = tl.sum(tl.where(here, old, 0.0), axis=1)
        of_group = (b * groups + (first + j) // width) * outputs + rows
        scale = tl.load(scale_ptr + of_group, mask=there, other=1.0)
        zero = tl.load(zero_ptr + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(scale)
        moment = tl.load(moment_b + j * moment_stride_i + at, mask=at < columns, other=0.0)
        own = tl.sum(tl.where(at == j, moment, 0.0), axis=0)
        best = (old_j - zero) * scale + tl.div_rn(slope_j, own)
        new = _nearest(best, scale, zero, code_min, code_max)
        move = (new - old_j) * scale
        later = (at > j)[None, :]
        slope = tl.where(later, slope - move[:, None] * moment[None, :], slope)
        tl.store(codes_ptr + b * codes_stride + j * outputs + rows, new, mask=there)
        tl.store(moves_ptr + (b * columns + j) * outputs + rows, move, mask=there)


@triton.jit
def tabu_kernel(
    code_ptr,
    step_ptr,
    slope_ptr,
    square_ptr,
    gain_ptr,
    moment_ptr,
    steps_ptr,
    outputs,
    columns,
    moves,
    tenure,
    moment_stride_b,
    moment_stride_i,
    code_min,
    code_max,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All moves of a stretch. Of each row [C]: code, step, slope (2 a G), square (a^2 S_ii); gain: one number.

    moment [B, C, C] -> steps [B, O, C]: what each code has moved at the best point of its row.
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    place = (b * outputs + rows)[:, None] * columns + at[None, :]
    infinity = float("inf")
    code = tl.load(code_ptr + place, mask=mask, other=0.0)
    step = tl.load(step_ptr + place, mask=mask, other=0.0)
    slope = tl.load(slope_ptr + place, mask=mask, other=0.0)
    square = tl.load(square_ptr + place, mask=mask, other=infinity)
    gain = tl.load(gain_ptr + b * outputs + rows, mask=there, other=0.0)
    double = step * 2.0
    moved = tl.zeros_like(code)
    best_moved = tl.zeros_like(code)
    # The move after which a code rests no longer.
    free = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    now = tl.zeros_like(gain)
    best = tl.zeros_like(gain)
    for k in range(moves):
        rise = tl.where(code >= code_max, infinity, square) - slope
        fall = tl.where(code <= code_min, infinity, square) + slope
        cost = tl.minimum(rise, fall)
        # A resting code may still move if its row reaches a new best point by that.
        barred = (free > k) & (now[:, None] + cost >= (best - gain)[:, None])
        cost = tl.where(barred, infinity, cost)
        least, chosen = tl.min(cost, axis=1, return_indices=True, return_indices_tie_break_left=True)
        here = at[None, :] == chosen[:, None]
        stuck = least == infinity
        rise_here = tl.sum(tl.where(here, rise, 0.0), axis=1)
        sign = tl.where(stuck, 0.0, tl.where(rise_here <= least, 1.0, -1.0))
        free = tl.where(here, k + 1 + tenure, free)
        code = tl.where(here, code + sign[:, None], code)
        moved = tl.where(here, moved + sign[:, None], moved)
        by = sign * tl.sum(tl.where(here, step, 0.0), axis=1)
        row = tl.load(
            moment_ptr + b * moment_stride_b + chosen[:, None] * moment_stride_i + at[None, :], mask=mask, other=0.0
        )
        slope = slope - (row * double) * by[:, None]
        now = now + tl.where(stuck, 0.0, least)
        better = now < best - gain
        best = tl.where(better, now, best)
        best_moved = tl.where(better[:, None], moved, best_moved)
    tl.store(steps_ptr + place, best_moved, mask=mask)


@triton.jit
def _bf16(x):
    """The nearest bf16, ties to even, as fp32: adding half of the last place rounds the bits above it."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _stored(scale, tiny, IN_BF16: tl.constexpr):
    """A scale as it is stored, in bf16 or fp16; never zero."""
    scale = tl.maximum(scale, tiny)
    return _bf16(scale) if IN_BF16 else scale.to(tl.float16).to(tl.float32)


@triton.jit
def scale_kernel(
    w_ptr,
    importance_ptr,
    multiples_ptr,
    scale_ptr,
    zero_ptr,
    outputs,
    groups,
    width,
    n_multiples,
    code_min,
    code_max,
    tiny,
    SYMMETRIC: tl.constexpr,
    IN_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of all multiples of a group's range. w [B, O, G x width], importance [B, G x width] -> scale and zero
    point [B, O, G], fp32. A program holds one group of some rows."""
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = at < width
    mask = (rows < outputs)[:, None] & inside[None, :]
    inputs = groups * width
    w = tl.load(w_ptr + (b * outputs + rows)[:, None] * inputs + g * width + at[None, :], mask=mask, other=0.0)
    importance = tl.load(importance_ptr + b * inputs + g * width + at, mask=inside, other=0.0)[None, :]
    # A masked column is a zero: it changes no range that includes zero.
    peak = tl.div_rn(tl.max(tl.abs(w), axis=1), -code_min)
    low = tl.minimum(tl.min(w, axis=1), 0.0)
    high = tl.maximum(tl.max(w, axis=1), 0.0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    best_scale = tl.zeros([ROWS], tl.float32)
    best_zero = tl.zeros([ROWS], tl.float32)
    # The first try is the whole range: what is found where no try leaves a finite error.
    for k in range(-1, n_multiples):
        multiple = tl.load(multiples_ptr + k, mask=k >= 0, other=1.0)
        if SYMMETRIC:
            scale = _stored(peak * multiple, tiny, IN_BF16)
            zero = tl.zeros([ROWS], tl.float32)
        else:
            bottom = low * multiple
            scale = _stored(tl.div_rn(high * multiple - bottom, code_max - code_min), tiny, IN_BF16)
            zero = (code_min - tl.div_rn(bottom, scale) + ROUNDING) - ROUNDING
            zero = tl.minimum(tl.maximum(zero, code_min), code_max)
        codes = _nearest(w, scale[:, None], zero[:, None], code_min, code_max)
        off = (codes - zero[:, None]) * scale[:, None] - w
        error = tl.sum(off * off * importance, axis=1)
        better = (error < best) | (k < 0)
        best = tl.where(better & (k >= 0), error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    place = (b * outputs + rows) * groups + g
    tl.store(scale_ptr + place, best_scale, mask=rows < outputs)
    tl.store(zero_ptr + place, best_zero, mask=rows < outputs)
