"""Safetensors headers: names, shapes, dtypes and offsets, with every contradiction refused before a tensor is read.

The header tells how long the file must be, so a truncated file is found here. Files on disk and files on the hub
(checkpoint/remote.py) go through the same checks.
"""

import json
import struct
from pathlib import Path

from ..core.tensors import TORCH_DTYPES, TensorInfo

# The safetensors library refuses longer headers, too.
MAX_HEADER_BYTES = 100_000_000


# A file begins with the length of its header, a 64-bit integer.
LENGTH_BYTES = 8


# The tensors of one file, each with the offset of its first byte in the file.
Header = dict[str, tuple[TensorInfo, int]]


def read_header(path: Path) -> Header:
    """Read the header of a file and check that the file has the promised length.

    Raises ValueError with one line that continues the file's name, e.g. 'has a damaged header'.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return parse_header(file.read(header_bytes(file.read(LENGTH_BYTES), size)), size)


def header_bytes(first: bytes, size: int) -> int:
    """The header's length, from the file's first LENGTH_BYTES bytes and its `size`. Raises ValueError."""
    length = struct.unpack("<Q", first)[0] if len(first) == LENGTH_BYTES else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise ValueError("is no safetensors file, or its header is cut off")
    return int(length)


def parse_header(text: bytes, size: int) -> Header:
    """Parse the header `text` of a file of `size` bytes. Raises ValueError."""
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("has a damaged header") from None
    data = LENGTH_BYTES + len(text)
    infos: Header = {}
    spans = []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                if not all(isinstance(value, str) for value in entry.values()):
                    raise ValueError("has a damaged header (__metadata__)")
                continue
            if entry["dtype"] not in TORCH_DTYPES:
                raise ValueError(f"holds {name} in the dtype {entry['dtype']}, which onecard does not read")
            begin, stop = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*entry["shape"], begin, stop)):
                raise ValueError(f"has a damaged header (the numbers of {name})")
            info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            if stop - begin != info.nbytes:
                raise ValueError(f"has a damaged header (the size of {name})")
            infos[name] = (info, data + begin)
            spans.append((begin, stop, name))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("has a damaged header") from None
    end = 0
    for begin, stop, name in sorted(spans):
        # The specification forbids holes and shared bytes.
        if begin != end:
            raise ValueError(f"has a damaged header ({name} does not begin where the tensor before it ends)")
        end = stop
    if size != data + end:
        raise ValueError(f"is truncated or damaged: {size:,} bytes, and its header promises {data + end:,}")
    return infos
