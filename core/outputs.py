"""Files that a command is asked to write: refused before any work is done, all of them at once."""

from collections.abc import Mapping
from pathlib import Path

from .errors import InputError, input_error

WAY_OUT = "name a file in a folder that exists"


def refuse_unwritable(files: Mapping[str, Path | None]) -> None:
    """`files`: what each is called -> its path, None where none was asked for. Raises InputError for a path that is a
    folder, or whose folder does not exist."""
    named = {what: path for what, path in files.items() if path is not None}
    bad = [f"{what} {path}" for what, path in named.items() if path.is_dir() or not path.absolute().parent.is_dir()]
    if len(bad) == 1:
        raise InputError(f"{bad[0]} cannot be written: {WAY_OUT}")
    if bad:
        raise input_error("these files cannot be written:", bad, f"For each, {WAY_OUT}.")
