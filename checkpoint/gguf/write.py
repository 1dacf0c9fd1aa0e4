"""A checkpoint as one GGUF file: what cannot be written, the file's exact size, and the writing.

Codes do not change (gguf/blocks.py): symmetric int4 becomes Q4_0, asymmetric int4 Q4_1, symmetric int8 Q8_0. Norms and
routers become F32, and all other tensors keep their dtype. An unquantized checkpoint gives an unquantized file.
`floats` instead writes every weight, quantized ones too, in one float type: F32 holds the dequantized weights exactly,
for comparing engines. The experts of a layer become one tensor, so they must share one scheme.

Memory: one expert's weight, and the header, whose tokens take 10 MB for a vocabulary of 200,000.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InputError, input_error
from ...core.rows import Step
from ...core.tensors import TORCH_DTYPES
from ...models import gguf as words
from ...models.adapter import Adapter, read
from ..formats.stored_weight import FLOATS
from ..packed import PackedSource
from ..source import Folder
from . import blocks as gguf_blocks
from . import file as gguf_file
from .file import GgufTensor
from .tokenizer import TokenizerMetadata, describe

FILE_NAME = "model.gguf"
MOST_NAMED = 8


@dataclass(frozen=True)
class GgufPlan:
    """The file that will be written."""

    # The header's bytes.
    head: bytes
    tensors: tuple[GgufTensor, ...]
    # What each tensor is made of; None for the rotary factors.
    entries: tuple[words.TensorLayout | None, ...]
    # What a user of the file should know.
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return gguf_file.file_bytes(self.head, self.tensors)


@dataclass(frozen=True)
class _Parts:
    """The content of a file, and every reason why it cannot be written."""

    tensors: list[GgufTensor]
    entries: list[words.TensorLayout | None]
    tokenizer: TokenizerMetadata
    problems: list[str]


def _parts(adapter: Adapter, source: Folder | PackedSource, folder: Path, floats: str | None) -> _Parts:
    problems = words.refusals(adapter)
    entries: list[words.TensorLayout | None] = []
    tensors = []
    for entry in words.layout(adapter) if not problems else []:
        try:
            tensors.append(GgufTensor(entry.name, _kind(adapter, source, entry, floats), entry.shape))
            entries.append(entry)
        except ValueError as error:
            problems.append(f"{entry.name}: {error}")
    factors = words.rope_factors(adapter)
    if factors is not None:
        tensors.append(GgufTensor(words.ROPE_FACTORS, "F32", tuple(factors.shape)))
        entries.append(None)
    tokenizer = describe(folder, adapter.vocab_size, stops_at(adapter.config) + stops_at(adapter.text_config))
    return _Parts(tensors, entries, tokenizer, problems + tokenizer.problems)


def problems_of(adapter: Adapter, source: Folder | PackedSource, folder: Path) -> list[str]:
    """Every reason why this checkpoint cannot be a GGUF file, one line each. `folder` has its tokenizer."""
    return _parts(adapter, source, folder, None).problems


def plan(
    adapter: Adapter, source: Folder | PackedSource, folder: Path, name: str, floats: str | None = None
) -> GgufPlan:
    """Plan the file without reading a weight. `folder` has the tokenizer; `name` is the model's display name.

    Raises InputError with every reason why the file cannot be written.
    """
    assert floats is None or floats in FLOATS
    parts = _parts(adapter, source, folder, floats)
    if parts.problems:
        headline = f"{name} cannot be written as GGUF:"
        raise input_error(headline, parts.problems, "Fix that, or choose another format.", MOST_NAMED)
    architecture = words.ARCHITECTURES[adapter.family]
    by_kind: dict[str, int] = {}
    for tensor in parts.tensors:
        by_kind[tensor.kind] = by_kind.get(tensor.kind, 0) + tensor.nbytes
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": gguf_file.FILE_TYPES[max(by_kind, key=lambda kind: by_kind[kind])],
        "general.quantization_version": gguf_file.QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in words.settings(adapter).items()},
        **{f"tokenizer.{key}": value for key, value in parts.tokenizer.metadata.items()},
    }
    head = gguf_file.header(architecture, metadata, parts.tensors)
    warnings = (*words.warnings(adapter), *parts.tokenizer.warnings)
    return GgufPlan(head, tuple(parts.tensors), tuple(parts.entries), warnings)


def stops_at(config: Any) -> list[int]:
    value = getattr(config, "eos_token_id", None)
    return [value] if isinstance(value, int) else list(value or [])


def _kind(adapter: Adapter, source: Folder | PackedSource, entry: words.TensorLayout, floats: str | None) -> str:
    """The type of one tensor. Raises ValueError when its parts do not share one."""
    stored = source.weights if isinstance(source, PackedSource) else {}
    located = [adapter.locate(part, source.names).tensor for part in entry.parts]
    dtypes = {source.info(tensor).dtype for tensor in located if tensor not in stored}
    widths = {stored[tensor].width for tensor in located if tensor in stored}
    if entry.full:
        return "F32"
    if floats is not None:
        return floats
    if len(dtypes) + len(widths) > 1:
        raise ValueError(
            f"its experts are stored as {', '.join(sorted(dtypes | widths))}, and one tensor holds them all"
        )
    if dtypes:
        return dtypes.pop()
    scheme = stored[located[0]].scheme
    if scheme is None:
        raise ValueError(f"it is stored as {widths.pop()}, which has no integer codes that onecard reads")
    return gguf_blocks.kind_of(scheme, entry.shape[-1])


def write(
    planned: GgufPlan, adapter: Adapter, source: Folder | PackedSource, file: Path, step: Step | None = None
) -> None:
    """Write `file`, completely or not at all. Raises InputError for values that cannot be stored."""

    if step is not None:
        step.begin(f"write {file.name}")

    def pieces(tensor: GgufTensor, entry: words.TensorLayout | None) -> Iterator[torch.Tensor]:
        if entry is None:
            factors = words.rope_factors(adapter)
            assert factors is not None
            yield factors
            return
        for part in entry.parts:
            try:
                if tensor.kind in FLOATS:
                    yield _floats(adapter, source, part, tensor.kind)
                    continue
                assert isinstance(source, PackedSource)
                weight = source.quantized(adapter.locate(part, source.names).tensor)
                assert weight is not None, part
                yield gguf_blocks.pack(weight)
            except ValueError as error:
                raise InputError(
                    f"{part} {error}: export it to another format (compressed-tensors holds all scales)"
                ) from None

    gguf_file.write(
        file, planned.head, ((t, pieces(t, e)) for t, e in zip(planned.tensors, planned.entries, strict=True))
    )
    assert file.stat().st_size == planned.nbytes


def _floats(adapter: Adapter, source: Folder | PackedSource, part: str, kind: str) -> torch.Tensor:
    """The dense weight, rounded once: a weight that is stored in parts is first computed in fp32."""
    where = adapter.locate(part, source.names)
    if isinstance(source, PackedSource) and where.tensor in source.weights:
        value = source.dense(where.tensor, torch.float32, where.index)
        value = value.T if where.transposed else value
    else:
        value = read(adapter, source, part)
    out = value.to(TORCH_DTYPES[kind])
    if kind == "F16" and not bool(torch.isfinite(out).all()):
        raise ValueError("holds values past 65504, which F16 cannot hold")
    return out
