"""Reading safetensors folders: headers once, tensors and slices on demand, and every refusal before the first read.

What is refused (one message with every offender): a missing or truncated shard, an index that names a file outside the
folder, tensors the index promises and no shard holds, shapes that contradict config.json, pickle files. A hub
snapshot's links lead to the blobs of the same repository; any other link that leaves the folder is refused.

Tensors are read with plain reads at their offsets, not through the safetensors library's memory map: mapped pages
count as the process's memory (4.7 GB for one 4.4 GB shard, where plain reads need 0.5 GB), and a file that shrinks
under a map kills the process. A truncated file is found from its header, before the first read.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..core.errors import InputError, ResourceError, input_error
from ..core.tensors import TORCH_DTYPES, Index, TensorInfo, TensorSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A safetensors header may be 100 MB long; the library refuses longer ones too.
MAX_HEADER_BYTES = 100_000_000
# The digest of a source reads so many bytes at every stride of each tensor: 55 MB of Scout's 217 GB.
SAMPLE_BYTES, SAMPLE_STRIDE = 4096, 2**24
# A safetensors file begins with its header's length.
LENGTH_BYTES = 8
# Of one file: each tensor with its first byte in the file.
Header = dict[str, tuple[TensorInfo, int]]


@dataclass(frozen=True)
class Folder:
    """A safetensors folder. `offsets`: each tensor's shard and first byte there. Implements TensorSource."""

    path: Path
    infos: dict[str, TensorInfo]
    offsets: dict[str, tuple[Path, int]]
    shards: tuple[Path, ...]

    @property
    def names(self) -> Collection[str]:
        return self.infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        """A fresh CPU tensor; of its first axis only what `index` selects is read. Raises ResourceError."""
        info = self.infos[name]
        file, begin = self.offsets[name]
        shape = info.shape
        first = index[0] if index else slice(None)
        row = info.nbytes // shape[0] if shape and shape[0] else info.nbytes
        rows = range(shape[0])[first] if shape and isinstance(first, slice) else range(1)
        if isinstance(first, int):
            rows = range(first, first + 1)
        buffer = torch.empty(len(rows) * row, dtype=torch.uint8)
        if len(buffer):
            _read_into(file, begin + rows.start * row, buffer)
        part = (
            buffer.view(TORCH_DTYPES[info.dtype]).view(len(rows), *shape[1:])
            if shape
            else buffer.view(TORCH_DTYPES[info.dtype]).view(())
        )
        part = part[0] if isinstance(first, int) else part
        if len(index) > 1:
            part = part[index[1:] if isinstance(first, int) else (slice(None), *index[1:])].contiguous()
        return part

    @property
    def file_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config.json, the index, each shard's name, size and header, and samples of every tensor's bytes:
        a run's source. Two models of one shape differ in their samples, and 217 GB need not be read to tell them apart.
        Read when it is first asked for: a plan needs headers alone."""
        sha = hashlib.sha256()
        for name in ("config.json", INDEX_NAME):
            if (self.path / name).exists():
                sha.update(name.encode() + (self.path / name).read_bytes())
        for shard in self.shards:
            with shard.open("rb") as file:
                names = sorted(name for name in self.infos if self.offsets[name][0] == shard)
                # The header is all that lies before the first tensor.
                header = min((self.offsets[name][1] for name in names), default=shard.stat().st_size)
                sha.update(f"{shard.name}:{shard.stat().st_size}".encode() + file.read(header))
                for name in names:
                    begin, size = self.offsets[name][1], self.infos[name].nbytes
                    for offset in range(begin, begin + size, SAMPLE_STRIDE):
                        file.seek(offset)
                        sha.update(file.read(min(SAMPLE_BYTES, begin + size - offset)))
        return sha.hexdigest()


def _read_into(file: Path, offset: int, buffer: torch.Tensor) -> None:
    """Fill a uint8 tensor from a file."""
    try:
        with file.open("rb", buffering=0) as handle:
            handle.seek(offset)
            view = buffer.numpy().data
            while len(view):
                count = handle.readinto(view)
                if not count:
                    raise OSError("the file ended early: something changed it during the run")
                view = view[count:]
    except OSError as error:
        raise ResourceError(f"{file} could not be read ({error}); what is finished is kept") from error


def read_header(path: Path) -> Header:
    """Each tensor of one safetensors file with its offset, from the header alone; the file must be as long as it says.

    Raises ValueError with one line that says what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return parse_header(file.read(header_bytes(file.read(LENGTH_BYTES), size)), size)


def header_bytes(first: bytes, size: int) -> int:
    """How long the header of a file of `size` bytes is, by its first LENGTH_BYTES. Raises ValueError."""
    length = struct.unpack("<Q", first)[0] if len(first) == LENGTH_BYTES else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise ValueError("is no safetensors file, or its header is cut off")
    return int(length)


def parse_header(text: bytes, size: int) -> Header:
    """What the header `text` of a file of `size` bytes says. Raises ValueError."""
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
        # The specification allows neither holes nor tensors that share bytes.
        if begin != end:
            raise ValueError(f"has a damaged header ({name} does not begin where the tensor before it ends)")
        end = stop
    if size != data + end:
        raise ValueError(f"is truncated or damaged: {size:,} bytes, and its header promises {data + end:,}")
    return infos


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system can hold
        return False


def allowed_root(folder: Path) -> Path:
    """Where links may lead: the folder, or for a hub snapshot the cache of its repository."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent
    return resolved


def holds_safetensors(path: Path) -> bool:
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def open_folder(path: Path) -> Folder:
    """Open a checkpoint folder, single file or sharded. Raises InputError listing every problem found."""
    if path.is_file():
        raise InputError(f"{path} is a file: name the folder that holds it and its config.json")
    if not path.is_dir():
        raise InputError(f"{path} is no folder: name a local checkpoint, a hub id or `demo`")
    root = allowed_root(path)
    shard_names, weight_map = shards_of(path, {p.name for p in path.iterdir() if p.exists()}, str(path))
    problems: list[str] = []
    headers: dict[str, Header] = {}
    for name in shard_names:
        shard = path / name
        if leaves_folder(name):
            problems.append(f"{INDEX_NAME} names {name!r}, which is not a file name inside the folder")
            continue
        if not _is_file(shard):
            problems.append(f"the shard {name} is missing")
            continue
        if not shard.resolve().is_relative_to(root):
            problems.append(f"{name} is a link that leaves the folder (to {shard.resolve()})")
            continue
        try:
            headers[name] = read_header(shard)
        except ValueError as error:
            problems.append(f"{name} {error}")
    return Folder(path, *join_headers(path, headers, weight_map, problems))


def shards_of(path: Path, present: Collection[str], said: str) -> tuple[list[str], dict[str, str] | None]:
    """The names of a checkpoint's shards, and its index where it has one, which lies in `path`; `present` are the names
    of all files of what messages call `said`. Raises InputError."""
    if INDEX_NAME not in present:
        if SINGLE_NAME not in present:
            _refuse_without_safetensors(said, present)
        return [SINGLE_NAME], None
    try:
        weight_map: dict[str, str] = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        shard_names = sorted(set(weight_map.values()))
        assert all(isinstance(n, str) for n in shard_names)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{path / INDEX_NAME} is damaged: fetch it again") from None
    if SINGLE_NAME in present and SINGLE_NAME not in shard_names:
        raise InputError(
            f"{said} holds two sets of weights, {SINGLE_NAME} and the shards of {INDEX_NAME}, and loaders "
            "differ in which they take: remove one of them"
        )
    return shard_names, weight_map


def leaves_folder(name: str) -> bool:
    """Whether an index's name of a shard is no name of a file beside it."""
    return bool(re.search(r"[/\\]", name)) or name in ("", ".", "..")


def join_headers(
    path: Path, headers: dict[str, Header], weight_map: dict[str, str] | None, problems: list[str]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[Path, int]], tuple[Path, ...]]:
    """infos, offsets and shards of a Folder. Raises InputError with `problems` and those of the files together."""
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[Path, int]] = {}
    for name, found in headers.items():
        problems += [f"{t} is in {offsets[t][0].name} and in {name}" for t in sorted(infos.keys() & found.keys())]
        for tensor, (info, offset) in found.items():
            infos[tensor], offsets[tensor] = info, (path / name, offset)
    if weight_map is not None and not problems:
        problems += [f"{name} is in the index and in no shard" for name in sorted(weight_map.keys() - infos.keys())]
    if problems:
        raise _unreadable(path, problems)
    return infos, offsets, tuple(path / name for name in headers)


def _unreadable(path: Path, problems: list[str]) -> InputError:
    return input_error(f"{path} cannot be read:", problems, "Fetch the named files again, whole, into that folder.")


def _refuse_without_safetensors(said: str, present: Collection[str]) -> None:
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    if pickles:
        raise input_error(
            f"{said} holds pickle files, which can run code and are never unpickled:",
            pickles,
            "Use the safetensors version of the checkpoint, or convert it on a machine that may run it.",
        )
    stray = [name for name in present if name.endswith(".safetensors")]
    if stray:
        raise InputError(
            f"{said} has {len(stray)} safetensors files but neither {SINGLE_NAME} nor {INDEX_NAME}: fetch the index"
        )
    raise InputError(f"{said} holds no safetensors checkpoint ({SINGLE_NAME} or {INDEX_NAME})")


def check_shapes(
    path: Path, source: TensorSource, expected: dict[str, tuple[int, ...]], left_aside: Callable[[str], bool]
) -> None:
    """Every promised tensor is there, in the promised shape, in a dtype that is a weight, and nothing else but what may
    be left aside. Raises InputError."""
    problems = [f"{name} is missing" for name in expected if name not in source.names]
    for name in expected.keys() & source.names:
        info, shape = source.info(name), expected[name]
        if info.shape != shape:
            problems.append(f"{name} is {list(info.shape)}, and config.json says {list(shape)}")
        if info.dtype not in ("BF16", "F16", "F32"):
            problems.append(f"{name} is stored as {info.dtype}: onecard reads BF16, F16 and F32 weights")
    unknown = [name for name in source.names if name not in expected and not left_aside(name)]
    problems.sort()
    problems += [f"{name} is in the checkpoint and config.json knows no such tensor" for name in unknown]
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise input_error(
            f"{path} contradicts its config.json:",
            shown,
            "Fetch the original checkpoint, config.json and all weights of one revision, in bf16, fp16 or fp32.",
        )


def refuse_nonfinite(folder: Folder, name: str) -> None:
    """Read every weight once: NaN or Inf would pass silently through all that follows. Raises InputError."""
    found = {tensor: nonfinite(folder, tensor) for tensor in folder.names}
    problems = [f"{tensor} holds {what}" for tensor, what in found.items() if what]
    if problems:
        raise input_error(
            f"{name} holds values that are no numbers:", problems, "The checkpoint is damaged: fetch it again."
        )


def pieces(folder: Folder, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """(first index, slice of the first axis) after slice, so that memory stays small; a scalar comes as one of [1]."""
    shape = folder.infos[name].shape
    if not shape:
        yield 0, folder.get(name)[None]
        return
    # 64 Mi values at a time: 128 MB in bf16.
    rows = max(1, 2**26 // max(1, int(torch.Size(shape[1:]).numel())))
    for start in range(0, shape[0], rows):
        yield start, folder.get(name, (slice(start, start + rows),))


def nonfinite(folder: Folder, name: str) -> str | None:
    """'3 NaN, 1 Inf' when the tensor holds such values."""
    if not TORCH_DTYPES[folder.infos[name].dtype].is_floating_point:
        return None
    nan = inf = 0
    for _, part in pieces(folder, name):
        # One cheap pass decides: a sum of finite bf16 values in fp64 is finite.
        if not torch.isfinite(part.sum(dtype=torch.float64)):
            nan += int(torch.isnan(part).sum())
            inf += int(torch.isinf(part).sum())
    return f"{nan} NaN, {inf} Inf" if nan or inf else None
