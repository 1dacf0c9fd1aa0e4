"""The work directory: finished parts of a run, so that a killed run can resume and end in the same bytes.

    state.json                identity of the run (recipe, source, texts, versions), the number of finished stages, the
                              OUT that may be cleared, and the OUT that files have begun to move to
    lock                      held with flock by the live run; the system frees it however the run ends
    acts/                     hidden rows between blocks (activations.py)
    zeros.json                the matrices that are all zeros in the source
    shards/                   finished shards of the checkpoint
    blocks/NNNN.json          the record's entry for a finished block
    verified/NNNN.json        what the verification has seen of it
    digests/NNNN.json         the digests of its shards; also of those that lie outside the blocks
    sensitivity/              metrics and token weights, and where their walk back can go on

state.json is the only commit point: the files of a stage are written and fsynced first, then its number grows. A
resumed run does an unfinished stage, and finished ones that are not counted yet, again (keeper.py). Nothing here is
ever unpickled.
"""

import fcntl
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.errors import InputError, input_error
from ..core.layout import TEMPORARY
from . import files

STATE = "state.json"
# What the numbers in the state mean: the stages of a run and their files. Another layout is not resumed.
LAYOUT = 3
# Shown in place of a part of the identity that only one of two runs has.
NONE = "not given"


def damaged(path: Path) -> InputError:
    """The error for a file of the work directory that is not what was written."""
    return InputError(f"{path} is damaged or gone, and only onecard may change it: start anew with --overwrite")


def read_json(path: Path) -> Any:
    """Read a file of the work directory. Raises InputError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise damaged(path) from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file of the work directory. Raises InputError when it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise damaged(path) from None


def _read_state(path: Path) -> dict[str, Any]:
    match read_json(path / STATE):
        case {"done": int(), "identity": dict()} as state:
            return dict(state)
    raise damaged(path / STATE)


def has_run(path: Path) -> bool:
    """Whether `path` holds an unfinished run. Raises InputError when its state is damaged."""
    return (path / STATE).exists() and not _read_state(path).get("over")


def kept_identity(path: Path) -> dict[str, str]:
    """The identity of the unfinished run in `path`; empty where there is none. Raises InputError when it is damaged."""
    return dict(_read_state(path)["identity"]) if has_run(path) else {}


def refuse_changed(old: dict[str, str], new: dict[str, str], headline: str, way_out: str) -> None:
    """Raises InputError that lists every part of the identity that changed."""
    changed = [
        f"{key} was {old.get(key, NONE)} and is {new.get(key, NONE)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise input_error(headline, changed, way_out)


def refuse_resumed(old: dict[str, str], new: dict[str, str], where: Path) -> None:
    """Raises InputError when the new run is not the one that was begun in `where`."""
    headline = f"the run in {where} cannot be resumed, since it would not end in the same bytes:"
    refuse_changed(old, new, headline, "Put back what changed, or start anew with --overwrite.")


class WorkDir:
    """One run's folder, locked while this object is open. `done` is the number of finished stages."""

    def __init__(
        self, path: Path, identity: dict[str, str], resume: bool, overwrite: bool, out: Path | None = None
    ) -> None:
        """Raises InputError when another run holds the folder, when it is not empty and neither flag was given, or when
        the resumed run is not the one that was begun (saying what changed)."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"the work directory {path} is a file: name another with --work")
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        occupied = bool(names - {"lock"})
        # The state is written first and removed last.
        foreign = occupied and not names >= {"lock", STATE} and names != {"lock", STATE + TEMPORARY}
        if foreign or ("lock" in names and (path / "lock").stat().st_size):
            raise InputError(f"{path} is not empty and is no work directory of onecard: name another with --work")
        files.make_folder(path)
        self._lock = self._acquire()
        try:
            if occupied and not (resume or overwrite):
                raise InputError(
                    f"the work directory {path} holds an unfinished run: go on with --resume, or start anew with "
                    "--overwrite"
                )
            if overwrite or not has_run(path):
                self.clear()
            self.state: dict[str, Any] = {"layout": LAYOUT, "identity": identity, "done": 0}
            if overwrite and out is not None:
                self.state["may_clear"] = str(out.resolve())
            if has_run(path):
                self.state = _read_state(path)
                if self.state.get("layout") != LAYOUT:
                    raise InputError(
                        f"the run in {path} was begun by another version of onecard: go on with that version, or start "
                        "anew with --overwrite"
                    )
                refuse_resumed(self.state["identity"], identity, path)
            else:
                self._write_state()
        except BaseException:
            self._lock.close()
            raise

    def _acquire(self) -> TextIO:
        with files.disk_errors(self.path / "lock"):
            lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InputError(
                f"the work directory {self.path} is held by a run that is still alive: wait for it, or name another "
                "folder with --work"
            ) from None
        return lock

    def _write_state(self) -> None:
        files.write_json(self.path / STATE, self.state)

    @property
    def done(self) -> int:
        return int(self.state["done"])

    def commit(self, done: int) -> None:
        """Record that `done` stages are finished. All their files must be on disk."""
        self.state["done"] = done
        self._write_state()

    @property
    def moving_to(self) -> str | None:
        """The OUT that files have begun to move to."""
        return self.state.get("moving_to")

    def may_clear(self, out: Path) -> bool:
        """Whether the run was begun with --overwrite for this OUT."""
        return self.state.get("may_clear") == str(out.resolve())

    def begin_move(self, out: Path) -> None:
        self.state["moving_to"] = str(out.resolve())
        self._write_state()

    def clear(self) -> None:
        """Empty the folder, except for the lock.

        The state is first marked as over, and removed last: whatever a kill leaves is recognised as a work directory
        without a run.
        """
        if (self.path / STATE).exists():
            files.write_json(self.path / STATE, {"identity": {}, "done": 0, "over": True})
        for item in self.path.iterdir():
            if item.name in ("lock", STATE):
                continue
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        (self.path / STATE).unlink(missing_ok=True)

    def refuse_damaged(self, sizes: dict[str, int], out: Path) -> None:
        """Raises InputError when a finished shard, here or already moved to `out`, does not have its planned size."""
        for name, size in sizes.items():
            places = [place for place in (self.path / "shards" / name, out / name) if place.is_file()]
            if not places or places[0].stat().st_size != size:
                raise damaged(places[0] if places else self.path / "shards" / name)

    def folder(self, *parts: str) -> Path:
        folder = self.path.joinpath(*parts)
        files.make_folder(folder)
        return folder

    def remove(self) -> None:
        """Remove the folder of a run that is finished or was refused."""
        self.clear()
        (self.path / "lock").unlink()
        with suppress(OSError):  # a link or a mount point stays, but empty
            self.path.rmdir()
        self._lock.close()

    def __enter__(self) -> "WorkDir":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lock.closed:
            self._lock.close()
