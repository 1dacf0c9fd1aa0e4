"""A record from its file, checked once: the only place that reads `onecard.json`.

A file that is no record, has an unknown schema version, or is damaged is refused in one message, which lists every
fault and ends with the way out. Keys that this version does not know are kept and not looked at.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import InputError, input_error
from ..file_names import RECORD_NAME, is_own_name
from ..json_text import nonfinite
from .schema import READABLE_VERSIONS, Record

WAY_OUT = (
    f"Name the {RECORD_NAME} of a finished checkpoint, its folder, or a file that `onecard verify --record` or "
    "`onecard flips --record` wrote."
)
MOST_FAULTS = 12
B = TypeVar("B", bound=BaseModel)


class UnfinishedError(InputError):
    """A run has begun to write its files and has not finished: it is known which files are to come, and no more."""


class UnknownVersionError(InputError):
    """The record has a schema version that this onecard does not read."""


def file_of(path: Path) -> Path:
    """The record's file, given it or the folder of a checkpoint."""
    return path / RECORD_NAME if path.is_dir() else path


def read_record(path: Path) -> Record:
    """The record in the file `path`, or in the checkpoint folder `path`. Raises InputError."""
    file = file_of(path)
    if not file.is_file():
        raise InputError(f"{path} holds no record" + (f", no {RECORD_NAME}" if path.is_dir() else "") + f". {WAY_OUT}")
    data = _parsed(file)
    if isinstance(data, dict) and set(data) == {"files"}:
        raise UnfinishedError(f"{path} is not finished: go on with `onecard quantize … --resume`")
    return check_record(data, str(file))


def read_file_names(path: Path) -> list[str]:
    """The names of the files that a run puts into its folder, from a record of any version, or its beginning. Raises
    InputError, also for names that lead out of the folder."""
    data = _parsed(path)
    names = data.get("files") if isinstance(data, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and is_own_name(name) for name in names):
        raise InputError(f"{path} does not say which files belong to it. {WAY_OUT}")
    return names


def check_record(data: Any, name: str) -> Record:
    """The record that `data`, parsed JSON, is; messages call it `name`. Raises InputError."""
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError(f"{name} is no record of onecard: it has no schema_version. {WAY_OUT}")
    version = data["schema_version"]
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise UnknownVersionError(
            f"{name} has schema version {version!r}, and this onecard reads {known}: "
            f"use the onecard that wrote it ({data.get('onecard', 'its version is not said')}), or a newer one"
        )
    return validated(Record, data, name)


def validated(kind: type[B], data: Any, name: str) -> B:
    """`data`, parsed JSON, as a value of `kind`; messages call it `name`. Raises InputError with every fault."""
    faults = [f"{place}: {value} is not a finite number" for place, value in nonfinite(data)]
    if not faults:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in found]
    more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
    raise input_error(f"{name} is no sound record:", faults[:MOST_FAULTS] + more, WAY_OUT)


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no record: it cannot be read as JSON ({error}). {WAY_OUT}") from None
