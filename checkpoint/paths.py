"""The folders that a run writes to, OUT and the work directory, checked before anything is written."""

import shutil
from pathlib import Path

from ..core.errors import InputError, ResourceError
from ..core.units import size
from .emit import emitted_before
from .workdir import has_run


def occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def check_paths(out: Path, work: Path | None, model: Path, resume: bool, overwrite: bool) -> Path:
    """Check that OUT is free, or that --resume or --overwrite was given, and that OUT, work directory and model are
    not nested. Returns the work directory. Raises InputError."""
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other: give one of them")
    _refuse_nested("output", out, "model", model)
    _refuse_file("output", out)
    folder = work_folder(out, work)
    if occupied(out) and not resume:
        if emitted_before(out) is None:
            raise InputError(
                f"the output {out} holds files that no run of onecard put there: empty it yourself, or name another "
                "folder"
            )
        if not overwrite:
            go_on = "go on with --resume, " if has_run(folder) else ""
            raise InputError(f"the output {out} is not empty: {go_on}replace it with --overwrite, or name another")
    _refuse_nested("work directory", folder, "model", model)
    _refuse_nested("work directory", folder, "output", out)
    _refuse_file("work directory", folder)
    return folder


def _refuse_nested(what: str, path: Path, other_what: str, other: Path) -> None:
    a, b = path.resolve(), other.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise InputError(
            f"the {what} {path} and the {other_what} {other} are the same or nested: name separate folders"
        )


def _refuse_file(what: str, path: Path) -> None:
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"the {what} {path} cannot be made, since {place} is a file: name another folder")
        if place.is_symlink() and not place.exists():
            raise InputError(f"the {what} {path} cannot be made, since {place} is a link to nothing: name another")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises ResourceError when the disk has less than `needed_bytes` free."""
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"{existing} has {size(free)} free and the run needs {size(needed_bytes)}: free space, or name another "
            "place for OUT and --work"
        )


def work_folder(out: Path, work: Path | None) -> Path:
    """The work directory that the user named, or OUT.work beside OUT."""
    if work is not None:
        return work
    named = out if out.name not in ("", "..") else out.resolve()
    if not named.name:
        raise InputError(f"the output {out} has no name: name a folder in it, or a work directory with --work")
    return named.with_name(named.name + ".work")
