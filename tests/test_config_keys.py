"""Every key of every config class: the walk computes with it as transformers does, or refuses it, or no forward pass
uses it. The judge is the whole model of transformers, built from the same config and weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import babies
from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError
from onecard.core.rows import Row
from onecard.models.config_keys import KEYS, NESTED, Use
from onecard.models.families import ADAPTERS, load_adapter
from walking import relative, walk_logits, whole_logits

FAMILIES = ("scout", "qwen3", "deepseek", "mixtral")
ROPE = {"rope_type": "default", "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
OF_TRAINING = {"attention_dropout": 0.3, "initializer_range": 0.5, "router_aux_loss_coef": 0.5}

# Path of a key -> edits of config.json, each a value for it or a dict of several keys that must go together.
TEXT: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "swish"],
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
        "rope_parameters": [ROPE, DYNAMIC],  # DYNAMIC breaks without a head_dim
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
NOT_TRIED = {
    "_name_or_path": "written by save_pretrained, read by nothing",
    "model_type": "another family",
    "image_token_index": "a row's placeholders go by it: test_verify_configs.py",
    "output_attentions": "transformers refuses it beside sdpa",
    "tie_last_hidden_states": "no field of the class",
    "head_dim": "of DeepSeek-V3: qk_rope_head_dim by another name",
    "qk_head_dim": "of DeepSeek-V3: computed from two others",
    "aux_loss_alpha": "no field of the class",
    "seq_aux": "no field of the class",
    "ep_size": "no field of the class",
}


CASES = [
    pytest.param(family, key, id=f"{family}-{key}")
    for family in FAMILIES
    for key in EDITS[family].keys() | (ANYWHERE.keys() if family == "qwen3" else set())
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_config_class_is_in_one_group_and_is_tried(family: str) -> None:
    config = babies.make_model(family, layers=1).config
    for c, path in [(config, ""), *((getattr(config, n), f"{n}.") for n in NESTED if hasattr(config, n))]:
        known, there = KEYS[c.model_type], set(c.to_dict()) - {*NESTED}
        assert there <= known.keys(), "transformers' class has a key that config_keys.py lacks"
        tried = {key.removeprefix(path) for key in EDITS[family] if key.startswith(path)} | ANYWHERE.keys()
        assert known.keys() - tried <= NOT_TRIED.keys()


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


@dataclass
class Tried:
    """A config in transformers and in a walk. Logits are None where transformers fails, or onecard refuses it."""

    shapes: dict[str, tuple[int, ...]]
    whole: list[torch.Tensor] | None
    walked: list[torch.Tensor] | None
    refusal: str = ""


def whole_model(family: str, raw: dict[str, Any]) -> Any:
    """transformers' model of a config.json, with the same random values for the same shapes."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(ADAPTERS[raw["model_type"]].mended(raw))
    if family == "scout":
        model: Any = Llama4ForConditionalGeneration(config).float()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    babies.randomize(model, seed=0)
    return model


def try_config(family: str, raw: dict[str, Any], folder: Path) -> Tried:
    try:
        model = whole_model(family, raw)
        rows = rows_for(model.config)
        whole = [whole_logits(model, row) for row in rows]
    except Exception:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(InputError) as error:
            load_adapter(folder)
        return Tried({}, None, None, str(error.value))
    state = babies.published(family, model.state_dict())
    if getattr(model.config, "text_config", model.config).tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    babies.save(folder, model.config, state)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        adapter = load_adapter(folder)
    except InputError as error:
        return Tried(shapes, whole, None, str(error))
    return Tried(shapes, whole, walk_logits(adapter, open_folder(folder), rows))


def rows_for(config: Any) -> list[Row]:
    """A long row, with a picture where the model sees, and a short one."""
    generator = torch.Generator().manual_seed(7)
    tokens, pixels = torch.randint(3, 240, (33,), generator=generator), None
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        side = vision.image_size
        pixels = torch.randn(1, vision.num_channels, side, side, generator=generator)
        count = int((side // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)
        tokens[2 : 2 + count] = config.image_token_index
    return [Row("long", "text", tokens, pixels), Row("short", "text", torch.arange(3, 9))]


@pytest.fixture(scope="module")
def as_is(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Tried]]:
    """config.json of a family's baby, and what both make of it."""

    @cache
    def get(family: str) -> tuple[dict[str, Any], Tried]:
        raw = json.loads(babies.make_model(family).config.to_json_string(use_diff=False))
        return raw, try_config(family, raw, tmp_path_factory.mktemp(family))

    return get


@pytest.mark.parametrize(("family", "key"), CASES)
def test_a_changed_key_is_computed_as_transformers_does_or_refused_or_in_no_forward_pass(
    family: str, key: str, as_is: Callable[[str], tuple[dict[str, Any], Tried]], tmp_path: Path
) -> None:
    raw, before = as_is(family)
    assert before.walked is not None
    assert before.whole is not None
    *_, owner, leaf = f"{family}.{key}".split(".")
    kind = {"text_config": "llama4_text", "vision_config": "llama4_vision_model"}.get(owner, raw["model_type"])
    use = KEYS[kind][leaf].use
    effects = set()
    for number, value in enumerate((EDITS[family] | ANYWHERE)[key]):
        after = try_config(family, edited(raw, key, value), tmp_path / str(number))
        if after.whole is None:
            effects.add("transformers fails")
        elif after.walked is None:
            assert leaf in after.refusal
            effects.add("refused")
        else:
            for ours, theirs in zip(after.walked, after.whole, strict=True):
                assert relative(ours, theirs) < 2e-5, value
            same = after.shapes == before.shapes and all(map(torch.equal, after.whole, before.whole))
            effects.add("none" if same else "changes")
    if use is Use.FOLLOWED:
        assert effects & {"changes", "transformers fails"}
        assert "refused" not in effects
    elif use is Use.FIXED:
        assert "refused" in effects
        assert "changes" not in effects
    else:
        assert effects == {"none"}
