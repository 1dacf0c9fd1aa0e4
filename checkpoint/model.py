"""Model: an opened checkpoint, with config, adapter, and a source of dense weights.

Opening reads config.json and headers only, and refuses a checkpoint whose tensors contradict them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..core.errors import InputError, ResourceError, input_error
from ..core.json_text import json_text
from ..models.adapter import Adapter
from ..models.config_keys import forward_fields
from ..models.families import adapter_of, load_adapter
from ..models.known import demo_folder, on_hub, read_config
from .formats.fp8_read import FP8_BLOCKS
from .formats.stored_weight import StoredWeight
from .gguf.read import holds_gguf, open_gguf
from .packed import MOST_SHOWN, PackedSource, open_packed
from .provenance import hub_origin, source_card
from .remote import hub_error, open_remote
from .side_files import CARRIED, adapter_warnings
from .source import Folder, open_folder
from .source_checks import check_shapes, refuse_untied_copy

# The files to fetch from the hub: no pickles, no code.
HUB_PATTERNS = ["*.safetensors", "README.md", "*.json", *CARRIED]


@dataclass(frozen=True)
class Model:
    """A checkpoint that was opened and found sound."""

    # As the user gave it.
    name: str
    path: Path
    config: dict[str, Any]
    adapter: Adapter
    # The tensors as stored.
    folder: Folder
    # Dense weights, however they are stored.
    source: Folder | PackedSource

    @property
    def quantized(self) -> bool:
        return bool(self.packed)

    @property
    def packed(self) -> dict[str, StoredWeight]:
        """Every weight that is stored in parts, by its name in `source`."""
        return self.source.weights if isinstance(self.source, PackedSource) else {}

    @property
    def warnings(self) -> list[str]:
        """What a measurement of these files does not cover."""
        found = [*self.source.warnings] if isinstance(self.source, PackedSource) else []
        found += self.adapter.aside_warnings(self.source.names) + adapter_warnings(self.path)
        return [f"{self.name}: {warning}" for warning in found]

    @property
    def quantized_parameters(self) -> int:
        return sum(torch.Size(weight.info.shape).numel() for weight in self.packed.values())

    @property
    def quantized_bytes(self) -> int:
        """Bytes of all parts of quantized weights."""
        return sum(self.folder.infos[n].nbytes for w in self.packed.values() for n in w.parts.values())

    def facts(self) -> dict[str, Any]:
        """The record's section `model`."""
        return {
            "name": said_name(self.name),
            "family": self.adapter.family,
            "blocks": self.adapter.n_blocks,
            "experts": self.adapter.n_experts,
            "digest": self.folder.digest,
            "hub": hub_origin(self.path),
            "card": source_card(self.path),
            "config": forward_fields(self.adapter.config),
        }


def said_name(name: str) -> str:
    """The model's name for records: `demo`, a hub id, or a folder's own name. Records are shared, so no path."""
    return Path(name).resolve().name if name != "demo" and Path(name).exists() else name


def resolve_model(name: str) -> Path:
    """The folder of `demo`, of a local path, or of a hub id, which is downloaded. Raises InputError or
    ResourceError."""
    if name == "demo":
        return demo_folder() / "model"
    if not on_hub(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises its own and its HTTP library's kinds
        raise hub_error(name, error) from error


def open_model(name: str) -> Model:
    """Open a checkpoint and check its names and shapes against config.json. Reads no weights but a copy of a tied head,
    and downloads all files of a hub id. Raises InputError or ResourceError."""
    path = resolve_model(name)
    if not path.is_dir():
        raise InputError(f"{path} is a file: name the folder that holds it and its config.json")
    config = read_config(path)
    return checked_model(name, config, load_adapter(path), path)


def open_headers(name: str) -> Model:
    """`open_model` for callers that need headers only: of a hub id, only config.json and headers are fetched.

    The weights of such a model cannot be read, and it has no digest. Without network, an earlier download is opened.
    """
    if not on_hub(name):
        return open_model(name)
    try:
        folder: Folder | Path = open_remote(name)
    except ResourceError as error:
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # it was never downloaded, or not completely
            raise error from None
    path = folder if isinstance(folder, Path) else folder.path
    return checked_model(name, read_config(path), load_adapter(path), folder)


def open_written(model: Model, path: Path, config: dict[str, Any]) -> Model:
    """Open what was made from `model` in the folder `path`, before its config.json, with content `config`, is written.

    It is read by that content alone, as a stranger will read it: nothing is taken from `model`.
    """
    as_written = json.loads(json_text(config))
    return checked_model(str(path), as_written, adapter_of(path / "config.json", as_written), path)


def checked_model(name: str, config: dict[str, Any], adapter: Adapter, where: Folder | Path) -> Model:
    """The Model of a folder, already opened or not. Raises InputError when its tensors contradict config.json."""
    path = where if isinstance(where, Path) else where.path
    if isinstance(where, Path) and holds_gguf(path):
        adapter = adapter.text_only()
        packed = open_gguf(path, adapter)
        return Model(name, path, config, adapter, packed.folder, packed)
    folder = open_folder(path) if isinstance(where, Path) else where
    block = quantization_block(path, config)
    source = folder if block is None else open_packed(folder, block)
    twice = adapter.stored_twice(source.names)
    if twice:
        raise input_error(
            f"{path} holds some experts twice, and what an engine would take is not known:",
            twice,
            "Remove the layout that is left over.",
            MOST_SHOWN,
        )
    check_shapes(path, source, adapter.disk_shapes(source.names), adapter.left_aside(source.names))
    if isinstance(where, Path):  # otherwise only headers are here
        refuse_untied_copy(folder, adapter)
    return Model(name, path, config, adapter, folder, source)


def quantization_block(path: Path, config: dict[str, Any]) -> object | None:
    """The quantization block of config.json, wherever a tool puts it.

    It may lie at the top or in the text model's config, under its own or its older name (`compression_config`), or for
    older GPTQ files in quantize_config.json.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return place[key]
    beside = path / "quantize_config.json"
    if not beside.is_file():
        return None
    try:
        block = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{beside} is not valid JSON: fetch the checkpoint again") from None
    return {"quant_method": "gptq"} | block if isinstance(block, dict) else block


def open_source(name: str) -> Model:
    """Open a model that will be quantized. Raises InputError when it is quantized already, except by its makers."""
    return unquantized(open_model(name))


def is_original(model: Model) -> bool:
    """Whether a model can be quantized: it is not quantized yet, or only by its makers (published in fp8)."""
    adapter, source = model.adapter, model.source
    return not model.quantized or (
        adapter.published_in_fp8 and isinstance(source, PackedSource) and source.label == FP8_BLOCKS
    )


def unquantized(model: Model) -> Model:
    """Raises InputError for a model that is quantized already."""
    if not is_original(model):
        raise InputError(f"{model.name} is quantized already: quantize the original checkpoint")
    return model
