"""The key-value cache of each layer, and how engines split weights over several cards: facts of a family.

The cache follows from the config (`layer_types`, `sliding_window`, `attention_chunk_size`), the split from a weight's
leaf name. `planner/` turns both into bytes. A family that differs overrides its part (MLA caches one latent vector for
all heads).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal


@dataclass(frozen=True)
class CacheLayer:
    """The key-value cache of one layer."""

    # global: every token. sliding: the last `window` tokens. chunked: the tokens of the present chunk of `window`.
    # latent: every token, as one vector for all heads (MLA, arXiv 2405.04434).
    kind: Literal["global", "sliding", "chunked", "latent"]
    values_per_token: int  # keys and values together
    window: int | None = None  # tokens; None for global and latent layers
    kv_heads: int = 1  # heads that tensor parallelism can split; a latent layer has 1, whole on every card

    @property
    def local(self) -> bool:
        """Whether old tokens are dropped."""
        return self.window is not None


class Split(StrEnum):
    """How tensor parallelism splits a weight `[out, in]`: by rows, by columns, by rows of whole KV heads, or not."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    KV_HEADS = "kv_heads"
    COPIED = "copied"


# Megatron-LM's split (arXiv 1909.08053), as vLLM does it: readers of the residual stream by outputs, writers by inputs,
# embeddings and head by rows of the vocabulary. Any other weight is copied to every card.
SPLITS = {
    "q_proj": Split.OUTPUTS,
    "k_proj": Split.KV_HEADS,
    "v_proj": Split.KV_HEADS,
    "o_proj": Split.INPUTS,
    "gate_proj": Split.OUTPUTS,
    "up_proj": Split.OUTPUTS,
    "down_proj": Split.INPUTS,
    "embed_tokens": Split.OUTPUTS,
    "lm_head": Split.OUTPUTS,
}

_KINDS: dict[str, Literal["global", "sliding", "chunked"]] = {
    "full_attention": "global",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}


def attention_caches(text_config: Any) -> tuple[CacheLayer, ...]:
    """The layers' caches of a model whose heads each cache a key and a value of `head_dim` numbers.

    Without `layer_types` all layers are alike: sliding if the config has a `sliding_window`, else global. A layer whose
    window is None is global. Raises ValueError for unknown layer types.
    """
    c = text_config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    windows = {"sliding": getattr(c, "sliding_window", None), "chunked": getattr(c, "attention_chunk_size", None)}
    plain = "sliding_attention" if windows["sliding"] else "full_attention"
    types = getattr(c, "layer_types", None) or [plain] * c.num_hidden_layers
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        raise ValueError(f"layer_types names {', '.join(unknown)}: what such layers cache is not known")

    def layer(kind: Literal["global", "sliding", "chunked"]) -> CacheLayer:
        window = windows.get(kind)
        return CacheLayer(kind if window else "global", 2 * heads * head_dim, window or None, heads)

    return tuple(layer(_KINDS[name]) for name in types)
