"""The exact bytes of a key-value cache in each engine's layout.

vLLM (v1/core/kv_cache_utils.py): layers of the same kind and window form a bucket. If there are several buckets, each
is cut into groups of equal size, and the last group is padded. The group size is the smallest bucket's number of
layers, or the largest bucket's if that is less than 1.5 times the smallest's. A block holds 16 tokens of one group. All
groups draw blocks from one pool, and block 0 of the pool is never used. In a global group, a sequence holds blocks for
all its tokens. In a local group (sliding or chunked), it holds blocks for its window and for the tokens in flight. At
most two batches are in flight, and the sequences share them. Without the hybrid manager, local layers keep every token
if the model also has global layers.

transformers: the cache holds exactly the tokens there are. While a layer's cache grows, the old copy and the new one
are both in memory.
llama.cpp: each layer has cells for the longest context, a local layer for min(context, window + micro-batch). Both
counts are rounded up to a multiple of 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..models.cache import CacheLayer
from .engines import KV_DTYPES, Engine


@dataclass(frozen=True)
class CacheBytes:
    """Cache bytes on one card."""

    # All sequences together, between passes.
    sequences_bytes: int
    # Needed in addition during a pass.
    in_flight_bytes: int = 0
    # Allocated by the engine but never used.
    reserved_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.sequences_bytes + self.in_flight_bytes + self.reserved_bytes


def rounded_up(count: int, step: int) -> int:
    return -(-count // step)


def values_on_card(layer: CacheLayer, tensor_parallel: int) -> int:
    """Numbers that one card caches per token. A card holds whole KV heads, at least one; it never splits a latent."""
    heads = max(1, rounded_up(layer.kv_heads, tensor_parallel))
    return layer.values_per_token * heads // layer.kv_heads


def cache_bytes(
    layers: Sequence[CacheLayer],
    context: int,
    sequences: int,
    engine: Engine,
    kv_dtype: str = "bf16",
    tensor_parallel: int = 1,
    batch_tokens: int | None = None,
    frees: bool | None = None,
) -> CacheBytes:
    """Bytes on one card for `sequences` sequences of `context` tokens each.

    `batch_tokens` is the number of tokens in one pass. `frees` says whether local layers free the tokens outside their
    window. None stands for the engine's own setting in both.
    """
    frees = engine.frees if frees is None else frees
    batch = engine.batch_tokens if batch_tokens is None else batch_tokens
    if engine.name == "vllm":
        assert batch is not None
        return _vllm(layers, context, sequences, engine, kv_dtype, tensor_parallel, batch, frees)
    width = KV_DTYPES[kv_dtype]
    if engine.name == "llama.cpp":
        assert batch is not None
        cells = rounded_up(context, engine.block_tokens) * engine.block_tokens
        values = 0
        for layer in layers:
            kept = cells
            if frees and layer.window is not None:
                kept = rounded_up(min(cells, layer.window + batch), engine.block_tokens) * engine.block_tokens
            values += kept * layer.values_per_token
        return CacheBytes(ceil(sequences * values * width))
    sizes = []
    for layer in layers:
        local = frees and layer.window is not None
        kept = min(context, (layer.window or 0) - 1 + (batch or context)) if local else context
        sizes.append(sequences * kept * layer.values_per_token)
    return CacheBytes(ceil(sum(sizes) * width), in_flight_bytes=ceil(max(sizes, default=0) * width))


def _vllm(
    layers: Sequence[CacheLayer],
    context: int,
    sequences: int,
    engine: Engine,
    kv_dtype: str,
    tensor_parallel: int,
    batch_tokens: int,
    frees: bool,
) -> CacheBytes:
    block = engine.block_tokens
    in_flight = engine.batches_in_flight * batch_tokens
    buckets: dict[tuple[str, int | None], int] = {}
    for layer in layers:
        key = (layer.kind, layer.window) if layer.local else ("global", None)
        buckets[key] = buckets.get(key, 0) + 1
    if not frees and len(buckets) > 1 and ("global", None) in buckets:
        buckets = {("global", None): len(layers)}
    most, least = max(buckets.values()), min(buckets.values())
    group = most if most < 1.5 * least else least
    # vLLM would pad layers of different widths to the widest; no family here has them.
    page = ceil(block * max(values_on_card(layer, tensor_parallel) for layer in layers) * KV_DTYPES[kv_dtype])
    held = flying = 0
    for (kind, window), count in buckets.items():
        groups = rounded_up(count, group)
        if window is None:
            held += groups * sequences * rounded_up(context, block)
            continue
        # A sliding window can begin inside a block and then touches one block more; a chunk begins with a block.
        more = 1 if kind == "sliding" else 0
        between = rounded_up(min(window, context), block) + more
        seen = window - 1 if kind == "sliding" else window
        during = rounded_up(min(seen + in_flight, context), block) + more
        held += groups * sequences * between
        flying += groups * min(sequences * (during - between), rounded_up(in_flight, block) + sequences)
    return CacheBytes(held * group * page, flying * group * page, group * page)


@dataclass(frozen=True)
class CacheRates:
    """A cache's growth in bytes on one card, for a one-line summary. Counts are not rounded up to whole blocks."""

    # For each further token of a sequence.
    per_token_bytes: int
    # The most that one sequence takes in its local layers.
    per_sequence_bytes: int


def cache_rates(
    layers: Sequence[CacheLayer], engine: Engine, kv_dtype: str, tensor_parallel: int, frees: bool | None = None
) -> CacheRates:
    frees = engine.frees if frees is None else frees
    alone = all(layer.local for layer in layers) and len({layer.window for layer in layers}) == 1
    # Even without the hybrid manager, vLLM frees old tokens if all layers are local with the same window.
    frees = frees or (alone and engine.name == "vllm")
    width = KV_DTYPES[kv_dtype]
    whole = sum(values_on_card(layer, tensor_parallel) for layer in layers if not (frees and layer.local))
    local = sum(
        values_on_card(layer, tensor_parallel) * (layer.window or 0) for layer in layers if frees and layer.local
    )
    return CacheRates(ceil(whole * width), ceil(local * width))
