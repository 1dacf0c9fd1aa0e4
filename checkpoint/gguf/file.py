"""A GGUF file: its exact bytes planned before a weight is read, its writing, and the reading of a header.

    header: magic, version, metadata (key, type, value), one entry per tensor (name, dimensions, type, offset)
    data:   the tensors, each at a multiple of 32 bytes

Types and their sizes come from the gguf package. Its writer and reader are not used: for Llama 4's vocabulary the
writer takes seconds, and the reader, which keeps two arrays per token, takes half a minute and 1 GB. The tests compare
this module with both, byte by byte. Data is written tensor by tensor, and read with plain reads at its offsets, as
safetensors files are (checkpoint/source.py says why there is no memory map). The file stores dimensions innermost
first; here they have torch's order. Big-endian files and files in several parts are refused.

Specification: ggml `docs/gguf.md`; the gguf package's GGML_QUANT_SIZES.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from .. import files

ALIGNMENT = 32
# Values of general.file_type, which loaders print: the type of most weights (llama.cpp's llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2
MAGIC, VERSIONS, MOST_AXES = b"GGUF", (2, 3), 4
# Type of a metadata value -> its format character for `struct`.
SCALARS = {
    int(GGUFValueType[name]): form
    for name, form in {
        "UINT8": "B",
        "INT8": "b",
        "UINT16": "H",
        "INT16": "h",
        "UINT32": "I",
        "INT32": "i",
        "FLOAT32": "f",
        "BOOL": "?",
        "UINT64": "Q",
        "INT64": "q",
        "FLOAT64": "d",
    }.items()
}
KNOWN = {int(kind) for kind in GGMLQuantizationType}
STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    # GGML's name of its type, e.g. 'Q4_0'.
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return prod(self.shape) // values * size


def padded(count: int, to: int = ALIGNMENT) -> int:
    return -(-count // to) * to


def header(architecture: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the data, padded to where the data begins. Lists become arrays; integers become uint32, and
    int32 inside arrays."""
    values = {"general.architecture": architecture, **metadata}
    pieces = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(values))]
    for key, value in values.items():
        pieces += [_text(key), *_value(value)]
    offset = 0
    for tensor in tensors:
        axes = len(tensor.shape)
        numbers = struct.pack(f"<I{axes}QIQ", axes, *reversed(tensor.shape), GGMLQuantizationType[tensor.kind], offset)
        pieces += [_text(tensor.name), numbers]
        offset += padded(tensor.nbytes)
    written = b"".join(pieces)
    return written.ljust(padded(len(written)), b"\0")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> list[bytes]:
    """A metadata value, preceded by its type."""
    if isinstance(value, bool):
        return [struct.pack("<I?", GGUFValueType.BOOL, value)]
    if isinstance(value, int):
        return [struct.pack("<II", GGUFValueType.UINT32, value)]
    if isinstance(value, float):
        return [struct.pack("<If", GGUFValueType.FLOAT32, value)]
    if isinstance(value, str):
        return [struct.pack("<I", STRING), _text(value)]
    assert value, "an empty array has no type"
    if isinstance(value[0], str):
        return [struct.pack("<IIQ", ARRAY, STRING, len(value)), *map(_text, value)]
    return [struct.pack(f"<IIQ{len(value)}i", ARRAY, GGUFValueType.INT32, len(value), *value)]


def file_bytes(head: bytes, tensors: Iterable[GgufTensor]) -> int:
    """The size of the whole file."""
    return len(head) + sum(padded(tensor.nbytes) for tensor in tensors)


def write(path: Path, head: bytes, tensors: Iterable[tuple[GgufTensor, Iterable[torch.Tensor]]]) -> None:
    """Write a file, completely or not at all. Each tensor comes in pieces along its first axis, one in memory at a
    time."""

    def pieces() -> Iterable[bytes]:
        yield head
        for tensor, parts in tensors:
            count = 0
            for part in parts:
                data = part.contiguous().view(torch.uint8).numpy().tobytes()
                count += len(data)
                yield data
            assert count == tensor.nbytes, (tensor, count)
            yield bytes(padded(count) - count)

    files.write_pieces(path, pieces())


@dataclass(frozen=True)
class Opened:
    """An opened file."""

    path: Path
    # Scalars and strings; arrays are skipped.
    metadata: dict[str, Any]
    # Each with the offset of its first byte.
    tensors: dict[str, tuple[GgufTensor, int]]


def open_file(path: Path) -> Opened:
    """Read a header and check that the file is long enough for its tensors. Raises ValueError with one line that
    continues the file's name."""
    size = path.stat().st_size
    with path.open("rb", buffering=2**20) as file:
        read = _Reader(file, size)
        if read.bytes(4) != MAGIC:
            raise ValueError("is no GGUF file")
        version, tensor_count, value_count = read.numbers("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"has GGUF version {version} (or is big-endian): {', '.join(map(str, VERSIONS))} are read")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = read.string()
            value = read.value(read.number("I"))
            if value is not None:
                metadata[key] = value
        entries = [_entry(read) for _ in range(tensor_count)]
        begin = padded(file.tell(), _alignment(metadata))
    if metadata.get("split.count", 1) > 1:
        raise ValueError("is one part of several: join them with llama.cpp's llama-gguf-split --merge")
    tensors = {}
    for tensor, offset in entries:
        if begin + offset + tensor.nbytes > size:
            raise ValueError(f"is cut off: {tensor.name} ends at byte {begin + offset + tensor.nbytes:,} of {size:,}")
        if tensor.name in tensors:
            raise ValueError(f"holds {tensor.name} twice")
        tensors[tensor.name] = (tensor, begin + offset)
    return Opened(path, metadata, tensors)


def _alignment(metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or found < 1 or found & (found - 1):
        raise ValueError(f"has the alignment {found}, which is no power of two")
    return found


def _entry(read: "_Reader") -> tuple[GgufTensor, int]:
    """One tensor of the header, and its offset in the data."""
    name = read.string()
    axes = read.number("I")
    if axes > MOST_AXES:
        raise ValueError(f"has a damaged header ({name} has {axes} axes)")
    shape = read.numbers(f"{axes}Q")[::-1]
    kind, offset = read.numbers("IQ")
    if kind not in KNOWN:
        raise ValueError(f"holds {name} in the type {kind}, which the gguf package does not know")
    tensor = GgufTensor(name, GGMLQuantizationType(kind).name, shape)
    if shape and shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0]:
        raise ValueError(f"has a damaged header ({name} has rows of {shape[-1]} in {tensor.kind})")
    return tensor, offset


class _Reader:
    """A cursor over a header that never reads past the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def bytes(self, count: int) -> bytes:
        if count > self.size:
            raise ValueError("has a damaged header, or is cut off")
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("is cut off in its header")
        return data

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def string(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("has a damaged header (a name that is no text)") from None

    def value(self, kind: int) -> Any:
        """A scalar or a string. An array is skipped and gives None."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"has a damaged header (a value of the type {kind})")
        of, count = self.numbers("IQ")
        if of in SCALARS:
            self.bytes(struct.calcsize(f"<{SCALARS[of]}") * count)
        elif of == STRING:
            for _ in range(count):
                self.bytes(self.number("Q"))
        else:
            raise ValueError(f"has a damaged header (an array of the type {of})")
        return None
