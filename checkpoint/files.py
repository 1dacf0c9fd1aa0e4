"""Writing files that survive a power cut: write under a temporary name, fsync, rename, fsync the folder.

A reader sees the old file, no file, or the complete new file. A full disk becomes one ResourceError that says how to go
on.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..core.errors import ResourceError
from ..core.layout import METADATA, TEMPORARY, StoredTensor, file_header, in_file_order, json_bytes


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full or failing disk, while writing `path`, into a ResourceError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the system's error only as text.
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text
        with suppress(OSError):
            path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
        if full:
            raise ResourceError(
                f"the disk is full: {path.name} could not be written in {path.parent}. Free space there and run the "
                "same command again; quantize goes on with --resume, everything finished so far is kept"
            ) from error
        raise ResourceError(
            f"{path} could not be written ({text}). Fix that and run the same command again; quantize goes on with "
            "--resume"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def let_go(path: Path) -> None:
    """Drop what the system holds of a written file in RAM, where it lets one: then the disk is read."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _commit(temporary: Path, path: Path, lasting: bool = True) -> None:
    if lasting:
        sync_file(temporary)
    os.replace(temporary, path)
    if lasting:
        sync_folder(path.parent)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], lasting: bool = True) -> None:
    """Write a safetensors file, completely or not at all. Without `lasting` it survives a kill of the process, but
    perhaps no power cut."""
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path):
        save_file(tensors, temporary, metadata=METADATA)
        # safetensors makes the file readable for its owner only, but a server may run as another user.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _commit(temporary, path, lasting)


class TensorFile:
    """A safetensors file into which tensors are written as they come, in any order. It appears complete or not at all,
    with the bytes that `write_tensors` would write. One thread does all that is done with it. After an error nothing
    more is written."""

    def __init__(self, path: Path, tensors: Iterable[StoredTensor]) -> None:
        self.path, self._temporary = path, path.with_name(path.name + TEMPORARY)
        ordered = in_file_order(tensors)
        self._header = file_header(ordered)
        self._offsets, end = dict[str, int](), len(self._header)
        for tensor in ordered:
            self._offsets[tensor.name] = end
            end += tensor.nbytes
        self._file: BinaryIO | None = None
        self._failed = False

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor`, on the CPU. Raises ResourceError."""
        with self._guarded() as go_on:
            if go_on:
                if self._file is None:
                    self._file = self._temporary.open("wb")
                    self._file.write(self._header)
                write_values(self._file, self._offsets[name], tensor)

    def close(self) -> None:
        """All tensors are written. Raises ResourceError."""
        with self._guarded() as go_on:
            if go_on:
                assert self._file is not None
                self._file.close()
                _commit(self._temporary, self.path)

    @contextmanager
    def _guarded(self) -> Iterator[bool]:
        try:
            with disk_errors(self.path):
                yield not self._failed
        except BaseException:
            self._failed = True
            raise


def write_values(file: BinaryIO, offset: int, tensor: torch.Tensor) -> None:
    """The bytes of a CPU tensor to their place in a file."""
    file.seek(offset)
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, completely or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path):
        temporary.write_bytes(data)
        _commit(temporary, path)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file, completely or not at all, with one piece in memory at a time. When making a piece fails, no file is
    left behind."""
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _commit(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def make_folder(path: Path) -> None:
    """Make the folder and all its parents."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename; across file systems copy, fsync and remove. `target` appears complete."""
    with disk_errors(target):
        try:
            os.replace(path, target)
            sync_folder(target.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            temporary = target.with_name(target.name + TEMPORARY)
            shutil.copyfile(path, temporary)
            _commit(temporary, target)
            path.unlink()
