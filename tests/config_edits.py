"""Edits of config.json: for every key of every family's config classes, values that a baby's does not have."""

import json
from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
OF_TRAINING = {"attention_dropout": 0.3, "initializer_range": 0.5, "router_aux_loss_coef": 0.5}

# Path of a key -> edits of config.json, each a value for it or a dict of several keys that must go together.
TEXT: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "swish"],
    "is_causal": [False],
    "vocab_size": [320],
    "hidden_size": [96],
    "num_hidden_layers": [2],
    "num_attention_heads": [8],
    "num_key_value_heads": [4, 2],
    "rms_norm_eps": [0.1],
    "rope_parameters": [ROPE, DYNAMIC, YARN],
    "tie_word_embeddings": [True],
    "num_experts_per_tok": [3],
    "max_position_embeddings": [{"max_position_embeddings": 16, "rope_parameters": DYNAMIC, "head_dim": 16}, 64],
    **{key: [value] for key, value in OF_TRAINING.items()},
    "use_cache": [False],
    "pad_token_id": [5],
    "bos_token_id": [5],
    "eos_token_id": [5],
    "output_router_logits": [True],
}
EDITS: dict[str, dict[str, list[Any]]] = {
    "qwen3": TEXT
    | {
        "intermediate_size": [96],
        "moe_intermediate_size": [96],
        "head_dim": [32],
        "sliding_window": [5, {"sliding_window": 5, "use_sliding_window": True}],
        "use_sliding_window": [{"sliding_window": 5, "use_sliding_window": True}],
        "decoder_sparse_step": [2],
        "mlp_only_layers": [[0, 1]],
        "num_local_experts": [4],
        "norm_topk_prob": [False],
        "attention_bias": [True],
    },
    "mixtral": TEXT
    | {
        "rope_parameters": [ROPE],  # transformers fails with DYNAMIC where head_dim is not given
        "intermediate_size": [160],
        "head_dim": [32],
        "num_local_experts": [4],
        "sliding_window": [5, None],
        "router_jitter_noise": [0.5],
    },
    "deepseek": TEXT
    | {
        "intermediate_size": [96],
        "moe_intermediate_size": [96],
        "n_shared_experts": [1],
        "n_routed_experts": [16],
        "routed_scaling_factor": [1.0],
        "kv_lora_rank": [64],
        "q_lora_rank": [64, None],
        "max_position_embeddings": [{"max_position_embeddings": 16, "rope_parameters": DYNAMIC}, 64],
        "qk_rope_head_dim": [{"qk_rope_head_dim": 16, "head_dim": 16}],
        "qk_nope_head_dim": [32],
        "v_head_dim": [32],
        "n_group": [2],
        "topk_group": [1],
        "first_k_dense_replace": [2],
        "norm_topk_prob": [False],
        "rope_interleave": [False],
        "attention_bias": [True],
        "scoring_func": ["softmax"],
        "topk_method": ["greedy"],
        "moe_layer_freq": [2],
        "pretraining_tp": [2],
        "num_nextn_predict_layers": [1],
    },
}
LLAMA4_TEXT = TEXT | {
    "num_hidden_layers": [2, {"num_hidden_layers": 2, "layer_types": None, "no_rope_layers": None, "moe_layers": None}],
    "intermediate_size": [160],
    "intermediate_size_mlp": [{"intermediate_size_mlp": 96, "moe_layers": [0, 2]}],
    "head_dim": [32],
    "num_local_experts": [4],
    "moe_layers": [[0, 2]],
    "use_qk_norm": [False],
    "no_rope_layers": [[0, 1, 1, 1]],
    "layer_types": [["full_attention"] * 4],
    "attn_temperature_tuning": [False],
    "floor_scale": [3],
    "attn_scale": [0.9],
    "attention_bias": [True],
    "attention_chunk_size": [5, None],
    "router_jitter_noise": [0.5],
    "interleave_moe_layer_step": [2],
    "no_rope_layer_interval": [2],
}
VISION: dict[str, list[Any]] = {
    "hidden_size": [{"hidden_size": 48, "intermediate_size": 192}, 64],
    "num_hidden_layers": [1],
    "num_attention_heads": [1],
    "num_channels": [{"num_channels": 1}],
    "intermediate_size": [{"hidden_size": 48, "intermediate_size": 192}, 96],
    "vision_output_dim": [{"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}],
    "image_size": [24],
    "patch_size": [2],
    "pixel_shuffle_ratio": [{"pixel_shuffle_ratio": 0.25, "intermediate_size": 512}, 0.25],
    "projector_input_dim": [{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}],
    "projector_output_dim": [{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}],
    "rope_parameters": [ROPE],
    "hidden_act": ["relu"],
    "norm_eps": [0.1],
    "vision_feature_select_strategy": ["full"],
    "initializer_range": [0.5],
    "multi_modal_projector_bias": [True],
    "projector_dropout": [0.3],
    "attention_dropout": [0.3],
}
EDITS["scout"] = (
    {f"text_config.{key}": values for key, values in LLAMA4_TEXT.items()}
    | {f"vision_config.{key}": values for key, values in VISION.items()}
    | {"boi_token_index": [5], "eoi_token_index": [5], "tie_word_embeddings": [True]}
)
# Keys of every class that only say what is given out, who wrote the file, or what a classifier is.
ANYWHERE: dict[str, list[Any]] = {
    "architectures": [["Other"]],
    "dtype": ["float16"],
    "chunk_size_feed_forward": [1],
    "id2label": [{"0": "x"}],
    "label2id": [{"x": 0}],
    "is_encoder_decoder": [False],
    "output_hidden_states": [True],
    "problem_type": ["regression"],
    "return_dict": [True],
    "transformers_version": ["4.51.0"],
}


def edited(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """config.json with another value under a key, given by its path. A dict sets several keys beside it."""
    config = json.loads(json.dumps(config))
    *parents, leaf = key.split(".")
    owner = config
    for parent in parents:
        owner = owner[parent]
    owner.update(
        value if isinstance(value, dict) and leaf not in ("rope_parameters", "id2label", "label2id") else {leaf: value}
    )
    return config
