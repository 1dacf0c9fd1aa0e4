"""What quantizing a site keeps a card busy with: the steps of quantize/site.py and blocks/quantize.py, in their order.

Shape legend: B matrices of a site, O outputs, I inputs, N columns of what a solve is for. A number of fp32 has 4 bytes;
a pass over n numbers that reads r of them and writes w moves 4 (r + w) n.
"""

from dataclasses import dataclass

from ..core.card_rates import (
    GPTQ_COLUMN,
    GPTQ_ROWS,
    REFINE_ROWS,
    REFIT_COLUMN,
    RESTART_COLUMN,
    RESTART_ROWS,
    SCALE_MULTIPLE,
    SCALE_ROWS,
    SWEEP_COLUMN,
    TABU_COLUMN,
    TABU_MOVE,
    TABU_ROWS,
    TRY_COLUMN,
    TRY_ROUND,
)
from ..core.method import Method
from ..core.products import SOLVED_COLUMNS
from ..quantize import restarts, tabu
from ..quantize.grid import SEARCH_STEPS
from ..quantize.held import BLOCK_COLUMNS
from .busy import Busy, Card
from .layer_kernels import TILED

# Products of two fp32 matrices in bf16 parts (core/products.py): two parts each, and the smallest product left out.
FP32_PAIRS, MIXED_PAIRS = 3, 2
# Of three parts each, in a solve.
SOLVED_PAIRS = 6
# Bytes of cutting an fp32 number into two parts: rounded (6), what is left (10), rounded (6).
PARTS_BYTES = 22


@dataclass(frozen=True)
class SolvedSite:
    """The matrices of one site. `metric`: whether outputs have a metric, and whether it is one for all (`shared`).
    `miss`: N of the aim, 0 without one."""

    matrices: int
    outputs: int
    inputs: int
    miss: int
    # Whether the miss is at the inputs: then its solution is multiplied by the weights.
    miss_at_inputs: bool
    metric: bool = False
    shared: bool = True


def quantized(card: Card, site: SolvedSite, method: Method) -> Busy:
    """All steps of `_quantize_site`, but the writing of its shard."""
    busy = stacked(card, site) + aimed(card, site) + _prepared(card, site, method)
    blocks = method.output_blocks if site.metric and method.output_blocks > 1 else 1
    if blocks > 1:
        busy += _row_blocks(card, site, blocks)
    busy += _searches(card, site, method, blocks)
    return busy + _error_left(card, site) + packed(card, site)


def stacked(card: Card, site: SolvedSite) -> Busy:
    """bf16 to fp32 (6 bytes a weight), joined (8), and put into the batch (8)."""
    return card.moved(22.0 * site.matrices * site.outputs * site.inputs, 5.0 * site.matrices)


def aimed(card: Card, site: SolvedSite) -> Busy:
    """The mean moments of a batch, and quantize/correction.py for each matrix: the factor of the moment with its ridge,
    a solve, and for inner matrices the weights times the solution."""
    b, o, i, n = site.matrices, site.outputs, site.inputs, site.miss
    # SiteMoments.shrunk: sums over weights, where, times rows, plus the pooled moment, over rows: six passes.
    busy = card.moved(b * 56.0 * i * i, 8)
    if not n:
        return busy
    # The mean miss is three passes, the ridged moment a copy, and the new weights two.
    busy += card.moved(b * (24.0 * n * i + 8.0 * i * i + 16.0 * o * i), 20.0 * b)
    busy += card.factored(i**3 / 3, b) + _solved(card, b, n, i)
    if site.miss_at_inputs:
        busy += card.moved(b * PARTS_BYTES * (1.0 * o * i + i * i), 12.0 * b)
        busy += card.product(o, i, i, b, parts=FP32_PAIRS)
    return busy


def _solved(card: Card, b: int, n: int, i: int) -> Busy:
    """products.solved_from_right: two triangular solves by blocks of columns, and products for the rest. What is
    solved and the factor are cut into three parts (26 bytes), of which the former's are put together (12)."""
    blocks, c = -(-i // SOLVED_COLUMNS), min(i, SOLVED_COLUMNS)
    busy = card.factored(1.0 * n * c * c, 2 * b * blocks)
    for begin in range(c, i, c):
        busy += card.product(n, begin, min(c, i - begin), 2 * b, parts=SOLVED_PAIRS)
    return busy + card.moved(b * (26.0 * i * i + 2 * 50.0 * n * i), 40.0 * b * blocks)


def _prepared(card: Card, site: SolvedSite, method: Method) -> Busy:
    """gptq.prepare: ordered twice (16 bytes a number), factored, turned, checked, copied (20), and the damped moment
    (8); and the factors of restarts."""
    b, i = site.matrices, site.inputs
    busy = card.moved(44.0 * b * i * i, 12.0 * b) + card.factored(i**3 / 3, b)
    if method.restarts:
        stretches, c = -(-i // BLOCK_COLUMNS), min(i, BLOCK_COLUMNS)
        tries = restarts.PASSES * method.restarts
        # Each try's stretch is ordered, factored and turned: nine passes.
        busy += card.moved(36.0 * b * stretches * tries * c * c, 20.0 * tries)
        busy += card.factored(b * stretches * c**3 / 3, tries) + card.factored(b * stretches * 2.0 * c**3, 1)
    return busy


def _searches(card: Card, site: SolvedSite, method: Method, blocks: int) -> Busy:
    """site._searched_codes, for each of `blocks` parts of the rows: products for the slopes of each stretch, and one
    kernel a stretch."""
    b, o, i = site.matrices, site.outputs, site.inputs
    weights, stretches = 1.0 * b * o * i, -(-i // BLOCK_COLUMNS)
    launches = blocks * stretches

    def slopes(share: float) -> Busy:
        return card.product(b * o / blocks, i * share, BLOCK_COLUMNS, launches, TILED, FP32_PAIRS)

    def kernel(a_column: float, rows: int) -> Busy:
        return card.issued(weights * a_column / rows, launches)

    refined = slopes(1.0) + kernel(REFIT_COLUMN + SWEEP_COLUMN, REFINE_ROWS)
    rounds = float(method.refine_rounds)
    busy = card.moved(8.0 * weights, 4 * blocks) + slopes(0.5) + kernel(GPTQ_COLUMN, GPTQ_ROWS)
    busy += card.issued(weights / BLOCK_COLUMNS / SCALE_ROWS * SCALE_MULTIPLE * (SEARCH_STEPS + 1), 2 * blocks)
    if method.restarts:
        tried = RESTART_COLUMN + method.restarts * (TRY_COLUMN + TRY_ROUND * method.refine_rounds)
        busy += (slopes(1.0) + kernel(tried, RESTART_ROWS)) * restarts.PASSES
        rounds += restarts.PASSES
    if method.tabu_moves:
        moved = method.tabu_moves * TABU_MOVE / BLOCK_COLUMNS + TABU_COLUMN
        busy += (slopes(1.0) + kernel(moved, TABU_ROWS)) * tabu.PASSES
        rounds += tabu.PASSES
    # Codes, scales and their transposes at the end.
    return busy + refined * rounds + card.moved(4.0 * weights, 6 * blocks)


def _row_blocks(card: Card, site: SolvedSite, blocks: int) -> Busy:
    """metric.quantize_by_row_blocks beside the searches, and the metric of gates and ups."""
    b, o, i = site.matrices, site.outputs, site.inputs
    metrics, rows = 1 if site.shared else b, o / blocks
    busy = card.moved(44.0 * metrics * o * o, 12.0 * metrics) + card.factored(o**3 / 3, metrics)
    # What the rows before left, as products and as solves; rows are taken and put back: ten passes.
    for begin in range(1, blocks):
        busy += card.product(b * i, begin * rows, rows, 1, TILED, FP32_PAIRS) + card.factored(b * rows * rows * i)
    busy += card.moved(b * 40.0 * o * i, 20.0 * blocks)
    if not site.shared:
        # swiglu_metric: half the outputs, F, to the hidden size, I: (down^T M) down, times the slopes.
        f = o / 2
        busy += card.product(f, i, i, b, parts=MIXED_PAIRS) + card.product(f, i, f, b, parts=MIXED_PAIRS)
        busy += card.moved(b * (PARTS_BYTES * (f * i + i * i) + 56.0 * o * o), 30.0 * b)
    return busy


def _error_left(card: Card, site: SolvedSite) -> Busy:
    """site.relative_output_error: tr(x S x^T) of the weights and of their errors."""
    b, o, i = site.matrices, site.outputs, site.inputs
    each = card.product(o, i, i, parts=FP32_PAIRS) + card.moved(PARTS_BYTES * (1.0 * o * i + i * i) + 16.0 * o * i, 12)
    return each * (2 * b) + card.moved(25.0 * b * o * i, 6 * b)


def packed(card: Card, site: SolvedSite) -> Busy:
    """Eight codes to a word (32 bytes a weight in torch's operations), and the weights as a reader will see them
    (24)."""
    weights = 1.0 * site.matrices * site.outputs * site.inputs
    return card.moved(56.0 * weights, 50.0 * site.matrices)
