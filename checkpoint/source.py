"""Folder: a safetensors checkpoint on disk. Headers are read once, tensors and slices on demand.

Opening a folder refuses, in one message that lists every offender: missing or truncated shards, an index that names a
file outside the folder, tensors that the index promises and no shard holds, and pickle files. The links of a hub
snapshot lead to blobs of the same repository; any other link that leaves the folder is refused.

Tensors are read with plain reads at their offsets. The safetensors library's memory map is not used: mapped pages
count as the process's memory (4.7 GB for one 4.4 GB shard, where plain reads need 0.5 GB), and a file that shrinks
under a map kills the process.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..core.errors import InputError, ResourceError, UnreadError, input_error, several
from ..core.tensors import CPU, TORCH_DTYPES, Allocate, Index, Stored, TensorInfo, pageable
from .safetensors_header import Header, UnreadDtypeError, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A source's digest samples this many bytes at every stride of each tensor: 55 MB of Scout's 217 GB.
SAMPLE_BYTES, SAMPLE_STRIDE = 4096, 2**24


@dataclass(frozen=True)
class Folder:
    """A safetensors folder. Implements TensorSource."""

    path: Path
    infos: dict[str, TensorInfo]
    # Tensor -> its shard, and the offset of its first byte in that file.
    offsets: dict[str, tuple[Path, int]]
    shards: tuple[Path, ...]

    @property
    def names(self) -> Collection[str]:
        return self.infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        """A fresh CPU tensor. Raises ResourceError."""
        return self.stored(name, index).on(CPU)

    def stored(self, name: str, index: Index = (), allocate: Allocate = pageable) -> Stored:
        """Reads one stretch of the file: what the leading integers of `index` and the first slice select. Slices of
        later axes are cut out of it. Raises ResourceError."""
        info = self.infos[name]
        file, begin = self.offsets[name]
        shape, nbytes = info.shape, info.nbytes
        for first in index:
            row = nbytes // shape[0] if shape[0] else 0
            rows = range(shape[0])[first] if isinstance(first, slice) else range(first, first + 1)
            begin, nbytes = begin + rows.start * row, len(rows) * row
            index, shape = index[1:], shape[1:]
            if isinstance(first, slice):
                shape = (len(rows), *shape)
                break
        buffer = allocate(nbytes)
        if nbytes:
            read_into(file, begin, buffer)
        whole = buffer.view(TORCH_DTYPES[info.dtype]).view(shape)
        if not index:
            return Stored({name: whole}, lambda parts: parts[name])
        return Stored({name: whole}, lambda parts: parts[name][(slice(None), *index)].contiguous())

    @property
    def file_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies a run's source: over config.json, the index, each shard's name, size and header, and
        samples of every tensor's bytes.

        The samples tell two models of one shape apart without reading 217 GB. Computed on first use, because a plan
        needs headers only.
        """
        sha = hashlib.sha256()
        for name in ("config.json", INDEX_NAME):
            if (self.path / name).exists():
                sha.update(name.encode() + (self.path / name).read_bytes())
        for shard in self.shards:
            with shard.open("rb") as file:
                names = sorted(name for name in self.infos if self.offsets[name][0] == shard)
                # The header fills the file up to the first tensor.
                header = min((self.offsets[name][1] for name in names), default=shard.stat().st_size)
                sha.update(f"{shard.name}:{shard.stat().st_size}".encode() + file.read(header))
                for name in names:
                    begin, size = self.offsets[name][1], self.infos[name].nbytes
                    for offset in range(begin, begin + size, SAMPLE_STRIDE):
                        file.seek(offset)
                        sha.update(file.read(min(SAMPLE_BYTES, begin + size - offset)))
        return sha.hexdigest()


def read_into(file: Path, offset: int, buffer: torch.Tensor) -> None:
    """Fill a uint8 tensor with a file's bytes from `offset` on. Raises ResourceError."""
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file system can hold this name
        return False


def allowed_root(folder: Path) -> Path:
    """The folder that links may lead into: `folder` itself, or the repository's cache for a hub snapshot."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent
    return resolved


def holds_safetensors(path: Path) -> bool:
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def open_folder(path: Path) -> Folder:
    """Open a checkpoint folder, single file or sharded. Raises InputError with every problem."""
    if path.is_file():
        raise InputError(f"{path} is a file: name the folder that holds it and its config.json")
    if not path.is_dir():
        raise InputError(f"{path} is no folder: name a local checkpoint, a hub id or `demo`")
    root = allowed_root(path)
    shard_names, weight_map = shards_of(path, {p.name for p in path.iterdir() if p.exists()}, str(path))
    problems: list[str] = []
    unread: list[str] = []
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
        except UnreadDtypeError as error:
            unread.append(f"{name} {error}")
        except ValueError as error:
            problems.append(f"{name} {error}")
    if unread and not problems:
        told = several(
            f"{path} is sound, and stored in dtypes that onecard does not read:",
            unread,
            f"Use a version of the checkpoint in bf16, fp16 or fp32, or one of {', '.join(TORCH_DTYPES)}.",
        )
        raise UnreadError(told)
    return Folder(path, *join_headers(path, headers, weight_map, problems))


def shards_of(path: Path, present: Collection[str], said: str) -> tuple[list[str], dict[str, str] | None]:
    """The names of a checkpoint's shards, and its index (tensor -> shard) if it has one.

    `path`: where the index lies. `present`: the names of all files. `said`: the checkpoint's name in messages. Raises
    InputError.
    """
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
    """Whether a shard's name in an index is not the plain name of a file beside the index."""
    return bool(re.search(r"[/\\]", name)) or name in ("", ".", "..")


def join_headers(
    path: Path, headers: dict[str, Header], weight_map: dict[str, str] | None, problems: list[str]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[Path, int]], tuple[Path, ...]]:
    """The infos, offsets and shards of a Folder. Raises InputError with `problems` and those found here."""
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
