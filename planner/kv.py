"""Bytes of a key-value cache, as an engine lays it out, exactly.

vLLM (v1/core/kv_cache_utils.py). Layers of one kind and window are a bucket; with more than one bucket each is cut into
groups of equally many layers (as many as the smallest bucket has; the largest's number if that is less than 1.5 times
as many), the last group padded. A block holds 16 tokens of one group, and all groups take theirs from one pool, of
which block 0 is never used. A sequence takes, of every group, the blocks of all its tokens; of a local group (sliding,
chunked) those of its window, and for as long as tokens are in flight (two batches) those of these too: several
sequences share the batches. Without the hybrid manager local layers beside global ones are kept whole.

transformers: exactly as many tokens as there are, and while a layer's cache grows its old copy lies beside the new one.
llama.cpp: whole cells for the longest context, a local layer min(context, window + micro-batch), rounded to 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..models.cache import CacheLayer
from .engines import KV_DTYPES, Engine


@dataclass(frozen=True)
class CacheBytes:
    """On one card. sequences: what all of them hold between passes. in_flight: what a pass needs beside that.
    reserved: what the engine keeps back."""

    sequences_bytes: int
    in_flight_bytes: int = 0
    reserved_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.sequences_bytes + self.in_flight_bytes + self.reserved_bytes


def rounded_up(count: int, step: int) -> int:
    return -(-count // step)


def values_on_card(layer: CacheLayer, tensor_parallel: int) -> int:
    """Numbers cached for a token on one of the cards: whole KV heads, at least one of them; a latent vector whole."""
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
    """Bytes on one card for `sequences` of `context` tokens each. `batch_tokens`: tokens of one pass, None: the
    engine's own; `frees`: whether local layers give back what they no longer see, None: as the engine does."""
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
    # Layers of different widths (none of the families here) would be padded to the widest.
    page = ceil(block * max(values_on_card(layer, tensor_parallel) for layer in layers) * KV_DTYPES[kv_dtype])
    held = flying = 0
    for (kind, window), count in buckets.items():
        groups = rounded_up(count, group)
        if window is None:
            held += groups * sequences * rounded_up(context, block)
            continue
        # A sliding window need not begin where a block does; a chunk does.
        more = 1 if kind == "sliding" else 0
        between = rounded_up(min(window, context), block) + more
        seen = window - 1 if kind == "sliding" else window
        during = rounded_up(min(seen + in_flight, context), block) + more
        held += groups * sequences * between
        flying += groups * min(sequences * (during - between), rounded_up(in_flight, block) + sequences)
    return CacheBytes(held * group * page, flying * group * page, group * page)


@dataclass(frozen=True)
class CacheRates:
    """What is said of a cache in a line: bytes on one card that each further token of a sequence takes, and that a
    sequence takes at most for its local layers; unrounded."""

    per_token_bytes: int
    per_sequence_bytes: int


def cache_rates(
    layers: Sequence[CacheLayer], engine: Engine, kv_dtype: str, tensor_parallel: int, frees: bool | None = None
) -> CacheRates:
    frees = engine.frees if frees is None else frees
    alone = all(layer.local for layer in layers) and len({layer.window for layer in layers}) == 1
    # Without the hybrid manager vLLM still frees where all layers are local alike.
    frees = frees or (alone and engine.name == "vllm")
    width = KV_DTYPES[kv_dtype]
    whole = sum(values_on_card(layer, tensor_parallel) for layer in layers if not (frees and layer.local))
    local = sum(
        values_on_card(layer, tensor_parallel) * (layer.window or 0) for layer in layers if frees and layer.local
    )
    return CacheRates(ceil(whole * width), ceil(local * width))
