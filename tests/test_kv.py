"""Bytes of caches against Scout's published arithmetic, and against engines' rules spelled out block by block."""

from math import ceil

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Llama4TextConfig
from transformers.cache_utils import DynamicCache

from onecard.models.cache import CacheLayer, attention_caches
from onecard.planner.cards import GIB
from onecard.planner.engines import ENGINES
from onecard.planner.kv import CacheBytes, cache_bytes, cache_rates

SCOUT = attention_caches(Llama4TextConfig())
VLLM, LLAMA_CPP, TRANSFORMERS = ENGINES["vllm"], ENGINES["llama.cpp"], ENGINES["transformers"]
LATENT = (CacheLayer("latent", 512 + 64),) * 61


def test_scouts_cache_is_what_its_shape_says() -> None:
    """12 global layers of 4 KiB a token, 36 of at most 8192 tokens; all 48 kept whole: 192 KiB a token."""
    rates = cache_rates(SCOUT, VLLM, "bf16", 1)
    assert (rates.per_token_bytes, rates.per_sequence_bytes) == (48 * 1024, int(1.125 * GIB))
    whole = cache_rates(SCOUT, VLLM, "bf16", 1, frees=False)
    assert (whole.per_token_bytes, whole.per_sequence_bytes) == (192 * 1024, 0)
    context = 131_072
    assert cache_bytes(SCOUT, context, 4, VLLM).sequences_bytes == 4 * (context * 48 * 1024 + 9 * GIB // 8)
    assert cache_bytes(SCOUT, context, 4, VLLM, "fp8").sequences_bytes == 2 * (context * 48 * 1024 + 9 * GIB // 8)
    assert cache_bytes(SCOUT, context, 1, VLLM, frees=False).sequences_bytes == 24 * GIB
    assert cache_bytes(SCOUT, 10_000_000, 1, VLLM).sequences_bytes == 10_000_000 * 48 * 1024 + 9 * GIB // 8


def slow_vllm(
    layers: tuple[CacheLayer, ...], context: int, sequences: int, batch: int, frees: bool, width: int, tp: int
) -> CacheBytes:
    """vLLM's allocation step by step: layers of one kind are dealt into groups of one size, each group has a block
    table for every sequence, and a block holds the group's layers."""
    kinds: dict[object, list[CacheLayer]] = {}
    for layer in layers:
        kinds.setdefault((layer.kind, layer.window) if layer.window else "all", []).append(layer)
    if not frees and "all" in kinds:
        kinds = {"all": list(layers)}
    counts = sorted(len(members) for members in kinds.values())
    size = counts[-1] if counts[-1] < counts[0] * 1.5 else counts[0]
    tables: list[tuple[int, int, int]] = []  # blocks between passes, blocks during one, of each group of each sequence
    for key, members in kinds.items():
        groups = [members[i : i + size] for i in range(0, len(members), size)]
        for _ in groups:
            if key == "all":
                blocks = len(range(0, context, 16))
                tables.append((blocks, blocks, 0))
                continue
            kind, window = members[0].kind, members[0].window
            assert window
            seen = min(window, context)
            ahead = min((window - 1 if kind == "sliding" else window) + 2 * batch, context)
            more = kind == "sliding"
            tables.append((len(range(0, seen, 16)) + more, len(range(0, ahead, 16)) + more, 2 * batch))
    head = layers[0].values_per_token // layers[0].kv_heads
    mine = len(range(0, layers[0].kv_heads, tp)) or 1
    block = size * 16 * head * mine * width
    between = sum(table[0] for table in tables) * sequences
    during = 0
    for held, most, flight in tables:
        during += min(sequences * (most - held), len(range(0, flight, 16)) + sequences)
    return CacheBytes(between * block, during * block, block)


# 14 local and 7 global layers and one local more, so that groups of seven are filled up.
PADDED = ((CacheLayer("sliding", 256, 4096, 2),) * 2 + (CacheLayer("global", 256, None, 2),)) * 7 + (
    CacheLayer("sliding", 256, 4096, 2),
)
LAYERS = st.sampled_from(
    [
        SCOUT,
        LATENT,
        (CacheLayer("global", 2048, None, 8),) * 5,
        (CacheLayer("sliding", 256, 100, 2),) * 4,
        (CacheLayer("sliding", 256, 100, 2),) * 12 + (CacheLayer("global", 256, None, 2),) * 13,
        PADDED,
    ]
)


@given(
    LAYERS,
    st.integers(1, 300_000),
    st.integers(1, 20),
    st.sampled_from([16, 100, 2048, 8192]),
    st.booleans(),
    st.sampled_from(["bf16", "fp8"]),
    st.sampled_from([1, 2, 16]),
)
@settings(max_examples=150, deadline=None)
def test_vllms_blocks_are_those_of_its_rules_told_slowly(
    layers: tuple[CacheLayer, ...], context: int, sequences: int, batch: int, frees: bool, kv_dtype: str, tp: int
) -> None:
    made = cache_bytes(layers, context, sequences, VLLM, kv_dtype, tp, batch, frees)
    assert made == slow_vllm(layers, context, sequences, batch, frees, 2 if kv_dtype == "bf16" else 1, tp)


@given(LAYERS, st.integers(1, 50_000), st.integers(1, 9), st.sampled_from(sorted(ENGINES)), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_cache_never_shrinks(
    layers: tuple[CacheLayer, ...], context: int, sequences: int, engine: str, frees: bool
) -> None:
    def total(context: int, sequences: int, **more: object) -> int:
        return cache_bytes(layers, context, sequences, ENGINES[engine], frees=frees, **more).total_bytes  # type: ignore[arg-type]

    here = total(context, sequences)
    assert here <= total(context + 1, sequences)
    assert here <= total(context, sequences + 1)
    assert total(context, sequences, batch_tokens=64) <= total(context, sequences, batch_tokens=65)
    if layers != PADDED:  # padded groups may cost more than freeing saves
        kept = cache_bytes(layers, context, sequences, ENGINES[engine], frees=False).sequences_bytes
        freed = cache_bytes(layers, context, sequences, ENGINES[engine], frees=True).sequences_bytes
        assert freed <= kept + sequences * len(layers) * 256 * layers[0].values_per_token * 2  # a window's two ends


def test_one_sequence_needs_what_vllm_admits_it_with() -> None:
    """vLLM's cap for a request: a chunk and two batches in flight, or the whole context."""
    made = cache_bytes(SCOUT, 131_072, 1, VLLM, batch_tokens=8192)
    local_blocks = ceil((8192 + 2 * 8192) / 16)
    assert made.sequences_bytes + made.in_flight_bytes == (131_072 // 16 + 3 * local_blocks) * 12 * 16 * 4096
    assert made.reserved_bytes == 12 * 16 * 4096


def test_transformers_cache_holds_as_many_bytes() -> None:
    config = Llama4TextConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size=32,
        attention_chunk_size=16,
    )
    cache = DynamicCache(config=config)
    states = torch.zeros(3, 2, 40, 8, dtype=torch.bfloat16)
    for layer in range(4):
        cache.update(states, states.clone(), layer)
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(attention_caches(config), 40, 3, TRANSFORMERS).sequences_bytes == held
    # After more tokens, local layers hold a window less one, and the new tokens.
    for layer in range(4):
        cache.update(states[:, :, :5], states[:, :, :5].clone(), layer)
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    made = cache_bytes(attention_caches(config), 45, 3, TRANSFORMERS, batch_tokens=5, frees=True)
    assert made.sequences_bytes == held


def test_llama_cpp_rounds_cells_to_256() -> None:
    layers = (CacheLayer("global", 100, None, 2), CacheLayer("chunked", 100, 8192, 2))
    assert cache_bytes(layers, 300, 2, LLAMA_CPP).total_bytes == 2 * 2 * 512 * 100 * 2
    assert cache_bytes(layers, 100_000, 1, LLAMA_CPP).total_bytes == (100_096 + 8704) * 100 * 2
    assert cache_bytes(layers, 256, 1, LLAMA_CPP, "q8_0").total_bytes == 2 * 256 * 100 * 34 // 32


def test_every_card_has_a_head_and_a_latent_vector_whole() -> None:
    one = cache_bytes(SCOUT, 4096, 1, VLLM, tensor_parallel=1).total_bytes
    assert cache_bytes(SCOUT, 4096, 1, VLLM, tensor_parallel=8).total_bytes * 8 == one
    assert cache_bytes(SCOUT, 4096, 1, VLLM, tensor_parallel=16).total_bytes * 8 == one
    assert cache_bytes(LATENT, 4096, 1, VLLM, tensor_parallel=8) == cache_bytes(LATENT, 4096, 1, VLLM)
    assert cache_rates(LATENT, VLLM, "bf16", 1).per_token_bytes == 61 * 576 * 2
