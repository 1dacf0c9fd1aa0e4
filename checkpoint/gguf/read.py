"""A folder with one GGUF file, config.json beside it, as a source of dense weights: what llama.cpp will compute with.

Every expert of a stacked tensor lies in one piece, so the file is shown as a Folder whose entries are canonical
tensors: an expert is read without the others. Weights in blocks (whoever made them: Q4_0 and its like, K and I quants)
are unpacked by the gguf package's own dequantizer, in fp32. The text model alone is looked for, whatever config.json
says of a vision tower. The file's metadata must agree with config.json where both say something: a file of another
model, or with another rotary base, is refused.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
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
    "llama.cpp rounds activations to 8 bits where weights are in blocks: what is measured is the weights alone"
)
# Of the block types that onecard writes, what their codes are.
SCHEMES = {"Q4_0": Scheme(4, 32, True), "Q4_1": Scheme(4, 32, False), "Q8_0": Scheme(8, 32, True)}
# Metadata that a file may choose for itself: a shorter context, and a size that its list of tokens says as well.
CHOSEN = ("context_length", "vocab_size")
# Factors and settings are fp32 there, and were computed by somebody else's program.
RELATIVE_TOLERANCE = 1e-5


def holds_gguf(path: Path) -> bool:
    """Whether a GGUF file is what a folder's weights are."""
    return any(path.glob("*.gguf")) and not holds_safetensors(path)


def dense(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, kind: str) -> torch.Tensor:
    """The weight [O, I] of blocks uint8 [O, bytes]. Raises ValueError for values that are no numbers."""
    values = torch.from_numpy(np.asarray(dequantize(parts[BLOCKS].numpy(), GGMLQuantizationType[kind])))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("holds values that are no numbers")
    return values.to(dtype)


def codes(parts: Mapping[str, torch.Tensor], *, scheme: Scheme) -> QuantizedWeight:
    """The codes [O, I] and their scales, fp16."""
    return gguf_blocks.unpack(parts[BLOCKS], scheme, torch.float16)


def open_gguf(path: Path, adapter: Adapter) -> PackedSource:
    """The file in `path`, whose config.json `adapter` (without vision) was made from. Reads the header. Raises
    InputError with every offender."""
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} GGUF files: keep one, whole, in a folder")
    if not found[0].resolve().is_relative_to(allowed_root(path)):
        raise InputError(f"{found[0]} is a link that leaves the folder (to {found[0].resolve()})")
    try:
        opened = gguf_file.open_file(found[0])
        entries = words.layout(adapter) if adapter.family in words.ARCHITECTURES else None
    except ValueError as error:
        raise InputError(f"{found[0]} {error}") from None
    if entries is None:
        raise InputError(f"{path}: {words.refusals(adapter)[0]}")
    architecture, said = words.ARCHITECTURES[adapter.family], opened.metadata.get("general.architecture")
    if said != architecture:
        raise InputError(
            f"{found[0]} has general.architecture {said!r}, and config.json's model is llama.cpp's {architecture!r}: "
            "put config.json of the very model beside the GGUF file"
        )
    problems = _metadata_problems(opened, adapter)
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[Path, int]] = {}
    weights: dict[str, StoredWeight] = {}
    for entry in entries:
        if entry.name not in opened.tensors:
            problems.append(f"{entry.name} is missing")
            continue
        tensor, offset = opened.tensors[entry.name]
        if tensor.shape != entry.shape:
            problems.append(f"{entry.name} is {list(tensor.shape)}, and config.json says {list(entry.shape)}")
            continue
        if tensor.kind not in FLOATS and not _readable(tensor.kind):
            problems.append(f"{entry.name} is {tensor.kind}, which the gguf package does not unpack")
            continue
        shape = entry.shape[1:] if entry.stacked else entry.shape
        each = tensor.nbytes // len(entry.parts)
        for number, part in enumerate(entry.parts):
            place = (opened.path, offset + number * each)
            if tensor.kind in FLOATS:
                infos[part], offsets[part] = TensorInfo(shape, tensor.kind), place
                continue
            stored = f"{part}.{BLOCKS}"
            infos[stored], offsets[stored] = TensorInfo((shape[0], each // shape[0]), "U8"), place
            scheme = SCHEMES.get(tensor.kind)
            weights[part] = StoredWeight(
                TensorInfo(shape, "F32"),
                tensor.kind,
                {BLOCKS: stored},
                partial(dense, kind=tensor.kind),
                scheme=scheme,
                codes=None if scheme is None else partial(codes, scheme=scheme),
            )
    known = {entry.name for entry in entries} | {words.ROPE_FACTORS}
    strange = sorted(opened.tensors.keys() - known)
    problems += [f"{name} is in the file and config.json knows no such tensor" for name in strange]
    if problems:
        shown = problems[:MOST_SHOWN]
        if len(problems) > MOST_SHOWN:
            shown.append(f"... and {len(problems) - MOST_SHOWN} more")
        raise input_error(
            f"{found[0]} is not the model that its config.json describes:",
            shown,
            "Put config.json of the very model beside the GGUF file, and fetch the file whole.",
        )
    kinds = sorted({weight.width for weight in weights.values()})
    folder = Folder(path, infos, offsets, (opened.path,))
    virtual = {name: info for name, info in infos.items() if name.removesuffix(f".{BLOCKS}") not in weights}
    virtual |= {name: weight.info for name, weight in weights.items()}
    label = f"{NAME} {' and '.join(kinds or ['not quantized'])}"
    return PackedSource(folder, label, weights, virtual, (ACTIVATIONS,) if weights else ())


def _readable(kind: str) -> bool:
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _metadata_problems(opened: gguf_file.Opened, adapter: Adapter) -> list[str]:
    """Where the file's metadata and config.json contradict each other."""
    architecture = words.ARCHITECTURES[adapter.family]
    problems = []
    for key, value in words.settings(adapter).items():
        stored = opened.metadata.get(f"{architecture}.{key}")
        if key in CHOSEN or stored is None or isinstance(value, list | str):
            continue
        if not isinstance(stored, int | float) or not math.isclose(stored, value, rel_tol=RELATIVE_TOLERANCE):
            problems.append(f"{architecture}.{key} is {stored}, and config.json says {value}")
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
