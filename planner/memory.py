"""Estimates the memory and disk of a run, in bytes, from its counted work (work.py)."""

from math import prod

from ..core.slices import ARRAYS_PER_SLICE, COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from ..models.adapter import Adapter
from ..models.prefetch import pinned_bytes
from ..models.slabs import key_of
from .work import RunWork

# A run holds experts in their stored type, bf16.
STORED_BYTES = 2
# Per tuned parameter: its gradient, the master copy, the optimizer's two moments. (tests/test_tuning.py counts them.)
TUNING_BYTES = 2 + 4 + 8
# The interpreter with torch, transformers, texts and tokenizer takes 0.45 GB before the first block. Temporary buffers
# take another 0.1 to 0.2 GB. Both were measured on the embedded model, whose own weights are small beside them.
BASE_RAM_BYTES = 550_000_000


def largest_block_bytes(work: RunWork) -> int:
    return max(block.parameters for block in work.blocks) * STORED_BYTES


def compute_bytes(work: RunWork, site_budget_bytes: int) -> int:
    """Peak bytes on the compute device, which is RAM on a CPU. `site_budget_bytes` limits one part of a site."""
    needed = _verifying_bytes(work)
    return max(needed, _quantizing_bytes(work, site_budget_bytes)) if work.method.statistics else needed


def _verifying_bytes(work: RunWork) -> int:
    """Both versions of the largest block, one slice of the logits, and both versions of the head."""
    vocabulary = work.adapter.vocab_size
    logits = 4 * ARRAYS_PER_SLICE * TOKENS_PER_SLICE * min(COLUMNS_PER_SLICE, vocabulary)
    return 2 * largest_block_bytes(work) + logits + 2 * STORED_BYTES * vocabulary * work.adapter.hidden_size


def _quantizing_bytes(work: RunWork, site_budget_bytes: int) -> int:
    """The original and the quantized block, and the larger of two amounts that are never held together.

    One is the moments of one turn with one part of a site, which is at least one matrix. The other is what tuning
    holds before there are moments.
    """
    turns = max(block.turn_bytes(site_budget_bytes) for block in work.blocks)
    tuned = max(block.feed_forward_parameters for block in work.blocks) if work.method.tune_epochs else 0
    return 2 * largest_block_bytes(work) + max(turns, tuned * TUNING_BYTES)


def ram_bytes(work: RunWork, compute: int, on_cpu: bool, rows_in_ram: int) -> int:
    """Peak RAM. `compute` is the result of compute_bytes; `rows_in_ram`: the rows between blocks that stay there. On a
    machine with a card the next block is read ahead, into pinned memory."""
    largest_shard = max(shard.data_bytes for shard in work.plan.pieces)
    base = BASE_RAM_BYTES + largest_shard + rows_in_ram
    return base + (compute if on_cpu else read_ahead_bytes(work.adapter))


def read_ahead_bytes(adapter: Adapter) -> int:
    """The most pinned memory that reading ahead takes, for a checkpoint as the family's authors store it."""
    shapes, every = adapter.disk_shapes(()), sorted(adapter.expected())
    kinds = {adapter.is_moe(block): block for block in range(adapter.n_blocks)}
    found = 0
    for block in kinds.values():
        names = [name for name in every if name.startswith(adapter.block_prefix(block))]
        keys = dict.fromkeys(key_of(adapter.locate(name, shapes)) for name in names)
        sizes = [STORED_BYTES * prod(shapes[tensor][len(leading) :]) for tensor, leading in keys]
        found = max(found, pinned_bytes(sizes))
    return found


def disk_bytes(work: RunWork, rows_on_disk: int) -> int:
    """Peak bytes of the work directory and OUT together. `rows_on_disk`: those of rows between blocks."""
    needed = work.plan.disk_bytes + rows_on_disk
    if not work.method.statistics or work.method.walk_back is None:
        return needed
    # Wherever the walk back can be resumed, all its rows are files, and nothing is emitted yet.
    return max(needed, (2 + work.method.walk_back(work.adapter.n_blocks)) * work.stream_bytes)
