"""Writing a checkpoint: shards, each as soon as its last tensor is there, and the side files copied from the source."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import torch

from ..core.errors import InputError, ResourceError
from ..core.file_names import RECORD_NAME, TEMPLATE_FOLDER
from ..core.layout import (
    CARD_MARK,
    CARD_NAME,
    TEMPORARY,
    ShardPlan,
    StoredTensor,
    file_bytes,
    file_header,
    in_file_order,
)
from ..core.record.reading import read_file_names
from ..core.tensors import DTYPE_NAMES
from . import files
from .checksums import SUMS_NAME
from .files import TensorFile, let_go
from .safetensors_header import read_header
from .side_files import left_behind, side_files
from .source import INDEX_NAME

WRITTEN = ("config.json", RECORD_NAME, SUMS_NAME)
# GPTQ's own copy of its config block, which would be wrong beside weights in another format.
GPTQ_CONFIG = "quantize_config.json"
# What is copied at a time when files are joined.
COPY_BYTES = 2**24
# Files of a source that have a counterpart of their own in what is emitted.
REPLACED = (*WRITTEN, INDEX_NAME, GPTQ_CONFIG, CARD_NAME)


class ShardWriter:
    """Takes the tensors of some shards in any order.

    A complete shard is written at once and its memory freed. With a `pool`, which has one thread, that thread writes
    each tensor as it comes; `wait` then says that all is written. A tensor with another name, shape or dtype than
    planned is a bug and fails an assertion.
    """

    def __init__(self, shards: Iterable[ShardPlan], folder: Path, pool: Executor | None = None) -> None:
        self.folder, self.pool = folder, pool
        self._writing: list[Future[None]] = []
        self._shards = list(shards)
        self._files = [TensorFile(folder / shard.file, shard.tensors) for shard in self._shards if pool is not None]
        self._home = {t.name: (i, t) for i, s in enumerate(self._shards) for t in s.tensors}
        self._left = [len(shard.tensors) for shard in self._shards]
        self._held: list[dict[str, torch.Tensor]] = [{} for _ in self._shards]
        self._seen: set[str] = set()

    def names(self) -> Iterator[str]:
        """Every planned name, in the plan's order."""
        return iter(list(self._home))

    def has(self, name: str) -> bool:
        return name in self._seen

    def put(self, name: str, tensor: torch.Tensor) -> None:
        index, planned = self._home[name]
        assert name not in self._seen, f"{name} was put twice"
        assert (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]) == (planned.shape, planned.dtype), (name, tensor.shape)
        self._seen.add(name)
        self._left[index] -= 1
        if self.pool is not None:
            self._writing.append(self.pool.submit(self._files[index].write, name, tensor))
            if not self._left[index]:
                self._writing.append(self.pool.submit(self._files[index].close))
            return
        self._held[index][name] = tensor.contiguous()
        if not self._left[index]:
            path, tensors = self.folder / self._shards[index].file, self._held[index]
            self._held[index] = {}
            files.write_tensors(path, tensors)

    def wait(self) -> None:
        """Until every complete shard is on the disk. Raises ResourceError."""
        for write in self._writing:
            write.result()

    def check_complete(self) -> None:
        missing = self._home.keys() - self._seen
        assert not missing, f"planned and never put: {sorted(missing)[:5]}"


def join_shards(pieces: Iterable[Path], tensors: Iterable[StoredTensor], target: Path) -> None:
    """Copy the tensors of several safetensors files into one, which appears complete or not at all.

    The bytes are those that the safetensors library would write. At most COPY_BYTES are in memory. The file is read
    back and compared with the pieces: what was verified of them then holds of the file. Raises ResourceError.
    """
    ordered = in_file_order(tensors)
    homes = {name: (path, offset) for path in pieces for name, (_, offset) in read_header(path).items()}

    def chunks() -> Iterator[bytes]:
        yield file_header(ordered)
        for tensor in ordered:
            path, offset = homes[tensor.name]
            with path.open("rb") as file:
                file.seek(offset)
                for begin in range(0, tensor.nbytes, COPY_BYTES):
                    yield file.read(min(COPY_BYTES, tensor.nbytes - begin))

    files.write_pieces(target, chunks())
    assert target.stat().st_size == file_bytes(ordered), target
    let_go(target)
    with target.open("rb") as file:
        if any(file.read(len(chunk)) != chunk for chunk in chunks()):
            raise ResourceError(
                f"{target} does not hold what was written to it: its disk is damaged, or another program writes there. "
                "Mend that, and go on with --resume"
            )


def written_files(weights: Iterable[str], source: Path) -> list[str]:
    """The names of all files of an OUT. `weights`: the files of weights and their index."""
    return sorted({*WRITTEN, *weights, *side_files(source)})


def emission_warnings(source: Path, shards: Iterable[Path]) -> list[str]:
    """What a user should know of the files in `source` that are not carried. `shards`: those of its weights."""
    return left_behind(source, {*REPLACED, *(shard.name for shard in shards)})


def emitted_before(out: Path) -> list[str] | None:
    """The names of the files that an earlier run put into `out`, from its record; None without a record.

    Raises InputError for a damaged record, so that nothing is removed because of it.
    """
    if not (out / RECORD_NAME).is_file():
        return None
    try:
        return read_file_names(out / RECORD_NAME)
    except InputError:
        raise InputError(f"{out / RECORD_NAME} is damaged: empty {out} yourself, or name another folder") from None


def clear_checkpoint(out: Path) -> None:
    """Remove the files that an earlier run put into `out`, and the model card drawn from its record.

    config.json goes first, so that a half-cleared folder cannot be loaded; the record goes last. Other files stay.
    """
    names = emitted_before(out)
    if names is None:
        return
    if CARD_MARK.encode() in _bytes(out / CARD_NAME):
        names.append(CARD_NAME)
    templates = out / TEMPLATE_FOLDER
    for name in ("config.json", *(name for name in names if name != RECORD_NAME), RECORD_NAME):
        for path in (out / name, out / (name + TEMPORARY)):  # a kill may have left the file half-written
            led_out = path.parent == templates and templates.is_symlink()
            if (path.is_file() or path.is_symlink()) and not led_out:
                path.unlink()
    if templates.is_dir() and not any(templates.iterdir()) and not templates.is_symlink():
        templates.rmdir()


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
