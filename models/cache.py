"""What a layer keeps of the tokens it has seen, and how engines spread weights over several cards: facts of a family.

Both are read off the config (`layer_types`, `sliding_window`, `attention_chunk_size`) or off a weight's leaf name;
`planner/` makes bytes of them. A family that differs (MLA keeps one latent vector for all heads) overrides its part.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal


@dataclass(frozen=True)
class CacheLayer:
    """The key-value cache of one layer.

    kind:             global: every token; sliding: the last `window` tokens; chunked: those of the present chunk of
                      `window`; latent: every token, as one vector for all heads (MLA, arXiv 2405.04434)
    values_per_token: numbers cached for a token, keys and values together
    window:           tokens, of sliding and chunked layers
    kv_heads:         heads that tensor parallelism can split; 1 of a latent layer, which every card keeps whole
    """

    kind: Literal["global", "sliding", "chunked", "latent"]
    values_per_token: int
    window: int | None = None
    kv_heads: int = 1

    @property
    def local(self) -> bool:
        """Whether a token is forgotten some time."""
        return self.window is not None


class Split(StrEnum):
    """What tensor parallelism does with a weight `[out, in]`: rows, columns, rows by whole KV heads, or a copy each."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    KV_HEADS = "kv_heads"
    COPIED = "copied"


# Megatron-LM's cut (arXiv 1909.08053), as vLLM makes it: what reads the residual stream by outputs, what writes it by
# inputs, embeddings and head by rows of the vocabulary. Whatever is not named here is copied to every card.
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
    """The layers of a model whose heads each cache a key and a value of `head_dim` numbers.

    A config without `layer_types` has one kind of layer: sliding if it has a `sliding_window`. A window that the config
    leaves out (None) is no window. Raises ValueError for a kind of layer that is not known.
    """
    c = text_config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    windows = {"sliding": getattr(c, "sliding_window", None), "chunked": getattr(c, "attention_chunk_size", None)}
    plain = "sliding_attention" if windows["sliding"] else "full_attention"
    types = getattr(c, "layer_types", None) or [plain] * c.num_hidden_layers
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        raise ValueError(f"layer_types names {', '.join(unknown)}, of which it is not known what they cache")

    def layer(kind: Literal["global", "sliding", "chunked"]) -> CacheLayer:
        window = windows.get(kind)
        return CacheLayer(kind if window else "global", 2 * heads * head_dim, window or None, heads)

    return tuple(layer(_KINDS[name]) for name in types)
