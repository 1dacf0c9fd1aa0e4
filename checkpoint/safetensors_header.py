"""Safetensors headers: names, shapes, dtypes and offsets, with every contradiction refused before a tensor is read.

The header tells how long the file must be, so a truncated file is found here. Files on disk and files on the hub
(checkpoint/remote.py) go through the same checks. Whatever the safetensors library refuses is refused here too, since
no engine could open it. So is a name that occurs twice, which the specification forbids and readers take differently.
"""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from ..core.tensors import TORCH_DTYPES, TensorInfo

# The safetensors library refuses longer headers, too.
MAX_HEADER_BYTES = 100_000_000
# A file begins with the length of its header, a 64-bit integer.
LENGTH_BYTES = 8
# No axis and no tensor of a sound file has as many values. The library counts the bits of a tensor in 64 bits.
MAX_VALUES = 2**57
ENTRY = {"dtype", "shape", "data_offsets"}
# What the library knows besides TORCH_DTYPES.
UNREAD_DTYPES = (
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("U16", "U32", "U64", "C64"),
)
METADATA_KEY = "__metadata__"


class UnreadDtypeError(ValueError):
    """The header is sound, and holds a tensor in a dtype that onecard does not read."""


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
    header = _strict_json(text)
    if not isinstance(header, dict) or not _is_words(header.pop(METADATA_KEY, {})):
        raise ValueError(
            f"has a damaged header ({METADATA_KEY})" if isinstance(header, dict) else "has a damaged header"
        )
    data = LENGTH_BYTES + len(text)
    infos: Header = {}
    spans = []
    for name, entry in header.items():
        info, begin, stop = _entry(name, entry)
        infos[name] = (info, data + begin)
        spans.append((begin, stop, name))
    end = 0
    for begin, stop, name in sorted(spans):
        # The specification forbids holes and shared bytes.
        if begin != end:
            raise ValueError(f"has a damaged header ({name} does not begin where the tensor before it ends)")
        end = stop
    if size != data + end:
        raise ValueError(f"is truncated or damaged: {size:,} bytes, and its header promises {data + end:,}")
    return infos


def _entry(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """(shape and dtype, first byte, end) of one tensor's entry. Raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise ValueError(f"has a damaged header (the entry of {name})")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in UNREAD_DTYPES:
        raise UnreadDtypeError(f"holds {name} in the dtype {dtype}")
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise ValueError(f"has a damaged header ({name} is of no dtype of safetensors: {dtype})")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or any(type(n) is not int or n >= MAX_VALUES for n in (*shape, *offsets)):
        raise ValueError(f"has a damaged header (the numbers of {name})")
    info = TensorInfo(tuple(shape), dtype)
    # The library multiplies the axes one by one, so an empty axis does not excuse the others.
    if prod(n or 1 for n in shape) >= MAX_VALUES or offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(f"has a damaged header (the size of {name})")
    return info, offsets[0], offsets[1]


def _strict_json(text: bytes) -> Any:
    """`text` as the JSON of the specification: UTF-8 without a byte order mark, no key twice in one object, natural
    numbers only. Raises ValueError. Python's own reader takes more than that: UTF-16, NaN, half of a surrogate pair."""
    try:
        words = text.decode("utf-8")
        return json.loads(
            words, object_pairs_hook=_once, parse_int=_natural, parse_float=_no_number, parse_constant=_no_number
        )
    except UnicodeError:
        raise ValueError("has a damaged header (it is not UTF-8)") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("has a damaged header") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        (key + value if isinstance(value, str) else key).encode()  # fails for half of a surrogate pair
        if key in found:
            raise ValueError(f"has a damaged header ({key} occurs twice)")
        found[key] = value
    return found


def _natural(digits: str) -> int:
    if not digits.isdigit() or len(digits) > 20:
        _no_number(digits)
    return int(digits)


def _no_number(digits: str) -> NoReturn:
    raise ValueError(f"has a damaged header (the number {digits[:20]})")


def _is_words(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
