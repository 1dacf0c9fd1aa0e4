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


def _write_values(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Those that there are: the shapes of packed weights."""
    offsets = {name: offset for name, (_, offset) in read_header(path).items()}
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            values = tensor.inner if isinstance(tensor, Pretended) else tensor
            if values.device.type == "cpu" and tensor.dtype in (torch.int64, torch.int32):
                file.seek(offsets[name])
                file.write(values.contiguous().numpy().tobytes())


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


def stand_ins(ledger: Ledger) -> list[tuple[Any, str, Any]]:
    """(module, attribute, what takes its place)."""

    real_read, real_write, in_ram = source.read_into, files.write_values, set[Path]()

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        for tensor in tensors.values():
            if isinstance(tensor, Pretended) and tensor.is_cuda:
                ledger.copy(tensor.nbytes, "from card", False, line())
        infos = {name: TensorInfo(tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in tensors.items()}
        write_hole(path, infos)
        _write_values(path, tensors)
        ledger.file(sum(info.nbytes for info in infos.values()), "written")
        # The system holds a written file until it is let go, under the name that it gets next.
        in_ram.add(path.with_name(path.name.removesuffix(TEMPORARY)))

    def write_values(file: BinaryIO, offset: int, tensor: torch.Tensor) -> None:
        file.truncate(max(file.seek(0, 2), offset + tensor.nbytes))
        values = tensor.inner if isinstance(tensor, Pretended) else tensor
        if values.device.type == "cpu" and tensor.dtype in (torch.int64, torch.int32):
            real_write(file, offset, values)
        ledger.file(tensor.nbytes, "written")
        in_ram.add(Path(file.name.removesuffix(TEMPORARY)))

    def load_file(path: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, (info, _) in read_header(Path(path)).items():
            empty = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
            found[name] = Pretended(empty, CPU, ledger)
            ledger.file(info.nbytes, "read")
        return found

    def sync(*_: Any) -> None:
        ledger.add("fsyncs")
        ledger.wait(rates.FSYNC_SECONDS)

    lately = _Cached()

    def read_into(file: Path, offset: int, buffer: torch.Tensor) -> None:
        nbytes = buffer.numel()
        lately.at(ledger.key)
        there = nbytes if file in in_ram else lately.read(file, offset, nbytes)
        if there:
            ledger.compute(there)
        if there < nbytes:
            ledger.file(nbytes - there, "read")
        held = buffer.inner if isinstance(buffer, Pretended) else buffer
        if held.device.type == "cpu":
            real_read(file, offset, held)

    def sha256_file(path: Path) -> str:
        nbytes = path.stat().st_size
        if path not in in_ram:
            ledger.file(nbytes, "read")
        in_ram.add(path)
        return digest(nbytes)

    def digest(nbytes: int) -> str:
        ledger.add("CPU seconds" if ledger.is_main else "CPU seconds behind", nbytes / rates.DIGEST)
        ledger.wait(nbytes / rates.DIGEST)
        return "0" * 64

    return [
        (activations, "_digest", lambda rows: digest(rows.nbytes)),
        (files, "save_file", save_file),
        (files, "write_values", write_values),
        (files, "sync_file", sync),
        (files, "sync_folder", sync),
        (files, "let_go", in_ram.discard),
        (workdir, "load_file", load_file),
        (source, "read_into", read_into),
        (checksums, "sha256_file", sha256_file),
    ]
