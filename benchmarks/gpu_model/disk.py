"""Stand-ins for the disk: files have true headers and a hole in place of data; bytes are counted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hollow import write_hole
from onecard.checkpoint import activations, checksums, files, source, workdir
from onecard.checkpoint.safetensors_header import read_header
from onecard.core.layout import TEMPORARY
from onecard.core.tensors import DTYPE_NAMES, TORCH_DTYPES, TensorInfo

from . import rates
from .ledger import Key, Ledger, line
from .tensors import CPU, Pretended

# The project's own, which the stand-ins call.
read_bytes, write_bytes = source.read_into, files.write_values


def _keep_values(file: BinaryIO, offset: int, tensor: torch.Tensor) -> None:
    """Writes the values that there are: the shapes of packed weights."""
    values = tensor.inner if isinstance(tensor, Pretended) else tensor
    if values.device.type == "cpu" and tensor.dtype in (torch.int64, torch.int32):
        write_bytes(file, offset, values)


@dataclass
class _Cached:
    """Where the latest bytes lie that were read, which the system still holds: file, begin and end, the oldest
    first."""

    ranges: list[tuple[Path, int, int]] = field(default_factory=list)
    _in_blocks: bool = False

    def at(self, key: Key) -> None:
        """A whole run reads far more than is held between its beginning and what comes after its blocks, and before a
        walk comes to a block once more."""
        in_blocks = key[1] is not None
        if (self._in_blocks and not in_blocks) or key[0].startswith("walk"):
            self.ranges.clear()
        self._in_blocks = in_blocks

    def read(self, file: Path, begin: int, nbytes: int) -> int:
        """How many of the bytes are held; all are from now on."""
        end = begin + nbytes
        shared = [max(0, min(end, e) - max(begin, b)) for f, b, e in self.ranges if f == file]
        found = min(nbytes, sum(shared))
        self.ranges.append((file, begin, end))
        while sum(e - b for _, b, e in self.ranges) > rates.CACHED_BYTES:
            del self.ranges[0]
        return found


class _Disk:
    """Takes the place of what reads and writes files."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.lately = ledger, _Cached()
        # The system holds a written file until it is let go, under the name that it gets when it is complete.
        self.in_ram: set[Path] = set()

    def written(self, path: Path, nbytes: int) -> None:
        self.ledger.file(nbytes, "written")
        self.in_ram.add(path.with_name(path.name.removesuffix(TEMPORARY)))

    def save_file(self, tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        for tensor in tensors.values():
            if isinstance(tensor, Pretended) and tensor.is_cuda:
                self.ledger.copy(tensor.nbytes, "from card", False, line())
        infos = {name: TensorInfo(tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in tensors.items()}
        write_hole(path, infos)
        with path.open("r+b") as file:
            for name, (_, offset) in read_header(path).items():
                _keep_values(file, offset, tensors[name])
        self.written(path, sum(info.nbytes for info in infos.values()))

    def write_values(self, file: BinaryIO, offset: int, tensor: torch.Tensor) -> None:
        file.truncate(max(file.seek(0, 2), offset + tensor.nbytes))
        _keep_values(file, offset, tensor)
        self.written(Path(file.name), tensor.nbytes)

    def load_file(self, path: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, (info, _) in read_header(Path(path)).items():
            empty = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
            found[name] = Pretended(empty, CPU, self.ledger)
            self.ledger.file(info.nbytes, "read")
        return found

    def sync(self, *_: Any) -> None:
        self.ledger.add("fsyncs")
        self.ledger.wait(rates.FSYNC_SECONDS)

    def read_into(self, file: Path, offset: int, buffer: torch.Tensor) -> None:
        nbytes = buffer.numel()
        self.lately.at(self.ledger.key)
        there = nbytes if file in self.in_ram else self.lately.read(file, offset, nbytes)
        if there:
            self.ledger.compute(there)
        if there < nbytes:
            self.ledger.file(nbytes - there, "read")
        held = buffer.inner if isinstance(buffer, Pretended) else buffer
        if held.device.type == "cpu":
            read_bytes(file, offset, held)

    def sha256_file(self, path: Path) -> str:
        nbytes = path.stat().st_size
        if path not in self.in_ram:
            self.ledger.file(nbytes, "read")
        self.in_ram.add(path)
        return self.digest(nbytes)

    def digest(self, nbytes: int) -> str:
        self.ledger.add("CPU seconds" if self.ledger.is_main else "CPU seconds behind", nbytes / rates.DIGEST)
        self.ledger.wait(nbytes / rates.DIGEST)
        return "0" * 64


def stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """(module, attribute, what takes its place)."""
    disk = _Disk(ledger)
    return [
        (activations, "_digest", lambda rows: disk.digest(rows.nbytes)),
        (files, "save_file", disk.save_file),
        (files, "write_values", disk.write_values),
        (files, "sync_file", disk.sync),
        (files, "sync_folder", disk.sync),
        (files, "let_go", disk.in_ram.discard),
        (workdir, "load_file", disk.load_file),
        (source, "read_into", disk.read_into),
        (checksums, "sha256_file", disk.sha256_file),
    ]
