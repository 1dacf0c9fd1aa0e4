"""A folder with one GGUF file and a config.json, as a source of dense weights: those that llama.cpp computes with.

Each expert of a stacked tensor lies in one contiguous piece. So the file is shown as a Folder whose entries are
canonical tensors, and one expert is read without the others. The gguf package's own dequantizer unpacks weights in
blocks in fp32, whoever made them (Q4_0 and its like, K and I quants). Only the text model is looked for, even if
config.json has a vision tower. Where the file's metadata and config.json both say something they must agree: a file of
another model, or with another rotary base, is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from ...core.errors import InputError, input_error
from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from ...core.tensors import TensorInfo
from ...models import gguf as words
from ...models.adapter import Adapter
from ..formats.stored_weight import FLOATS, StoredWeight
from ..packed import MOST_SHOWN, PackedSource
from ..source import Folder, allowed_root, holds_safetensors
from . import blocks as gguf_blocks
from . import file as gguf_file

NAME = "gguf"
BLOCKS = "blocks"
ACTIVATIONS = (
    "llama.cpp rounds activations to 8 bits where weights are in blocks: the figures here measure the weights alone"
)
# The block types that onecard writes -> their codes.
SCHEMES = {"Q4_0": Scheme(4, 32, True), "Q4_1": Scheme(4, 32, False), "Q8_0": Scheme(8, 32, True)}
# Metadata that may differ from config.json: a shorter context, and the vocabulary, which the list of tokens says too.
CHOSEN = ("context_length", "vocab_size")
TOKENIZER = "tokenizer."
# Metadata with which llama.cpp scales rotary positions, and the values that scale nothing.
SCALING = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
}
# Metadata of other writers that say again what the settings say, or nothing that is computed with.
HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_shared_count"}
# What llama.cpp takes for a rotary base that the file does not name.
BASE_KEY, BASE = "rope.freq_base", 10000.0
# GGUF stores factors and settings as fp32, computed by other programs.
RELATIVE_TOLERANCE = 1e-5


def holds_gguf(path: Path) -> bool:
    """Whether a folder's weights are in GGUF."""
    return any(path.glob("*.gguf")) and not holds_safetensors(path)


def dense(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, kind: str) -> torch.Tensor:
    """The weight [O, I] of blocks uint8 [O, bytes]. Raises ValueError for non-finite values."""
    values = torch.from_numpy(np.asarray(dequantize(parts[BLOCKS].numpy(), GGMLQuantizationType[kind])))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("holds non-finite values")
    return values.to(dtype)


def codes(parts: Mapping[str, torch.Tensor], *, scheme: Scheme) -> QuantizedWeight:
    """The codes [O, I] with fp16 scales."""
    return gguf_blocks.unpack(parts[BLOCKS], scheme, torch.float16)


@dataclass
class _Contents:
    """The tensors of a file, as entries of a Folder and as weights in parts."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    offsets: dict[str, tuple[Path, int]] = field(default_factory=dict)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def open_gguf(path: Path, adapter: Adapter) -> PackedSource:
    """Open the GGUF file in `path` by its header. `adapter` is that of the config.json beside it, without vision.

    Raises InputError with every contradiction.
    """
    file = _only_file(path)
    try:
        opened = gguf_file.open_file(file)
        entries = words.layout(adapter) if adapter.family in words.ARCHITECTURES else None
    except ValueError as error:
        raise InputError(f"{file} {error}") from None
    if entries is None:
        raise InputError(f"{path}: {words.refusals(adapter)[0]}")
    architecture, said = words.ARCHITECTURES[adapter.family], opened.metadata.get("general.architecture")
    if said != architecture:
        raise InputError(
            f"{file} has general.architecture {said!r}, and config.json's model is llama.cpp's {architecture!r}: "
            "put the model's own config.json beside the GGUF file"
        )
    contents = _contents(opened, entries)
    problems = [*_metadata_problems(opened, adapter), *contents.problems]
    known = {entry.name for entry in entries} | {words.ROPE_FACTORS}
    unknown = sorted(opened.tensors.keys() - known)
    problems += [f"{name} is in the file and config.json knows no such tensor" for name in unknown]
    if problems:
        raise input_error(
            f"{file} is not the model that its config.json describes:",
            problems,
            "Put the model's own config.json beside the GGUF file, and fetch the complete file.",
            MOST_SHOWN,
        )
    infos, weights = contents.infos, contents.weights
    virtual = {name: info for name, info in infos.items() if name.removesuffix(f".{BLOCKS}") not in weights}
    virtual |= {name: weight.info for name, weight in weights.items()}
    kinds = sorted({weight.width for weight in weights.values()})
    return PackedSource(
        folder=Folder(path, infos, contents.offsets, (opened.path,)),
        label=f"{NAME} {' and '.join(kinds or ['not quantized'])}",
        weights=weights,
        virtual=virtual,
        warnings=((ACTIVATIONS,) if weights else ()) + _unknown_metadata(opened, adapter),
    )


def stored_tokenizer(path: Path) -> dict[str, Any] | None:
    """What the GGUF file of a folder that was opened says of its tokenizer, by the gguf package; keys lack the prefix
    `tokenizer.`. None for other folders."""
    if not holds_gguf(path):
        return None
    fields = GGUFReader(_only_file(path)).fields
    return {
        name.removeprefix(TOKENIZER): field.contents() for name, field in fields.items() if name.startswith(TOKENIZER)
    }


def _only_file(path: Path) -> Path:
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} GGUF files: keep one, complete, in a folder")
    if not found[0].resolve().is_relative_to(allowed_root(path)):
        raise InputError(f"{found[0]} is a link that leaves the folder (to {found[0].resolve()})")
    return found[0]


def _contents(opened: gguf_file.Opened, entries: Sequence[words.TensorLayout]) -> _Contents:
    """Find every expected tensor, and cut stacked ones into experts."""
    found = _Contents()
    for entry in entries:
        if entry.name not in opened.tensors:
            found.problems.append(f"{entry.name} is missing")
            continue
        tensor, offset = opened.tensors[entry.name]
        if tensor.shape != entry.shape:
            found.problems.append(f"{entry.name} is {list(tensor.shape)}, and config.json says {list(entry.shape)}")
            continue
        if tensor.kind not in FLOATS and not _readable(tensor.kind):
            found.problems.append(f"{entry.name} is {tensor.kind}, which the gguf package does not unpack")
            continue
        shape = entry.shape[1:] if entry.stacked else entry.shape
        part_bytes = tensor.nbytes // len(entry.parts)
        for number, part in enumerate(entry.parts):
            place = (opened.path, offset + number * part_bytes)
            if tensor.kind in FLOATS:
                found.infos[part], found.offsets[part] = TensorInfo(shape, tensor.kind), place
                continue
            stored = f"{part}.{BLOCKS}"
            found.infos[stored] = TensorInfo((shape[0], part_bytes // shape[0]), "U8")
            found.offsets[stored] = place
            found.weights[part] = _weight(tensor.kind, shape, stored)
    return found


def _weight(kind: str, shape: tuple[int, ...], stored: str) -> StoredWeight:
    scheme = SCHEMES.get(kind)
    return StoredWeight(
        info=TensorInfo(shape, "F32"),
        width=kind,
        parts={BLOCKS: stored},
        decode=partial(dense, kind=kind),
        scheme=scheme,
        codes=None if scheme is None else partial(codes, scheme=scheme),
        anywhere=False,  # the gguf package unpacks numpy arrays
    )


def _readable(kind: str) -> bool:
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _unknown_metadata(opened: gguf_file.Opened, adapter: Adapter) -> tuple[str, ...]:
    """A warning that names the architecture's metadata of which onecard does not know what they do."""
    prefix = f"{words.ARCHITECTURES[adapter.family]}."
    known = words.settings(adapter).keys() | SCALING.keys() | HARMLESS
    found = sorted(key for key in opened.metadata if key.startswith(prefix) and key.removeprefix(prefix) not in known)
    if not found:
        return ()
    said = ", ".join(f"{key} = {opened.metadata[key]}" for key in found)
    return (f"llama.cpp may compute with metadata that config.json does not have, and the figures leave out: {said}",)


def _metadata_problems(opened: gguf_file.Opened, adapter: Adapter) -> list[str]:
    """Every contradiction between the file's metadata and config.json."""
    architecture = words.ARCHITECTURES[adapter.family]
    problems = []
    for key, value in words.settings(adapter).items():
        stored = opened.metadata.get(f"{architecture}.{key}")
        if key in CHOSEN or stored is None or isinstance(value, list | str):
            continue
        if not isinstance(stored, int | float) or not math.isclose(stored, value, rel_tol=RELATIVE_TOLERANCE):
            problems.append(f"{architecture}.{key} is {stored}, and config.json says {value}")
    for key, neutral in SCALING.items():
        stored = opened.metadata.get(f"{architecture}.{key}")
        if stored is not None and stored not in neutral:
            problems.append(
                f"{architecture}.{key} is {stored}, and config.json says nothing that llama.cpp scales by it"
            )
    base = words.settings(adapter)[BASE_KEY]
    if f"{architecture}.{BASE_KEY}" not in opened.metadata and base != BASE:
        problems.append(f"{architecture}.{BASE_KEY} is missing: llama.cpp takes {BASE:g}, and config.json says {base}")
    wanted, stored = words.rope_factors(adapter), opened.tensors.get(words.ROPE_FACTORS)
    if (wanted is None) != (stored is None):
        problems.append(
            f"{words.ROPE_FACTORS} is {'missing' if stored is None else 'there'}, and config.json says "
            f"{'no' if wanted is None else 'Llama 3 '}rope scaling"
        )
    elif wanted is not None and stored is not None:
        tensor, offset = stored
        with opened.path.open("rb") as file:
            file.seek(offset)
            factors = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float32)
        if (
            tensor.kind != "F32"
            or factors.shape != wanted.shape
            or not torch.allclose(factors, wanted, rtol=RELATIVE_TOLERANCE)
        ):
            problems.append(f"{words.ROPE_FACTORS} holds other factors than config.json's rope scaling gives")
    return problems
