"""The memory and the disk that a run takes: estimates in bytes, from the counted work."""

from ..core.slices import ARRAYS_PER_SLICE, COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from .work import RunWork

# Experts are held as they are stored, in bf16.
STORED_BYTES = 2
# For a parameter that is tuned: as it was, its gradient, master, master's gradient, and the optimizer's two moments.
TUNING_BYTES = 2 + 2 + 4 + 4 + 8
# The interpreter with torch and transformers imported, texts and tokenizer: 0.45 GB before the first block, and 0.1 to
# 0.2 GB of buffers that come and go. Measured on the embedded model, whose weights are small beside it.
BASE_RAM_BYTES = 550_000_000


def largest_block_bytes(work: RunWork) -> int:
    return max(block.parameters for block in work.blocks) * STORED_BYTES


def compute_bytes(work: RunWork, site_budget_bytes: int) -> int:
    """What lies on the device at once, at most: RAM on a CPU."""
    needed = _verifying_bytes(work)
    return max(needed, _quantizing_bytes(work, site_budget_bytes)) if work.method.statistics else needed


def _verifying_bytes(work: RunWork) -> int:
    """Both versions of one block, a slice of the logits, and both heads."""
    vocabulary = work.adapter.vocab_size
    logits = 4 * ARRAYS_PER_SLICE * TOKENS_PER_SLICE * min(COLUMNS_PER_SLICE, vocabulary)
    return 2 * largest_block_bytes(work) + logits + 2 * STORED_BYTES * vocabulary * work.adapter.hidden_size


def _quantizing_bytes(work: RunWork, site_budget_bytes: int) -> int:
    """The block as it was and as it becomes; beside them the moments of one turn and one part of a site, which holds a
    matrix at least; or, before there are moments, what tuning holds."""
    moments = max(block.moment_bytes for block in work.blocks)
    matrix = max(block.matrix_bytes for block in work.blocks)
    tuned = max(block.feed_forward_parameters for block in work.blocks) if work.method.tune_epochs else 0
    return 2 * largest_block_bytes(work) + max(moments + max(site_budget_bytes, matrix), tuned * TUNING_BYTES)


def ram_bytes(work: RunWork, compute: int, on_cpu: bool) -> int:
    """`compute`: of compute_bytes."""
    largest_shard = max(shard.data_bytes for shard in work.plan.pieces)
    return BASE_RAM_BYTES + largest_shard + (compute if on_cpu else largest_block_bytes(work) // 16)


def disk_bytes(work: RunWork) -> int:
    """The most that the work directory and OUT hold together."""
    emitted = work.plan.disk_bytes
    # Verification keeps its rows before and after a block, of both versions.
    needed = emitted + 4 * work.tokens.evaluation * work.adapter.hidden_size * work.itemsize
    if not work.method.statistics:
        return needed
    needed = max(needed, emitted + 7 * work.stream_bytes)
    if work.method.walk_back is None:
        return needed
    return max(needed, (2 + work.method.walk_back(work.adapter.n_blocks)) * work.stream_bytes)
