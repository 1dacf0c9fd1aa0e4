"""Estimates the memory that a card needs beside weights and cache.

    fixed         CUDA context and kernels; with several cards also the communicator's buffers
    graphs        CUDA graphs, if the engine captures them
    activations   T x (4 H + A / tp + widest feed-forward half) numbers of two bytes. The half is 3 F / tp for dense and
                  shared MLPs, plus K x (max(2 F / tp, H) + max(F / tp, H)) + H for K experts per token
    logits        22 N V bytes: bf16 and fp32 logits, sorted copies with their indices, probabilities
    vision        the tower's activations for the tiles of one request, and the tiles' features

T is the tokens of one pass, H the hidden size, A the summed widths of queries, keys, values and attention output, F a
feed-forward width, N the sequences, V the vocabulary size and tp the cards. The experts' term is vLLM's own
(fused_moe/experts/marlin_moe.py, workspace_shapes).

The estimate has not been compared with a real card. Fixed and graphs may be half a GB too large or too small.
Activations may be a third too small if an engine holds more rows at once. MLA's prefill buffers are not counted.
"""

from dataclasses import dataclass

from ..models.adapter import Adapter, Half, Role
from .engines import Engine

NUMBER_BYTES = 2
LOGIT_BYTES = 2 + 4 + 4 + 8 + 4
# A CUDA context with the kernels of torch and the engine. The figure is assumed and too high for small cards.
CONTEXT_BYTES = 600_000_000
# NCCL channels and custom all-reduce buffers on one card. The figure is assumed and too high for two cards.
COMMUNICATOR_BYTES = 600_000_000
# Graphs for up to 512 tokens (vLLM's default) grow with the number of blocks. The figure is assumed and may be too
# high or too low.
GRAPH_BYTES_A_BLOCK = 16_000_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that determine its workspace and the cards it fits."""

    hidden: int
    vocabulary: int
    blocks: int
    heads: int
    attention: int
    # For each kind of block: the summed F of the MLPs that every token passes, and the F of one expert (0 without).
    halves: tuple[tuple[int, int], ...]
    top_k: int
    tile_tokens: int
    tiles: int
    positions: int


@dataclass(frozen=True)
class Workspace:
    fixed_bytes: int
    graph_bytes: int
    activation_bytes: int
    logit_bytes: int
    vision_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.graph_bytes + self.activation_bytes + self.logit_bytes + self.vision_bytes


def sizes_of(adapter: Adapter) -> Sizes:
    """Reads the sizes from one block with experts and one block without, where the model has them."""
    text = adapter.text_config
    kinds: dict[bool, int] = {}
    for block in range(adapter.n_blocks):
        kinds.setdefault(adapter.router_site(block) is not None, block)
    halves = []
    attention = 0
    for block in kinds.values():
        dense = expert = 0
        sites = adapter.sites(block)
        for site in sites:
            if site.feeds:
                width = site.out_features[0]
                dense, expert = (dense, width) if site.role is Role.EXPERT else (dense + width, expert)
        # A: the outputs of all attention matrices but the last, and the inputs of the last.
        written = [(sum(s.out_features), s.in_features) for s in sites if s.half is Half.ATTENTION]
        attention = max(attention, sum(out for out, _ in written[:-1]) + written[-1][1])
        halves.append((dense, expert))
    return Sizes(
        hidden=adapter.hidden_size,
        vocabulary=adapter.vocab_size,
        blocks=adapter.n_blocks,
        heads=text.num_attention_heads,
        attention=attention,
        halves=tuple(halves),
        top_k=adapter.top_k,
        tile_tokens=adapter.image_token_count() if adapter.has_vision else 0,
        tiles=adapter.image_tiles if adapter.has_vision else 0,
        positions=int(getattr(text, "max_position_embeddings", 0) or 0),
    )


def image_tokens(sizes: Sizes, images: int) -> int:
    """The most tokens of context that `images` images take."""
    return images * sizes.tiles * sizes.tile_tokens


def workspace_bytes(
    sizes: Sizes,
    engine: Engine,
    context: int,
    sequences: int,
    tensor_parallel: int = 1,
    batch_tokens: int | None = None,
    images: int = 0,
) -> Workspace:
    """The workspace of one card. `batch_tokens` is the number of tokens in one pass; None takes the engine's own."""
    batch = engine.batch_tokens if batch_tokens is None else batch_tokens
    tokens = sequences * context if batch is None else min(batch, sequences * context)
    return Workspace(
        fixed_bytes=CONTEXT_BYTES + (COMMUNICATOR_BYTES if tensor_parallel > 1 else 0),
        graph_bytes=GRAPH_BYTES_A_BLOCK * sizes.blocks if engine.graphs else 0,
        activation_bytes=NUMBER_BYTES * tokens * _numbers_a_token(sizes, tensor_parallel),
        logit_bytes=LOGIT_BYTES * sequences * sizes.vocabulary,
        # Scout's tower needs about 0.2 GB for 16 tiles of 144 tokens: 13 MB per tile, or nine hidden rows per token.
        vision_bytes=NUMBER_BYTES * image_tokens(sizes, images) * 9 * sizes.hidden,
    )


def _numbers_a_token(sizes: Sizes, tensor_parallel: int) -> int:
    def feed_forward(dense: int, expert: int) -> int:
        own = -(-expert // tensor_parallel)
        moe = sizes.top_k * (max(2 * own, sizes.hidden) + max(own, sizes.hidden)) + sizes.hidden if expert else 0
        return -(-3 * dense // tensor_parallel) + moe

    widest = max(feed_forward(dense, expert) for dense, expert in sizes.halves)
    return 4 * sizes.hidden + -(-sizes.attention // tensor_parallel) + widest
