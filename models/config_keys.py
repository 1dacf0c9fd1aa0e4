"""What every key of a family's config.json does, and what is done with it here.

A walk computes with transformers' own layers, so most keys are followed without a word of ours. A few are fixed: the
walk, the statistics or the family's own class compute with one value, and a config with another is refused. Others only
engines follow. The rest has no part in the forward pass. Every key is in one of these groups; tests/test_config_keys.py
walks each family with each key changed and compares with transformers.

Keys are compared as transformers' config class reads them, so a legacy spelling (`rope_scaling`, `torch_dtype`) equals
its present one. A key of a nested config is named with its path: `text_config.rms_norm_eps`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Use(StrEnum):
    """Who computes with a key."""

    FOLLOWED = "followed"  # transformers' forward pass, and so the walk
    FIXED = "fixed"  # computed with the values of `only`; others are refused
    ENGINES = "engines"  # not the walk; an engine computes with it
    UNUSED = "unused"  # no forward pass


@dataclass(frozen=True)
class Key:
    """`does` says what the key sets. `only` are the values of a FIXED key; `way_out` is for a user who has another."""

    use: Use
    does: str
    only: tuple[Any, ...] = ()
    way_out: str = ""


@dataclass(frozen=True)
class Difference:
    """A field of config.json whose value differs between an original and a checkpoint of it."""

    field: str
    original: Any
    checkpoint: Any
    use: Use
    does: str

    def told(self) -> str:
        """One line for people."""
        values = f"{self.field} is {_said(self.checkpoint)}, and the original has {_said(self.original)}"
        return f"{values} ({self.does})"


def _followed(**does: str) -> dict[str, Key]:
    return {name: Key(Use.FOLLOWED, what) for name, what in does.items()}


def _engines(**does: str) -> dict[str, Key]:
    return {name: Key(Use.ENGINES, what) for name, what in does.items()}


def _unused(**does: str) -> dict[str, Key]:
    return {name: Key(Use.UNUSED, what) for name, what in does.items()}


LONGEST = "the longest text, and with some rope types the rotary positions"
SILU = "silu", "swish"
ACTIVATION = Key(
    Use.FIXED,
    "the activation of experts and dense layers",
    SILU,
    "onecard's statistics and GGUF's kernels are SwiGLU's: no model of the family was published with another one",
)

# Of every config class.
COMMON = {
    **_engines(
        architectures="the class that an engine builds",
        dtype="the dtype that an engine computes in; onecard computes in the recipe's compute_dtype",
        return_dict="the form of what transformers returns: some of its models fail with false",
    ),
    **_unused(
        _name_or_path="where the config came from",
        chunk_size_feed_forward="a chunked computation of other families",
        id2label="the labels of a classifier",
        is_encoder_decoder="the kind of another architecture",
        label2id="the labels of a classifier",
        model_type="the family: another one is another model",
        output_attentions="whether attention weights are given out",
        output_hidden_states="whether hidden states are given out",
        problem_type="the loss of a classifier",
        transformers_version="the version that wrote the file",
        tie_last_hidden_states="which hidden states are given out",
    ),
}
# Of every text model.
TEXT = COMMON | {
    "hidden_act": ACTIVATION,
    # No field of the classes: transformers' masks ask any config for it.
    "is_causal": Key(
        Use.FIXED,
        "whether a token sees only earlier ones",
        (True, None),
        "a model that reads backwards is another model",
    ),
    **_followed(
        vocab_size="the number of tokens",
        hidden_size="the width of the residual stream",
        num_hidden_layers="the number of blocks",
        num_attention_heads="the attention heads",
        num_key_value_heads="the key-value heads",
        rms_norm_eps="the epsilon of the norms",
        rope_parameters="the rotary positions",
        tie_word_embeddings="whether the head is the embedding",
        num_experts_per_tok="the experts of a token",
        max_position_embeddings=LONGEST,
    ),
    **_unused(
        initializer_range="the initial weights of a training",
        use_cache="whether keys and values are kept",
        pad_token_id="the token of padding, which no row has",
        bos_token_id="the first token of a text, which the tokenizer sets",
        eos_token_id="the token that ends an answer",
        attention_dropout="dropout, in training",
        output_router_logits="whether router logits are given out",
        router_aux_loss_coef="a loss, in training",
    ),
}
JITTER = _unused(router_jitter_noise="noise on the router's input, in training")
BIAS = _followed(attention_bias="whether q, k, v and o have a bias")
CHUNK = Key(
    Use.FOLLOWED,
    "the tokens that a layer with chunked attention sees",
)

QWEN3_MOE = TEXT | {
    **_followed(
        intermediate_size="the width of dense layers",
        moe_intermediate_size="the width of an expert",
        head_dim="the width of an attention head",
        sliding_window="the tokens that attention sees, if use_sliding_window is true",
        use_sliding_window="whether sliding_window counts",
        decoder_sparse_step="which layers have experts",
        mlp_only_layers="which layers have no experts",
        num_local_experts="the number of experts",
        norm_topk_prob="whether the routing weights of a token are scaled to a sum of 1",
    ),
    **BIAS,
}
MIXTRAL = TEXT | {
    **_followed(
        intermediate_size="the width of an expert",
        head_dim="the width of an attention head",
        num_local_experts="the number of experts",
        sliding_window="the tokens that attention sees",
    ),
    **JITTER,
}
DEEPSEEK_V3 = TEXT | {
    **_followed(
        intermediate_size="the width of dense layers",
        moe_intermediate_size="the width of an expert",
        n_shared_experts="the width of the shared expert",
        n_routed_experts="the number of experts",
        routed_scaling_factor="the scale of the routing weights",
        kv_lora_rank="the latent of keys and values",
        q_lora_rank="the latent of queries",
        qk_rope_head_dim="the width of a head that has rotary positions",
        qk_nope_head_dim="the width of a head that has none",
        v_head_dim="the width of a head's values",
        n_group="the groups of experts",
        topk_group="the groups that a token may use",
        first_k_dense_replace="which layers have no experts",
        norm_topk_prob="whether the routing weights of a token are scaled to a sum of 1",
        rope_interleave="the order of rotary pairs",
        head_dim="the width of a head that has rotary positions",
        qk_head_dim="the width of a head of queries and keys",
    ),
    **_engines(num_key_value_heads="the key-value heads where attention is computed without a latent"),
    "attention_bias": Key(Use.FIXED, "whether attention has a bias", (False, None), "no DeepSeek-V3 has one"),
    "scoring_func": Key(Use.FIXED, "how the router scores", ("sigmoid",), "transformers computes a sigmoid"),
    "topk_method": Key(Use.FIXED, "how experts are ranked", ("noaux_tc",), "transformers ranks by noaux_tc"),
    "moe_layer_freq": Key(Use.FIXED, "which layers have experts", (1,), "transformers has experts in every layer"),
    **_unused(
        pretraining_tp="the ranks of a training",
        num_nextn_predict_layers="the layers that draft tokens, which are not part of the model measured",
        aux_loss_alpha="a loss, in training",
        seq_aux="a loss, in training",
        ep_size="the ranks of a training",
    ),
}
LLAMA4_TEXT = TEXT | {
    **_followed(
        intermediate_size="the width of an expert and of the shared expert",
        intermediate_size_mlp="the width of dense layers",
        head_dim="the width of an attention head",
        num_local_experts="the number of experts",
        moe_layers="which layers have experts",
        use_qk_norm="whether queries and keys are normed in layers with rotary positions",
        no_rope_layers="which layers have rotary positions",
        layer_types="which layers have chunked attention",
        attn_temperature_tuning="whether queries are scaled by their position in layers without rotary positions",
        floor_scale="the positions from which queries are scaled",
        attn_scale="how much queries are scaled",
    ),
    **BIAS,
    **JITTER,
    "attention_chunk_size": CHUNK,
    **_engines(
        interleave_moe_layer_step="which layers have experts in vLLM and llama.cpp (transformers goes by moe_layers)",
        no_rope_layer_interval="which layers have rotary positions, where no_rope_layers is not given",
    ),
}
LLAMA4_VISION = COMMON | {
    **_followed(
        hidden_size="the width of the vision tower",
        num_hidden_layers="the layers of the vision tower",
        num_attention_heads="the heads of the vision tower",
        num_channels="the colours of a picture",
        intermediate_size="the width of the vision tower's MLP",
        vision_output_dim="the width of the projector's input",
        image_size="the side of a picture",
        patch_size="the side of a patch",
        pixel_shuffle_ratio="how many patches make a token",
        projector_input_dim="the width of the vision adapter",
        projector_output_dim="the width of the vision adapter",
        rope_parameters="the rotary positions of patches",
    ),
    **_unused(
        hidden_act="an activation: transformers computes a GELU whatever stands here",
        norm_eps="an epsilon: transformers takes 1e-5 whatever stands here",
        vision_feature_select_strategy="a choice of features that transformers does not make",
        initializer_range="the initial weights of a training",
        multi_modal_projector_bias="a bias that transformers never has",
        projector_dropout="dropout, in training",
        attention_dropout="dropout, in training",
    ),
}
LLAMA4 = COMMON | {
    **_followed(image_token_index="the token that stands for a patch of a picture"),
    **_unused(
        boi_token_index="a token before a picture, which the processor sets",
        eoi_token_index="a token behind a picture, which the processor sets",
        tie_word_embeddings="nothing: text_config's own tells whether the head is the embedding",
    ),
}

# By the config's model_type.
KEYS: dict[str, dict[str, Key]] = {
    "deepseek_v3": DEEPSEEK_V3,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4_TEXT,
    "llama4_vision_model": LLAMA4_VISION,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
# Of an emitted config.json, and no setting of the model.
PAPERS = ("quantization_config", "compression_config", "auto_map")
NESTED = ("text_config", "vision_config")
# A key that no class knows. transformers sets it as an attribute and its layers never look at it.
UNKNOWN = Key(Use.ENGINES, "transformers' class does not read it, an engine may")
CONSTANTS = (True, False, None)


def _said(value: Any) -> str:
    """As JSON has it; a long list by its beginning."""
    text = {True: "true", False: "false", None: "null"}[value] if any(value is c for c in CONSTANTS) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fields(config: Any, path: str = "") -> Iterator[tuple[str, Key, Any]]:
    """(field, its key, its value as JSON has it) of a transformers config and its nested ones."""
    known = KEYS[config.model_type]
    for name, value in sorted(config.to_dict().items()):
        if name not in PAPERS and name not in NESTED:
            yield f"{path}{name}", known.get(name, UNKNOWN), value
    for name in NESTED:
        nested = getattr(config, name, None)
        if nested is not None:
            yield from fields(nested, f"{path}{name}.")


def forward_fields(config: Any) -> dict[str, Any]:
    """Field -> value of everything that takes part in the forward pass."""
    return {field: value for field, key, value in fields(config) if key.use in (Use.FOLLOWED, Use.FIXED)}


def differences(original: Any, checkpoint: Any) -> list[Difference]:
    """Every field in which two transformers configs of one class differ, but for those that no forward pass uses."""
    return _differences({field: value for field, _, value in fields(original)}, original, checkpoint)


def differences_from(recorded: dict[str, Any], checkpoint: Any) -> list[Difference]:
    """As `differences`, where of the original only its `forward_fields` are known."""
    found = _differences(recorded, checkpoint, checkpoint)
    return [d for d in found if d.field in recorded or d.field.rpartition(".")[0] in recorded]


def _differences(original: dict[str, Any], like: Any, checkpoint: Any) -> list[Difference]:
    """`like`: a config with the keys of `original`."""
    theirs = {field: value for field, _, value in fields(checkpoint)}
    keys = {field: key for config in (like, checkpoint) for field, key, _ in fields(config)}
    found = []
    for field in sorted(original.keys() | theirs.keys()):
        key = keys.get(field, UNKNOWN)
        if key.use is not Use.UNUSED:
            parts = _parts(original.get(field), theirs.get(field))
            found += [Difference(f"{field}{leaf}", a, b, key.use, key.does) for leaf, a, b in parts if a != b]
    return found


def _parts(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(what follows the field's name, value, value): of two dicts (`rope_parameters`) entry by entry."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return [("", a, b)]
    return [(f".{leaf}", a.get(leaf), b.get(leaf)) for leaf in sorted(a.keys() | b.keys())]


def refused(config: Any) -> list[str]:
    """The fixed keys that have another value; a line each, with the way out."""
    found = [
        f"{field} is {_said(value)}, and onecard computes with {_said(key.only[0])} alone ({key.way_out})"
        for field, key, value in fields(config)
        if key.use is Use.FIXED and value not in key.only
    ]
    configs = [config, *(getattr(config, name, None) for name in NESTED)]
    if any(getattr(c, "is_heterogeneous", False) for c in configs):
        found.append(
            "per_layer_config gives layers settings of their own, and no model of the family was published so: "
            "onecard computes all layers alike"
        )
    return found
