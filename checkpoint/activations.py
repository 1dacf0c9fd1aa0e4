"""Activations: hidden rows between blocks. They stay on the card while they fit, then in RAM, then in files.

    acts/NNNN/STREAM-KKKKK.safetensors   hidden rows that enter block NNNN, one file a batch

Files are written behind: `put` returns at once, and a thread writes. They are read ahead: whoever gets a batch will get
the next one of its stream, so a thread reads that, and a copy to the card runs beside the computation (core/lane.py).

Rows in memory die with the process. `settle` makes files of what enters a block, and fsyncs them; a commit that rests
on these rows comes after it. `keep` does both in the thread, while the next block computes.

Nothing here is ever unpickled.
"""

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..core.lane import InRam, Lane, OnItsWay
from . import files
from .workdir import damaged, read_json, read_tensors

CPU = torch.device("cpu")
# The share of the free RAM that rows may take. Two stores can be in use at a time, and weights need room.
RAM_SHARE = 1 / 4
# Weights lie on the card there, and only one store is large at a time.
RAM_SHARE_BESIDE_A_CARD = 1 / 2
# Batches that wait for the thread that writes. More would fill the RAM that files are to spare.
MOST_WAITING = 4

# Beside the files of settled rows: file -> SHA-256 of its numbers. A resumed run checks them.
DIGESTS = "digests.json"

Key = tuple[int, str, int]  # block, stream, batch


def _read(path: Path) -> torch.Tensor:
    return read_tensors(path)["hidden"]


def _digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """What was settled there. Raises InputError when it is damaged."""
    return dict(read_json(folder / DIGESTS)) if (folder / DIGESTS).exists() else {}


@dataclass(frozen=True)
class Room:
    """Bytes of rows that may stay in memory."""

    device_bytes: int
    ram_bytes: int

    @classmethod
    def now(cls, device_bytes: int | None = None) -> "Room":
        """A share of the RAM that is free now, and what the caller knows to be free on the card. None: no card."""
        return cls.of(psutil.virtual_memory().available, device_bytes)

    @classmethod
    def of(cls, free_bytes: int, device_bytes: int | None = None) -> "Room":
        """As `now`, with so much RAM free."""
        share = RAM_SHARE if device_bytes is None else RAM_SHARE_BESIDE_A_CARD
        return cls(device_bytes or 0, int(free_bytes * share))


@dataclass
class _Entry:
    """One batch of rows, in one place or on its way to its file."""

    nbytes: int
    on_device: torch.Tensor | None = None
    in_ram: InRam | None = None
    counted: bool = False  # whether the RAM is counted in the room
    written: Future[None] | None = None  # set as soon as there is, or will be, a file that spares the RAM
    settled: bool = False  # durable, and its digest is kept


@dataclass
class _Used:
    device_bytes: int = 0
    ram_bytes: int = 0


@dataclass
class Activations:
    """The rows of one walk in one folder. Implements RowStore (core/rows.py). `device`: where `get` gives them."""

    folder: Path
    device: torch.device = CPU
    room: Room | None = None  # None: what is free now

    def __post_init__(self) -> None:
        self._room = self.room or Room.now(None if self.device.type == "cpu" else 0)
        self._entries: dict[Key, _Entry] = {}
        self._used = _Used()
        self._lane = Lane(self.device)
        self._ahead: dict[Key, OnItsWay] = {}
        self._reading: dict[Key, Future[torch.Tensor]] = {}
        self._writer = ThreadPoolExecutor(1, "rows-written")
        self._reader = ThreadPoolExecutor(1, "rows-read")
        self._waiting: list[Future[None]] = []

    def _file(self, key: Key) -> Path:
        block, stream, batch = key
        return self.folder / f"{block:04d}" / f"{stream}-{batch:05d}.safetensors"

    # --- one batch

    def put(self, block: int, stream: str, batch: int, hidden: torch.Tensor) -> None:
        """Keep a copy of rows [N, T, H]. Rows that were kept under this key are gone."""
        key = (block, stream, batch)
        self._forget(key)
        entry = self._entries[key] = _Entry(hidden.nbytes)
        on_card = hidden.device.type == "cuda"
        if on_card and self._used.device_bytes + entry.nbytes <= self._room.device_bytes:
            entry.on_device = self._lane.copy(hidden)
            self._used.device_bytes += entry.nbytes
            return
        entry.in_ram = self._lane.to_ram(hidden)
        taken = self._lane.ram_bytes(entry.nbytes)
        entry.counted = self._used.ram_bytes + taken <= self._room.ram_bytes
        if entry.counted:
            self._used.ram_bytes += taken
        else:
            self._write_behind(key, entry)

    def get(self, block: int, stream: str, batch: int) -> torch.Tensor:
        """The rows, on the device; not to be written to. Raises InputError for a damaged file, ResourceError for a disk
        that failed meanwhile."""
        rows = self._take(block, stream, batch)
        self._read_ahead((block, stream, batch + 1))
        return rows

    def _take(self, block: int, stream: str, batch: int) -> torch.Tensor:
        key = (block, stream, batch)
        if key in self._ahead:
            return self._ahead.pop(key).arrived()
        entry = self._entries.get(key)
        if entry is not None and entry.on_device is not None:
            return entry.on_device.detach()
        ram = entry.in_ram if entry is not None else None  # the thread that writes may free it
        if ram is not None:
            return self._lane.to_device(ram).arrived()
        return self._lane.to_device(self._lane.pinned(self._from_file(key))).arrived()

    def _from_file(self, key: Key) -> torch.Tensor:
        if key in self._reading:
            return self._reading.pop(key).result()
        entry = self._entries.get(key)
        if entry is not None and entry.written is not None:
            entry.written.result()
        path = self._file(key)
        rows = _read(path)
        if entry is None and _digest(rows) != _digests(path.parent).get(path.name):  # another process wrote it
            raise damaged(path)
        return rows

    def _read_ahead(self, key: Key) -> None:
        """Begin to bring a batch that has left the device back to it, if there is one."""
        entry = self._entries.get(key)
        if entry is None or key in self._ahead or entry.on_device is not None:
            return
        ram = entry.in_ram
        if ram is not None:
            if self.device.type == "cuda":
                self._ahead[key] = self._lane.to_device(ram)
        elif key not in self._reading:
            self._reading[key] = self._reader.submit(_read, self._file(key))

    def _forget(self, key: Key) -> None:
        """Free the memory of a batch. A file that is there, or comes, stays."""
        self._ahead.pop(key, None)
        self._reading.pop(key, None)
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.on_device is not None:
            self._used.device_bytes -= entry.nbytes
        if entry.counted:
            self._used.ram_bytes -= self._lane.ram_bytes(entry.nbytes)

    # --- files

    def _write_behind(self, key: Key, entry: _Entry) -> None:
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.pop(0).result()
        assert entry.in_ram is not None
        entry.written = self._writer.submit(self._written, key, entry)
        self._waiting.append(entry.written)

    def _written(self, key: Key, entry: _Entry) -> None:
        """Writes a batch. Memory that is not counted in the room is freed."""
        path, rows = self._file(key), entry.in_ram
        if rows is None:
            assert entry.on_device is not None
            rows = self._lane.to_ram(entry.on_device)  # beside what the card computes, not in its queue
        files.make_folder(path.parent)
        files.write_tensors(path, {"hidden": rows.read()}, lasting=False)
        if not entry.counted:
            entry.in_ram = None

    def _entering(self, block: int) -> list[tuple[Key, _Entry]]:
        return sorted((item for item in self._entries.items() if item[0][0] == block), key=lambda item: item[0])

    def bytes_entering(self, block: int) -> int:
        """Bytes of all rows that enter `block`."""
        return sum(entry.nbytes for _, entry in self._entering(block))

    def settle(self, *blocks: int) -> None:
        """Make the rows that enter these blocks durable: in files, on the disk."""
        for block in blocks:
            self._settled(block, self._entering(block))

    def keep(self, *blocks: int, commit: Callable[[], None]) -> Future[None]:
        """`settle`, then `commit`, both in the thread that writes. The rows of now are written, whatever is put and
        released meanwhile."""
        entries = [(block, self._entering(block)) for block in blocks]

        def work() -> None:
            for block, its in entries:
                self._settled(block, its)
            commit()

        return self._writer.submit(work)

    def _settled(self, block: int, entries: list[tuple[Key, _Entry]]) -> None:
        folder = self.folder / f"{block:04d}"
        entries = [(key, entry) for key, entry in entries if not entry.settled]
        for key, entry in entries:
            if entry.written is None:
                self._written(key, entry)
            elif not entry.written.done():  # it waits in the thread's own queue, or is being written
                entry.written.result()
        if not entries:
            return
        digests = _digests(folder)
        with files.disk_errors(folder):
            for key, entry in entries:
                path = self._file(key)
                files.sync_file(path)
                ram = entry.in_ram  # what was written is compared with what should have been
                digests[path.name] = _digest(ram.read() if ram is not None else _read(path))
            files.sync_folder(folder)
        files.write_json(folder / DIGESTS, digests)
        for _, entry in entries:
            entry.settled = True

    def release(self, block: int, stream: str | None = None) -> None:
        """Free the memory of the rows that entered `block`, or of one stream. Files stay: a commit may rest on them."""
        for key, _ in self._entering(block):
            if stream in (None, key[1]):
                self._forget(key)

    def drop(self, block: int, stream: str | None = None) -> None:
        """Remove the rows that entered `block`, or one stream of them, and their files."""
        entering = [(key, entry) for key, entry in self._entering(block) if stream in (None, key[1])]
        for key, _ in entering:
            self._forget(key)
        for _, entry in entering:
            if entry.written is not None:
                entry.written.result()
        self.remove_files(block, stream)

    def close(self) -> None:
        """Ends both threads. What waits to be written is not written."""
        for pool in (self._writer, self._reader):
            pool.shutdown(cancel_futures=True)

    def remove_files(self, block: int, stream: str | None = None) -> None:
        """Remove the files of rows that were released."""
        folder = self.folder / f"{block:04d}"
        if stream is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for path in folder.glob(f"{stream}-*.safetensors"):
                path.unlink()

    def remove_files_above(self, block: int) -> None:
        """Remove the files of rows that enter blocks after this one, and were released."""
        self._remove_folders(lambda entered: entered > block)

    def remove_files_but(self, block: int | None) -> None:
        """Remove what a killed run has left, but for the rows that enter `block`."""
        self._remove_folders(lambda entered: entered != block)

    def _remove_folders(self, wanted: Callable[[int], bool]) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if wanted(int(path.name)):
                shutil.rmtree(path, ignore_errors=True)
