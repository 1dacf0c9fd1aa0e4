"""The column and move loops as Triton kernels, for CUDA. The torch forms in gptq.py, refine.py, restarts.py, tabu.py
and grid.py define what they compute.

A loop over columns is thousands of launches in torch, and one here. A program is one warp. It holds some rows of one
matrix, with all columns of a block or stretch, in registers; no step waits for another warp. Products and sums are
rounded as IEEE says, one by one: fused multiply-adds are off, and divisions are exact. So a result depends neither on
how many rows a program holds nor on how a batch was cut.

What the columns share, a block of a factor or of a moment, is read row by row from global memory, and not staged in
shared memory. A step of GPTQ or of a sweep reads one row of 128 columns, 512 bytes, for 8 rows of weights: 4 cycles of
an SM's first-level cache beside 48 or more in which its four schedulers issue the step's 190 or more instructions. A
tabu move reads 512 bytes for each row of weights, 4 cycles beside some 25. The block is 64 KB, and neighbouring
programs share it: it fits the first-level cache of sm_80, sm_90 and sm_100 (192 to 256 KB an SM), and of sm_89 and
sm_120 (128 KB) as long as no copy of it is staged there as well. Triton cannot index shared memory by a number that is
known at run time only, either. These are counts from the code; no kernel has been timed on a GPU.

With `TRITON_INTERPRET=1` every kernel runs on the CPU (tests/test_kernels.py). benchmarks/compile_kernels.py compiles
them without a GPU and lists registers, spills and occupancy.

Shape legend: B matrices, O outputs (rows), I inputs, C columns of a block or stretch, G groups, K tries. Matrices are
[B, I, O], as in held.py: a column is contiguous.
"""

import triton
import triton.language as tl

# Half-even rounding: adding and subtracting 1.5 x 2^23 leaves the nearest integer. It holds for magnitudes up to 2^22.
ROUNDING = tl.constexpr(12582912.0)
SAFE = tl.constexpr(1048576.0)
# The least normal fp32 number.
LEAST = tl.constexpr(2.0**-126)


@triton.jit
def _nearest(value, scale, zero, code_min, code_max):
    """Nearest codes, as grid.round_codes gives them. A value far outside the range is clamped before it is rounded, as
    well: rounding would need more bits."""
    steps = tl.div_rn(value, scale)
    steps = tl.minimum(tl.maximum(steps, -SAFE), SAFE)
    codes = (steps + ROUNDING) - ROUNDING + zero
    return tl.minimum(tl.maximum(codes, code_min), code_max)


@triton.jit
def _bf16(x):
    """The nearest bf16, ties to even, as fp32: adding half of the last place rounds the bits above it."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _stored(scale, STORED: tl.constexpr):
    """A scale as it is stored: in bf16 or fp16, or as it is."""
    if STORED == "bf16":
        return _bf16(scale)
    elif STORED == "fp16":
        return scale.to(tl.float16).to(tl.float32)
    else:
        return scale


@triton.jit
def _of(x, here):
    """The column of each row [ROWS] where `here` [1, BLOCK] is true."""
    return tl.sum(tl.where(here, x, 0.0), axis=1)


@triton.jit
def _refit(codes, zero, step, slope, moment, stride, at, columns, groups, width, tiny, STORED: tl.constexpr):
    """(step, slope) after the least-squares scale of each group in turn (refine._refit). `step`: the scale of every
    column, as `zero` is its zero point."""
    for g in range(groups):
        inside = ((at >= g * width) & (at < (g + 1) * width))[None, :]
        c = tl.where(inside, codes - zero, 0.0)
        spread = tl.zeros_like(slope)
        for j in range(g * width, (g + 1) * width):
            row = tl.load(moment + j * stride + at, mask=at < columns, other=0.0)
            spread += _of(c, (at == j)[None, :])[:, None] * row[None, :]
        of_slope = tl.sum(c * slope, axis=1)
        curvature = tl.sum(c * spread, axis=1)
        old = _of(step, (at == g * width)[None, :])
        new = old + tl.div_rn(of_slope, tl.maximum(curvature, LEAST))
        new = _stored(tl.where(old > 0, tl.maximum(new, tiny), tl.minimum(new, -tiny)), STORED)
        change = new - old
        better = change * (change * curvature - 2.0 * of_slope) < 0
        step = tl.where(inside & better[:, None], new[:, None], step)
        slope = slope - spread * tl.where(better, change, 0.0)[:, None]
    return step, slope


@triton.jit
def _sweep(codes, zero, step, slope, moment, stride, at, columns, groups, width, code_min, code_max):
    """(codes, slope) after coordinate descent over the columns in turn (refine._sweep)."""
    for g in range(groups):
        first = (at == g * width)[None, :]
        scale, offset = _of(step, first), _of(zero, first)
        for j in range(g * width, (g + 1) * width):
            here = (at == j)[None, :]
            row = tl.load(moment + j * stride + at, mask=at < columns, other=0.0)
            own = tl.load(moment + j * stride + j)
            old = _of(codes, here)
            best = (old - offset) * scale + tl.div_rn(_of(slope, here), own)
            new = _nearest(best, scale, offset, code_min, code_max)
            codes = tl.where(here, new[:, None], codes)
            slope = slope - ((new - old) * scale)[:, None] * row[None, :]
    return codes, slope


@triton.jit
def _spread(x, moment, stride, at, columns):
    """x S [ROWS, BLOCK], S the moment [C, C]."""
    found = tl.zeros_like(x)
    for j in range(columns):
        row = tl.load(moment + j * stride + at, mask=at < columns, other=0.0)
        found += _of(x, (at == j)[None, :])[:, None] * row[None, :]
    return found


@triton.jit
def _narrow(x, NATIVE: tl.constexpr):
    """In bf16; in fp32 with a bf16's bits where bf16 is not NATIVE, as in the interpreter, which cannot multiply it."""
    if NATIVE:
        return x.to(tl.bfloat16)
    else:
        return _bf16(x)


@triton.jit
def product_kernel(
    a_ptr,
    x_ptr,
    out_ptr,
    columns,
    outputs,
    inputs,
    a_stride_b,
    a_stride_c,
    a_stride_i,
    x_stride,
    NATIVE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """a [B, C, I] x x [B, I, O] -> out [B, C, O], fp32, on the tensor cores: each number in two bf16 parts, the product
    of the smaller parts left out, sums in fp32 (core/products.py). A tile is summed by one program, in one order."""
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.arange(0, INPUTS)
    a_place = a_ptr + b * a_stride_b + c[:, None] * a_stride_c + i[None, :] * a_stride_i
    x_place = x_ptr + b * x_stride + i[:, None] * outputs + o[None, :]
    total = tl.zeros([COLUMNS, OUTPUTS], tl.float32)
    for begin in range(0, inputs, INPUTS):
        inside = i < inputs - begin
        a = tl.load(a_place, mask=(c < columns)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_place, mask=inside[:, None] & (o < outputs)[None, :], other=0.0)
        a_most, x_most = _narrow(a, NATIVE), _narrow(x, NATIVE)
        a_rest = _narrow(a - a_most.to(tl.float32), NATIVE)
        x_rest = _narrow(x - x_most.to(tl.float32), NATIVE)
        total = tl.dot(a_rest, x_most, total)
        total = tl.dot(a_most, x_rest, total)
        total = tl.dot(a_most, x_most, total)
        a_place += INPUTS * a_stride_i
        x_place += INPUTS * outputs
    out = out_ptr + (b * columns + c[:, None]) * outputs + o[None, :]
    tl.store(out, total, mask=(c < columns)[:, None] & (o < outputs)[None, :])


@triton.jit
def gptq_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    error_ptr,
    root_ptr,
    order_ptr,
    due_ptr,
    left_ptr,
    outputs,
    columns,
    width,
    codes_stride,
    scale_stride,
    error_stride,
    root_stride_b,
    root_stride_i,
    order_stride,
    left_stride,
    code_min,
    code_max,
    HAS_ZERO: tl.constexpr,
    HAS_DUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds the columns of a block in their order; each makes good what the columns before it left.

    codes int8 [B, I, O], scale and zero [B, G, O], error [B, I, O] (before: the weights), root [B, C, C], order int64
    [B, C], due [B, C, O] from the columns before the block. Writes the block's columns of codes and error, and the
    errors in their order into left [B, C, O].
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    order_b = order_ptr + b * order_stride
    root_b = root_ptr + b * root_stride_b
    places = tl.load(order_b + at, mask=at < columns, other=0)
    w = tl.load(error_ptr + b * error_stride + places[None, :] * outputs + rows[:, None], mask=mask, other=0.0)
    if HAS_DUE:
        due = tl.load(due_ptr + (b * columns + at[None, :]) * outputs + rows[:, None], mask=mask, other=0.0)
    else:
        due = tl.zeros_like(w)
    for j in range(columns):
        here = (at == j)[None, :]
        place = tl.load(order_b + j)
        of_group = b * scale_stride + place // width * outputs + rows
        scale = tl.load(scale_ptr + of_group, mask=there, other=1.0)
        zero = tl.load(zero_ptr + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(scale)
        row = tl.load(root_b + j * root_stride_i + at, mask=at < columns, other=0.0)
        own = tl.load(root_b + j * root_stride_i + j)
        own_w = _of(w, here)
        codes = _nearest(own_w + tl.div_rn(_of(due, here), own), scale, zero, code_min, code_max)
        error = own_w - (codes - zero) * scale
        due = due + error[:, None] * row[None, :]
        tl.store(codes_ptr + b * codes_stride + place * outputs + rows, codes.to(tl.int8), mask=there)
        tl.store(error_ptr + b * error_stride + place * outputs + rows, error, mask=there)
        tl.store(left_ptr + b * left_stride + j * outputs + rows, error, mask=there)


@triton.jit
def refine_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    error_ptr,
    slope_ptr,
    moment_ptr,
    moves_ptr,
    outputs,
    columns,
    groups,
    width,
    codes_stride,
    scale_stride,
    error_stride,
    slope_stride,
    moment_stride_b,
    moment_stride_i,
    code_min,
    code_max,
    tiny,
    HAS_ZERO: tl.constexpr,
    REFIT: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Refits the scales of a stretch and sweeps its codes; or sweeps a block of one wide group.

    codes int8 [B, C, O], scale and zero [B, G, O], error and slope [B, C, O], moment [B, C, C]; codes, scale and error
    change in place. Without REFIT, `moves` [B, C, O] gets what the values moved by.
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    place = at[None, :] * outputs + rows[:, None]
    of_group = (at // width)[None, :] * outputs + rows[:, None] + b * scale_stride
    codes = tl.load(codes_ptr + b * codes_stride + place, mask=mask, other=0).to(tl.float32)
    step = tl.load(scale_ptr + of_group, mask=mask, other=1.0)
    zero = tl.load(zero_ptr + of_group, mask=mask, other=0.0) if HAS_ZERO else tl.zeros_like(step)
    slope = tl.load(slope_ptr + b * slope_stride + place, mask=mask, other=0.0)
    moment = moment_ptr + b * moment_stride_b
    value = (codes - zero) * step
    if REFIT:
        step, slope = _refit(
            codes, zero, step, slope, moment, moment_stride_i, at, columns, groups, width, tiny, STORED
        )
    codes, slope = _sweep(
        codes, zero, step, slope, moment, moment_stride_i, at, columns, groups, width, code_min, code_max
    )
    moved = (codes - zero) * step - value
    error = tl.load(error_ptr + b * error_stride + place, mask=mask, other=0.0)
    tl.store(error_ptr + b * error_stride + place, error - moved, mask=mask)
    tl.store(codes_ptr + b * codes_stride + place, codes.to(tl.int8), mask=mask)
    if REFIT:
        for g in range(groups):
            scale = _of(step, (at == g * width)[None, :])
            tl.store(scale_ptr + b * scale_stride + g * outputs + rows, scale, mask=there)
    else:
        tl.store(moves_ptr + (b * columns + at[None, :]) * outputs + rows[:, None], moved, mask=mask)


@triton.jit
def restart_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    error_ptr,
    slope_ptr,
    moment_ptr,
    inverse_ptr,
    order_ptr,
    rank_ptr,
    root_ptr,
    batch,
    outputs,
    columns,
    groups,
    width,
    tries,
    rounds,
    codes_stride,
    scale_stride,
    error_stride,
    moment_stride_b,
    moment_stride_i,
    code_min,
    code_max,
    tiny,
    HAS_ZERO: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All tries of a stretch (restarts._try): GPTQ in an order of its own, then refinement. Each row keeps its best.

    codes int8 [B, C, O], scale and zero [B, G, O], error and slope [B, C, O], moment and inverse [B, C, C], order and
    rank int64 [K, B, C] (rank: the place of a column in the order), root [K, B, C, C]; codes, scale and error change in
    place.
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    place = at[None, :] * outputs + rows[:, None]
    of_group = (at // width)[None, :] * outputs + rows[:, None] + b * scale_stride
    held = tl.load(codes_ptr + b * codes_stride + place, mask=mask, other=0).to(tl.float32)
    held_step = tl.load(scale_ptr + of_group, mask=mask, other=1.0)
    zero = tl.load(zero_ptr + of_group, mask=mask, other=0.0) if HAS_ZERO else tl.zeros_like(held_step)
    slope = tl.load(slope_ptr + (b * columns + at[None, :]) * outputs + rows[:, None], mask=mask, other=0.0)
    moment = moment_ptr + b * moment_stride_b
    value = (held - zero) * held_step
    aim = value + _spread(slope, inverse_ptr + b * columns * columns, columns, at, columns)
    best, best_step = held, held_step
    least = tl.zeros([ROWS], tl.float32)
    for k in range(tries):
        of_try = (k * batch + b) * columns
        root = root_ptr + of_try * columns
        rank = tl.load(rank_ptr + of_try + at, mask=at < columns, other=0)
        codes = held
        due = tl.zeros_like(aim)
        for i in range(columns):
            j = tl.load(order_ptr + of_try + i)
            here = (at == j)[None, :]
            row = tl.load(root + i * columns + rank, mask=at < columns, other=0.0)
            own = tl.load(root + i * columns + i)
            scale, offset, own_aim = _of(held_step, here), _of(zero, here), _of(aim, here)
            new = _nearest(own_aim + tl.div_rn(_of(due, here), own), scale, offset, code_min, code_max)
            codes = tl.where(here, new[:, None], codes)
            due = due + (own_aim - (new - offset) * scale)[:, None] * row[None, :]
        step = held_step
        local = _spread(aim - (codes - zero) * step, moment, moment_stride_i, at, columns)
        for _ in range(rounds):
            step, local = _refit(
                codes, zero, step, local, moment, moment_stride_i, at, columns, groups, width, tiny, STORED
            )
            codes, local = _sweep(
                codes, zero, step, local, moment, moment_stride_i, at, columns, groups, width, code_min, code_max
            )
        moved = (codes - zero) * step - value
        spread = _spread(moved, moment, moment_stride_i, at, columns)
        change = tl.sum((spread - 2.0 * slope) * moved, axis=1)
        better = change < least
        least = tl.where(better, change, least)
        best = tl.where(better[:, None], codes, best)
        best_step = tl.where(better[:, None], step, best_step)
    error = tl.load(error_ptr + b * error_stride + place, mask=mask, other=0.0)
    tl.store(error_ptr + b * error_stride + place, error - ((best - zero) * best_step - value), mask=mask)
    tl.store(codes_ptr + b * codes_stride + place, best.to(tl.int8), mask=mask)
    for g in range(groups):
        scale = _of(best_step, (at == g * width)[None, :])
        tl.store(scale_ptr + b * scale_stride + g * outputs + rows, scale, mask=there)


@triton.jit
def tabu_kernel(
    codes_ptr,
    scale_ptr,
    error_ptr,
    slope_ptr,
    moment_ptr,
    outputs,
    columns,
    width,
    moves,
    tenure,
    codes_stride,
    scale_stride,
    error_stride,
    moment_stride_b,
    moment_stride_i,
    code_min,
    code_max,
    least_gain,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All moves of a stretch (tabu.py), kept where J falls.

    codes int8 [B, C, O] and error [B, C, O] change in place; scale [B, G, O], slope [B, C, O], moment [B, C, C].
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    at = tl.arange(0, BLOCK)
    mask = there[:, None] & (at < columns)[None, :]
    place = at[None, :] * outputs + rows[:, None]
    infinity = float("inf")
    moment = moment_ptr + b * moment_stride_b
    of_group = (at // width)[None, :] * outputs + rows[:, None] + b * scale_stride
    code = tl.load(codes_ptr + b * codes_stride + place, mask=mask, other=0).to(tl.float32)
    step = tl.load(scale_ptr + of_group, mask=mask, other=0.0)
    given = tl.load(slope_ptr + (b * columns + at[None, :]) * outputs + rows[:, None], mask=mask, other=0.0)
    own = tl.load(moment + at * moment_stride_i + at, mask=at < columns, other=0.0)
    square = step * step * own[None, :]
    gain = least_gain * tl.div_rn(tl.sum(square, axis=1), columns * 1.0)
    square = tl.where(mask, square, infinity)
    slope = 2.0 * step * given
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
        sign = tl.where(stuck, 0.0, tl.where(_of(rise, here) <= least, 1.0, -1.0))
        free = tl.where(here, k + 1 + tenure, free)
        code = tl.where(here, code + sign[:, None], code)
        moved = tl.where(here, moved + sign[:, None], moved)
        by = sign * _of(step, here)
        row = tl.load(moment + chosen[:, None] * moment_stride_i + at[None, :], mask=mask, other=0.0)
        slope = slope - (row * double) * by[:, None]
        now = now + tl.where(stuck, 0.0, least)
        better = now < best - gain
        best = tl.where(better, now, best)
        best_moved = tl.where(better[:, None], moved, best_moved)
    # The change of J is computed anew: the search's running sums accumulate error.
    by = best_moved * step
    spread = _spread(by, moment, moment_stride_i, at, columns)
    better = (tl.sum((spread - 2.0 * given) * by, axis=1) < 0)[:, None]
    start = tl.load(codes_ptr + b * codes_stride + place, mask=mask, other=0).to(tl.float32)
    error = tl.load(error_ptr + b * error_stride + place, mask=mask, other=0.0)
    tl.store(codes_ptr + b * codes_stride + place, tl.where(better, start + best_moved, start).to(tl.int8), mask=mask)
    tl.store(error_ptr + b * error_stride + place, tl.where(better, error - by, error), mask=mask)


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
    SIGNED: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of all multiples of a group's range (grid._search). w [B, O, G x width], importance [B, G x width] ->
    scale and zero point [B, O, G], fp32. A program holds one group of some rows. SIGNED: a scale has the sign of
    grid.signs."""
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = at < width
    mask = (rows < outputs)[:, None] & inside[None, :]
    inputs = groups * width
    w = tl.load(w_ptr + (b * outputs + rows)[:, None] * inputs + g * width + at[None, :], mask=mask, other=0.0)
    importance = tl.load(importance_ptr + b * inputs + g * width + at, mask=inside, other=0.0)[None, :]
    if SIGNED:
        largest = tl.argmax(tl.abs(w), axis=1, tie_break_left=True)
        sign = tl.where(_of(w, at[None, :] == largest[:, None]) > 0, -1.0, 1.0)
        w = w * sign[:, None]
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
            scale = _stored(tl.maximum(peak * multiple, tiny), STORED)
            zero = tl.zeros([ROWS], tl.float32)
        else:
            bottom = low * multiple
            scale = _stored(tl.maximum(tl.div_rn(high * multiple - bottom, code_max - code_min), tiny), STORED)
            zero = (code_min - tl.div_rn(bottom, scale) + ROUNDING) - ROUNDING
            zero = tl.minimum(tl.maximum(zero, code_min), code_max)
        codes = _nearest(w, scale[:, None], zero[:, None], code_min, code_max)
        off = (codes - zero[:, None]) * scale[:, None] - w
        error = tl.sum(off * off * importance, axis=1)
        better = (error < best) | (k < 0)
        best = tl.where(better & (k >= 0), error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    if SIGNED:
        best_scale = best_scale * sign
    place = (b * outputs + rows) * groups + g
    tl.store(scale_ptr + place, best_scale, mask=rows < outputs)
    if not SYMMETRIC:
        tl.store(zero_ptr + place, best_zero, mask=rows < outputs)
