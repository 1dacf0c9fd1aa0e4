"""A GGUF file: what will be written, to the byte, before a weight is read; and what one holds, from its header.

    header: magic, version, metadata (key, type, value), one entry a tensor (name, dimensions, type, offset)
    data:   the tensors, each at a multiple of 32 bytes

The header is made and read by the gguf package. Data is written tensor by tensor and read with plain reads at its
offsets, as safetensors files are (checkpoint/source.py says why no memory map). Dimensions lie in the file
innermost first; here they are as torch has them. Big-endian files and files in several parts are refused.

Specification: ggml `docs/gguf.md`; the gguf package's GGUFWriter, GGUFReader and GGML_QUANT_SIZES.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter

from .. import files

ALIGNMENT = 32
# general.file_type, which loaders print: the type of most of the weights (llama.cpp's llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. `kind`: GGML's name of its type."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return prod(self.shape) // values * size


def padded(count: int, to: int = ALIGNMENT) -> int:
    return -(-count // to) * to


def header(architecture: str, metadata: Mapping[str, Any], tensors: Iterable[GgufTensor]) -> bytes:
    """All that comes before the data, filled up to where that begins. Lists are arrays, whole numbers uint32."""
    writer = GGUFWriter(None, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        # The dtype is not looked at where the kind is given, but for bytes, whose shape would be another.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    with tempfile.TemporaryDirectory(prefix="onecard-gguf-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        written = path.read_bytes()
    return written.ljust(padded(len(written)), b"\0")


def file_bytes(head: bytes, tensors: Iterable[GgufTensor]) -> int:
    """The size of the whole file."""
    return len(head) + sum(padded(tensor.nbytes) for tensor in tensors)


def write(path: Path, head: bytes, tensors: Iterable[tuple[GgufTensor, Iterable[torch.Tensor]]]) -> None:
    """A file, whole or not at all; each tensor comes in pieces along its first axis, one in memory at a time."""

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
    """What a file holds. `tensors`: each with the place of its first byte. `metadata`: values but arrays."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[GgufTensor, int]]


def open_file(path: Path) -> Opened:
    """Read a header; the file must be as long as it says. Raises ValueError with a line that says what is wrong."""
    try:
        reader = GGUFReader(path)
        tensors = {}
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
            entry = GgufTensor(tensor.name, tensor.tensor_type.name, shape)
            tensors[tensor.name] = (entry, int(tensor.data_offset))
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if len(field.types) == 1 and key[:5] != "GGUF."
        }
        little = reader.endianess is GGUFEndian.LITTLE
    except Exception as error:  # the package raises many kinds for a damaged file
        raise ValueError(f"is no GGUF file that the gguf package reads, or is cut off ({error})") from None
    if not little:
        raise ValueError("is a big-endian GGUF file, which onecard does not read")
    if metadata.get("split.count", 1) != 1:
        raise ValueError("is one part of several: join them with llama.cpp's llama-gguf-split --merge")
    size = path.stat().st_size
    for tensor, offset in tensors.values():
        if offset + tensor.nbytes > size:
            raise ValueError(f"is cut off: {tensor.name} ends at byte {offset + tensor.nbytes:,} of {size:,}")
    return Opened(path, metadata, tensors)
