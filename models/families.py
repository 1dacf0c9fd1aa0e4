"""The look-up from config.json's model_type to the family's adapter."""

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..core.errors import InputError
from .adapter import Adapter
from .config_keys import refused
from .deepseek_v3 import DeepseekV3Adapter
from .known import known_model_type, read_config, refuse_remote_code
from .llama4 import Llama4Adapter
from .mixtral import MixtralAdapter
from .qwen3_moe import Qwen3MoeAdapter
from .short_row import run_short_row

ADAPTERS: dict[str, type[Adapter]] = {
    "deepseek_v3": DeepseekV3Adapter,
    "llama4": Llama4Adapter,
    "llama4_text": Llama4Adapter,
    "mixtral": MixtralAdapter,
    "qwen3_moe": Qwen3MoeAdapter,
}

# Config keys whose value must be at least 1, where a family has them.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "attention_chunk_size",
    "sliding_window",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_local_experts",
    "topk_group",
)


def load_adapter(folder: Path) -> Adapter:
    """The adapter of the checkpoint in `folder`. Raises InputError."""
    return adapter_of(folder / "config.json", read_config(folder))


def adapter_of(path: Path, raw: dict[str, Any]) -> Adapter:
    """The adapter for `raw`, the content of the config.json at `path`. No code of the checkpoint is ever run.

    Raises InputError for a config that contradicts itself, that no layer can be built or called with, or that has a
    value with which onecard does not compute (config_keys.py).
    """
    model_type = known_model_type(path, raw)
    refuse_remote_code(path, raw, ADAPTERS[model_type].known_code)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(ADAPTERS[model_type].mended(raw))
        other = refused(config)
        if other:
            raise ValueError("; ".join(other))
        adapter = ADAPTERS[model_type](config)
        problems = [
            f"{key} is {getattr(adapter.text_config, key)}"
            for key in SIZES
            if isinstance(getattr(adapter.text_config, key, None), int) and getattr(adapter.text_config, key) < 1
        ]
        if problems:
            raise ValueError(", ".join(problems))
        if adapter.top_k > adapter.n_experts:
            raise ValueError(f"{adapter.top_k} experts a token of {adapter.n_experts}")
        # transformers finds most contradictions only when it builds the model, and the rest when it calls a layer.
        adapter.expected()
        run_short_row(adapter)
        return adapter
    except Exception as error:  # transformers raises many kinds for a contradictory config
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} is not a valid {model_type} config ({what}): mend it, or fetch the original"
        ) from error
