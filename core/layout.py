"""The exact size of a checkpoint's files, known before a weight is read; and which tensors share a shard.

A safetensors file is 8 bytes of header length, a JSON header padded with spaces to a multiple of 8, and the data. The
header's length depends on the order in which the library lays tensors out (falling dtype rank, then name). That order
is repeated here, and a test compares the sizes with files that the library wrote.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from .json_text import json_text
from .tensors import TORCH_DTYPES

# The safetensors library's order of dtypes (its Dtype enumeration).
_RANK = {
    name: rank
    for rank, name in enumerate(
        [
            "BOOL",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "F64",
            "I64",
            "U64",
        ]
    )
}
METADATA = {"format": "pt"}
# Suffix of a file's name until the file is complete.
TEMPORARY = ".partial"
# The model card. A card that onecard drew ends in this mark and the first digits of its record's SHA-256.
CARD_NAME = "README.md"
CARD_MARK = "<!-- drawn by onecard from the record "
# Upper bound for a tensor's header entry (dtype, shape, two offsets), without its name.
HEADER_ENTRY_BYTES = 160


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class ShardPlan(Protocol):
    """One file to write: the Shard of checkpoint/plan.py."""

    @property
    def file(self) -> str: ...

    @property
    def tensors(self) -> tuple[StoredTensor, ...]: ...


def index_json(shards: Iterable[ShardPlan]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def json_bytes(value: Any) -> bytes:
    """How every JSON file of a checkpoint is written.

    Half of a surrogate pair, which may come with a file's name, has no UTF-8: JSON spells it with a backslash, and
    reads it back.
    """
    return (json_text(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def in_file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The order in which the safetensors library lays tensors out."""
    return sorted(tensors, key=lambda t: (-_RANK[t.dtype], t.name))


def file_header(tensors: Iterable[StoredTensor]) -> bytes:
    """The first bytes of the safetensors file that holds `tensors`, up to the data: the header and its length."""
    header: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for tensor in in_file_order(tensors):
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json_text(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Exact size of the safetensors file that holds `tensors`."""
    tensors = list(tensors)
    return len(file_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


def split_shards(parts: list[list[list[StoredTensor]]], max_bytes: int) -> list[tuple[int, list[StoredTensor]]]:
    """Fill shards in order; returns (part, tensors) for each shard.

    `parts[i]` holds the atoms of one part of the model (a block, or the tensors outside the blocks): lists of tensors
    that stay together. A shard never crosses into another part, so it is finished when its part is. An atom over
    `max_bytes` gets a shard to itself.
    """
    shards: list[tuple[int, list[StoredTensor]]] = []
    for part, atoms in enumerate(parts):
        shard: list[StoredTensor] = []
        size = 0
        for atom in atoms:
            atom_bytes = sum(t.nbytes + len(t.name.encode()) + HEADER_ENTRY_BYTES for t in atom)
            # The exact size is expensive: compute it only where the cheap upper bound would close the shard.
            full = shard and size + atom_bytes + HEADER_ENTRY_BYTES > max_bytes
            if full and file_bytes(shard + atom) > max_bytes:
                shards.append((part, shard))
                shard, size = [], 0
            shard.extend(atom)
            size += atom_bytes
        if shard:
            shards.append((part, shard))
    return shards


def shard_name(index: int, total: int) -> str:
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
