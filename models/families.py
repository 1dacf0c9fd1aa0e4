"""The look-up from config.json's model_type to the family's adapter."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..core.errors import InputError
from .adapter import Adapter
from .llama4 import Llama4Adapter
from .qwen3_moe import Qwen3MoeAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "llama4": Llama4Adapter,
    "llama4_text": Llama4Adapter,
    "qwen3_moe": Qwen3MoeAdapter,
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain data."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json: name the folder of a Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object: fetch the checkpoint again")
    return config


def load_adapter(folder: Path) -> Adapter:
    """The adapter of the checkpoint in `folder`. No code of the checkpoint is ever run."""
    raw = read_config(folder)
    model_type = raw.get("model_type")
    if raw.get("auto_map"):
        wanted = ", ".join(sorted(raw["auto_map"])) if isinstance(raw["auto_map"], dict) else repr(raw["auto_map"])
        raise InputError(
            f"{folder / 'config.json'} wants remote code (auto_map: {wanted}), which "
            "onecard never runs: use the family's plain checkpoint, or remove auto_map if transformers' own class fits"
        )
    if not isinstance(model_type, str) or model_type not in ADAPTERS:
        raise InputError(
            f"{folder / 'config.json'} has the unknown model type {model_type!r}; "
            f"onecard knows {', '.join(sorted(ADAPTERS))}"
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        adapter = ADAPTERS[model_type](config)
        if adapter.top_k > adapter.n_experts:
            raise ValueError(f"{adapter.top_k} experts a token of {adapter.n_experts}")
        adapter.expected()  # transformers finds most contradictions only when it builds the model
        return adapter
    except Exception as error:  # transformers raises many kinds for a contradictory config
        raise InputError(f"{folder / 'config.json'} is not a valid {model_type} config: {error}") from error
