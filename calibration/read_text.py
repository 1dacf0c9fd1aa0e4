"""The text of a file, plain or packed by gzip or zstd. Nothing that is read is ever executed."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.units import size

PACKED = (".gz", ".zst")
# A packed file may unpack to this many times its own bytes, or to the bytes below if that is more. Texts pack to a
# tenth; a file that is made to fill the memory packs to a thousandth.
MOST_EXPANSION = 200
ALWAYS_ALLOWED_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20


def text_suffix(path: Path) -> str:
    """The suffix that says what a file holds: of `x.jsonl.gz` it is .jsonl."""
    return _inner(path).suffix.lower()


def text_stem(path: Path) -> str:
    """The name without the suffixes: of `x.jsonl.gz` it is x."""
    return _inner(path).stem


def _inner(path: Path) -> Path:
    return Path(path.stem) if path.suffix.lower() in PACKED else path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError."""
    try:
        packed = path.suffix.lower() in PACKED
        text = (_unpacked(path) if packed else path.read_bytes()).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"the texts {path} do not exist") from None
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.strerror is None:
            raise _damaged(path, error) from None
        raise InputError(f"the texts {path} cannot be read ({error.strerror}): name a JSONL file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the texts {path} are not UTF-8 ({error}): convert them") from None
    if "\0" in text:
        raise InputError(f"the texts {path} hold NUL characters: this is not a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _damaged(path: Path, error: Exception) -> InputError:
    first = str(error).partition("\n")[0]
    return InputError(f"the texts {path} cannot be unpacked ({first}): fetch them again")


def _unpacked(path: Path) -> bytes:
    most = max(ALWAYS_ALLOWED_BYTES, MOST_EXPANSION * path.stat().st_size)
    out = bytearray()
    for chunk in _chunks(path):
        out += chunk
        if len(out) > most:
            raise InputError(
                f"the texts {path} unpack to more than {size(most)}, over {MOST_EXPANSION} times their size, as a file "
                "does that is made to fill the memory: if you trust it, unpack it yourself and name the result"
            )
    return bytes(out)


def _chunks(path: Path) -> Iterator[bytes]:
    from pyarrow import input_stream

    with ExitStack() as stack:
        file: Any
        if path.suffix.lower() == ".gz":
            file = stack.enter_context(gzip.open(path))
        else:
            file = stack.enter_context(input_stream(str(path), compression="zstd"))
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
