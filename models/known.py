"""The families that onecard knows, and what can be refused of a model's name before torch is loaded.

A misspelt path, a folder without config.json and an unknown `model_type` are answered in well under a second. What a
config.json says in detail is checked later, by the family's adapter (families.py).
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.json_text import nonfinite

# Family -> its name in plain words.
FAMILIES = {
    "deepseek_v3": "DeepSeek-V3",
    "llama4": "Llama 4",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
}
# `model_type` of a config.json -> family.
MODEL_TYPES = {**{family: family for family in FAMILIES}, "llama4_text": "llama4"}


def demo_folder() -> Path:
    """The folder of the embedded demo: model/ and data/."""
    return Path(str(resources.files(f"{__package__.partition('.')[0]}.demo")))


def on_hub(name: str) -> bool:
    """Whether a model's name is a hub id rather than a local folder or `demo`.

    Raises InputError when it is none of the three.
    """
    if name == "demo" or Path(name).exists():
        return False
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise InputError(f"{name} is no folder and no hub id: name a local checkpoint, a hub id (owner/name) or `demo`")
    if Path(name).parent.is_dir():
        raise InputError(f"{Path(name).parent} is a folder here, and holds no {Path(name).name}: is the name mistyped?")
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain data. Raises InputError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json: name the folder of a Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object: fetch the checkpoint again")
    if found := nonfinite(config):
        places = ", ".join(f"{place} is {word}" for place, word in found)
        raise InputError(f"{path} holds numbers that are not finite ({places}): mend it, or fetch the checkpoint again")
    return config


def refuse_remote_code(path: Path, config: dict[str, Any], known_code: frozenset[str] = frozenset()) -> None:
    """Raises InputError when a config.json names code of its own, other than `known_code`, which is never run."""
    auto_map = config.get("auto_map")
    if not auto_map or (isinstance(auto_map, dict) and known_code.issuperset(auto_map.values())):
        return
    wanted = ", ".join(sorted(auto_map)) if isinstance(auto_map, dict) else repr(auto_map)
    raise InputError(
        f"{path} wants remote code (auto_map: {wanted}), which onecard never runs: use the family's plain checkpoint, "
        "or remove auto_map if transformers' own class fits"
    )


def known_model_type(path: Path, config: dict[str, Any]) -> str:
    """The `model_type` of a config.json. Raises InputError for one that onecard does not know."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return model_type
    refuse_remote_code(path, config)
    raise InputError(
        f"{path} has the unknown model type {model_type!r}; onecard knows {', '.join(sorted(MODEL_TYPES))}"
    )


def refuse_unusable(name: str) -> None:
    """Raises InputError for a model that cannot be opened, as far as its name and its config.json tell.

    A hub id passes: only the network can tell more.
    """
    if name == "demo" or on_hub(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: name the folder that holds it and its config.json")
    known_model_type(folder / "config.json", read_config(folder))
