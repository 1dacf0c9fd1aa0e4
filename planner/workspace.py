"""What a card holds beside weights and cache: an estimate, and its formula.

    fixed         CUDA context and kernels, and with several cards the communicator's buffers
    graphs        CUDA graphs, where the engine captures them
    activations   T x (4 H + A / tp + widest feed-forward half) numbers of two bytes; that half: 3 F / tp for dense and
                  shared MLPs, and for K experts a token K x (max(2 F / tp, H) + max(F / tp, H)) + H
    logits        N V 22 bytes: bf16 and fp32 logits, sorted copies with their indices, probabilities
    vision        what the tower holds for the tiles of one request, and their features

T tokens of one pass, H hidden size, A widths of queries, keys, values and what attention gives, F a feed-forward width,
N sequences, V vocabulary, tp cards. The experts' term is vLLM's own (fused_moe/experts/marlin_moe.py,
workspace_shapes). It was held against no card: fixed and graphs may be half a GB off either way, activations a third
too small where an engine holds more rows at once. MLA's prefill buffers are not in it.
"""

from dataclasses import dataclass

from ..models.adapter import Adapter, Half, Role
from .engines import Engine

NUMBER_BYTES = 2
LOGIT_BYTES = 2 + 4 + 4 + 8 + 4
# A context with torch's and the engine's kernels, assumed; it errs high on small cards.
CONTEXT_BYTES = 600_000_000
# Channels of NCCL and buffers of custom all-reduce on one card, assumed; it errs high for two cards.
COMMUNICATOR_BYTES = 600_000_000
# Graphs of up to 512 tokens (vLLM's default) grow with the number of blocks; assumed, either way.
GRAPH_BYTES_A_BLOCK = 16_000_000


@dataclass(frozen=True)
class Sizes:
    """Of a model what workspace and cards depend on. `dense`, `experts`: by block kind, F of what is computed for
    every token (summed), and F of one expert."""

    hidden: int
    vocabulary: int
    blocks: int
    heads: int
    attention: int
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
    """One block of each kind is looked at: with experts and without."""
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
        # Whatever attention's matrices write, and what its last one reads.
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
    """Tokens of the context that so many images take at most."""
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
    """Of one card. `batch_tokens`: tokens of one pass, None: the engine's own."""
    batch = engine.batch_tokens if batch_tokens is None else batch_tokens
    tokens = sequences * context if batch is None else min(batch, sequences * context)
    return Workspace(
        fixed_bytes=CONTEXT_BYTES + (COMMUNICATOR_BYTES if tensor_parallel > 1 else 0),
        graph_bytes=GRAPH_BYTES_A_BLOCK * sizes.blocks if engine.graphs else 0,
        activation_bytes=NUMBER_BYTES * tokens * _numbers_a_token(sizes, tensor_parallel),
        logit_bytes=LOGIT_BYTES * sequences * sizes.vocabulary,
        # Scout's tower needs about 0.2 GB for 16 tiles of 144 tokens: 13 MB a tile, nine rows a token.
        vision_bytes=NUMBER_BYTES * image_tokens(sizes, images) * 9 * sizes.hidden,
    )


def _numbers_a_token(sizes: Sizes, tensor_parallel: int) -> int:
    def feed_forward(dense: int, expert: int) -> int:
        own = -(-expert // tensor_parallel)
        moe = sizes.top_k * (max(2 * own, sizes.hidden) + max(own, sizes.hidden)) + sizes.hidden if expert else 0
        return -(-3 * dense // tensor_parallel) + moe

    widest = max(feed_forward(dense, expert) for dense, expert in sizes.halves)
    return 4 * sizes.hidden + -(-sizes.attention // tensor_parallel) + widest
