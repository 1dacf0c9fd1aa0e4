"""A checkpoint that was opened: what it is, whether it is sound, and what of it is stored at which width.

Only config.json and headers are read.
"""

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..core.errors import InputError, ResourceError
from ..core.layout import StoredTensor
from ..models.adapter import Adapter
from ..models.families import load_adapter
from ..models.known import demo_folder, on_hub, read_config
from .formats.fp8_read import FP8_BLOCKS
from .formats.stored_weight import StoredWeight
from .gguf.read import holds_gguf, open_gguf
from .packed import PackedSource, open_packed
from .plan import Width, tally
from .provenance import hub_origin, source_card
from .remote import hub_error, open_remote
from .source import Folder, check_shapes, open_folder

# What is fetched from the hub: never pickles, never code.
HUB_PATTERNS = [
    "*.safetensors",
    "README.md",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been opened and found sound. `source` gives dense weights, whatever is stored."""

    name: str
    path: Path
    config: dict[str, Any]
    adapter: Adapter
    folder: Folder
    source: Folder | PackedSource

    @property
    def quantized(self) -> bool:
        return bool(self.packed)

    @property
    def packed(self) -> dict[str, StoredWeight]:
        """Every weight that is stored in parts, by the name that the source gives it."""
        return self.source.weights if isinstance(self.source, PackedSource) else {}

    @property
    def warnings(self) -> list[str]:
        """What a measurement of these files leaves out."""
        found = self.source.warnings if isinstance(self.source, PackedSource) else ()
        return [f"{self.name}: {warning}" for warning in found]

    @property
    def quantized_parameters(self) -> int:
        return sum(torch.Size(weight.info.shape).numel() for weight in self.packed.values())

    @property
    def quantized_bytes(self) -> int:
        """Bytes of all parts of those weights."""
        return sum(self.folder.infos[n].nbytes for w in self.packed.values() for n in w.parts.values())

    def facts(self) -> dict[str, Any]:
        """What the record says of a model."""
        return {
            "name": said_name(self.name),
            "family": self.adapter.family,
            "blocks": self.adapter.n_blocks,
            "experts": self.adapter.n_experts,
            "digest": self.folder.digest,
            "hub": hub_origin(self.path),
            "card": source_card(self.path),
        }


def said_name(name: str) -> str:
    """`demo` or a hub id, and of a local folder its own name: a record is passed on, and tells no paths."""
    return Path(name).resolve().name if name != "demo" and Path(name).exists() else name


def resolve_model(name: str) -> Path:
    """`demo`, a local folder, or a hub id (downloaded). Raises InputError or ResourceError."""
    if name == "demo":
        return demo_folder() / "model"
    if not on_hub(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises its own and its HTTP library's kinds
        raise hub_error(name, error) from error


def open_model(name: str) -> Model:
    """Open and check a checkpoint: headers, names and shapes against config.json. Reads no weights (of a hub id, all
    files are downloaded)."""
    path = resolve_model(name)
    if not path.is_dir():
        raise InputError(f"{path} is a file: name the folder that holds it and its config.json")
    config = read_config(path)
    return checked_model(name, config, load_adapter(path), path)


def open_headers(name: str) -> Model:
    """`open_model` for what looks at headers alone: of a hub id only config.json and headers are fetched. Its weights
    cannot be read, nor has it a digest. Without network a model that was downloaded before is opened."""
    if not on_hub(name):
        return open_model(name)
    try:
        folder: Folder | Path = open_remote(name)
    except ResourceError as error:
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # it was never downloaded, or in part
            raise error from None
    path = folder if isinstance(folder, Path) else folder.path
    return checked_model(name, read_config(path), load_adapter(path), folder)


def open_written(model: Model, path: Path, config: dict[str, Any]) -> Model:
    """What was made from `model` in the folder `path`, before its config.json, which is to say `config`, lies there."""
    return checked_model(str(path), config, model.adapter, path)


def checked_model(name: str, config: dict[str, Any], adapter: Adapter, where: Folder | Path) -> Model:
    """The Model of a folder, opened already or not, whose tensors are what its config.json says."""
    path = where if isinstance(where, Path) else where.path
    if isinstance(where, Path) and holds_gguf(path):
        adapter = adapter.text_only()
        packed = open_gguf(path, adapter)
        return Model(name, path, config, adapter, packed.folder, packed)
    folder = open_folder(path) if isinstance(where, Path) else where
    block = quantization_block(path, config)
    source = folder if block is None else open_packed(folder, block)
    check_shapes(path, source, adapter.disk_shapes(source.names), adapter.left_aside)
    return Model(name, path, config, adapter, folder, source)


def quantization_block(path: Path, config: dict[str, Any]) -> object | None:
    """What config.json says of a quantized checkpoint, where the tools put it: at the top, in the text model's config,
    under its first name (`compression_config`), or, of older GPTQ files, in a file of its own."""
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
    """A model to be quantized: it must not be quantized already, other than by those who made it."""
    return unquantized(open_model(name))


def is_original(model: Model) -> bool:
    """Whether it can be quantized: not quantized already, other than by those who made it."""
    adapter, source = model.adapter, model.source
    return not model.quantized or (
        adapter.published_in_fp8 and isinstance(source, PackedSource) and source.label == FP8_BLOCKS
    )


def unquantized(model: Model) -> Model:
    """Raises InputError for a model that is quantized already."""
    if not is_original(model):
        raise InputError(f"{model.name} is quantized already: quantize the original checkpoint")
    return model


def stored_widths(model: Model) -> tuple[Width, ...]:
    """What of a checkpoint lies there at which width, by role, from its headers."""
    return tally(stored_weights(model).values())


def stored_weights(model: Model) -> dict[str, Width]:
    """Canonical name -> how that tensor is stored, from the headers."""
    adapter, source, packed = model.adapter, model.source, model.packed

    def stored(name: str, shape: tuple[int, ...]) -> Width:
        tensor = adapter.locate(name, source.names).tensor
        weight = packed.get(tensor)
        if weight is None:
            dtype = source.info(tensor).dtype
            return Width(adapter.role(name).value, dtype, prod(shape), StoredTensor(name, dtype, shape).nbytes)
        # A fused tensor holds many weights: each has its share of it.
        parts = sum(model.folder.infos[part].nbytes for part in weight.parts.values())
        count = parts * prod(shape) // prod(weight.info.shape)
        return Width(adapter.role(name).value, weight.width, prod(shape), count)

    return {name: stored(name, shape) for name, shape in adapter.expected().items()}


def stored_facts(model: Model) -> dict[str, Any]:
    """What a record's `plan` says of files that lie there."""
    parameters = sum(prod(shape) for shape in model.adapter.expected().values())
    emitted_bytes = model.folder.file_bytes
    return {
        "emitted_bytes": emitted_bytes,
        "parameters": parameters,
        "quantized_parameters": model.quantized_parameters,
        "quantized_share": model.quantized_parameters / parameters,
        "bits_per_weight": emitted_bytes * 8 / parameters,
        "quantized_bits_per_weight": model.quantized_bytes * 8 / max(1, model.quantized_parameters),
        "shards": len(model.folder.shards),
        "widths": [asdict(width) for width in stored_widths(model)],
    }
