"""Is this folder what it says it is: its files against SHA256SUMS, its tensors against onecard.json and config.json.

Reads every byte and runs nothing. Every problem is listed, and so is what could not be checked because another tool
made the folder or because something else is broken. A check cannot tell whether the papers were exchanged along with
the weights: `verify` against the original can.
"""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.checksums import SUMS_NAME, read_sums, sha256_file
from ..checkpoint.gguf.read import holds_gguf, open_gguf
from ..checkpoint.side_files import ADAPTER_FILES
from ..checkpoint.soundness import index_problems
from ..checkpoint.source import PICKLES, Folder, open_folder
from ..core.errors import InputError, UnreadError
from ..core.file_names import RECORD_NAME
from ..core.record.reading import UnfinishedError, UnknownVersionError, read_record
from ..core.record.schema import Record
from ..core.rows import Step
from ..models.adapter import Adapter
from ..models.config_keys import differences_from
from ..models.families import load_adapter
from ..models.known import read_config
from .findings import Checked, offenders
from .tensors import Tensors, check_gguf, check_tensors

# What a loader may pick up although the index does not name it, and what could run code.
LOADED = (".safetensors", *PICKLES, ".py", ".gguf")


def check(checkpoint: str, step: Step | None = None) -> Checked:
    """Check a local folder; `step` hears what is being looked at. Raises InputError when it is no checkpoint."""
    path, found = Path(checkpoint), Checked(checkpoint)
    if not path.is_dir():
        raise InputError(f"{checkpoint} is no folder: name a checkpoint that lies on this machine")
    sums = _digests(path, found, step)
    record = _record(path, found, sums)
    papers = sums is not None or record is not None
    if not papers and not (path / "config.json").exists() and (path / RECORD_NAME).exists():
        raise InputError(f"{checkpoint} is not finished: go on with `onecard quantize` and --resume")
    try:
        config, adapter = read_config(path), load_adapter(path)
    except InputError as error:
        if not papers:
            raise
        return _stop(found, offenders(error), "config.json cannot be used")
    _compare_config(adapter, record, found)
    try:
        packed = open_gguf(path, adapter.text_only()) if holds_gguf(path) else None
        folder = packed.folder if packed is not None else open_folder(path)
    except UnreadError as error:
        found.unchecked += [f"tensors, widths and values: {line}" for line in offenders(error)]
        return found
    except InputError as error:
        return _stop(found, offenders(error), "the weights cannot be opened")
    found.problems += _strays(path, folder, sums)
    found.problems += index_problems(folder)
    found.facts |= {"weight_bytes": folder.file_bytes, "tensors": len(folder.infos)}
    if packed is not None:
        check_gguf(packed, adapter, record, found, step)
    else:
        check_tensors(Tensors(folder, config, adapter, record), found, step)
    return found


def _stop(found: Checked, problems: list[str], why: str) -> Checked:
    """Nothing further can be looked at. A file that the digests have named already is not named again."""
    said = {p.split(" ", 1)[0] for p in found.problems if p.endswith(("is missing", f"than {SUMS_NAME} says"))}
    found.problems += [p for p in problems if not any(name in p for name in said)]
    found.unchecked.append(f"tensors, widths and values: {why}")
    return found


def _digests(path: Path, found: Checked, step: Step | None) -> dict[str, str] | None:
    """SHA256SUMS, with every file in it read and compared; None where there is none that can be used."""
    if not (path / SUMS_NAME).is_file():
        found.unchecked.append(f"digests: there is no {SUMS_NAME}")
        return None
    try:
        sums = read_sums(path / SUMS_NAME)
    except InputError as error:
        found.problems += [f"{SUMS_NAME}: {offender}" for offender in offenders(error)]
        return None
    if step is not None:
        step.begin("digests")
    for name in sorted(sums):
        if not (path / name).is_file():
            found.problems.append(f"{name} is missing")
        elif sha256_file(path / name) != sums[name]:
            found.problems.append(f"{name} has another digest than {SUMS_NAME} says")
    found.facts["files"] = len(sums)
    return sums


def _record(path: Path, found: Checked, sums: dict[str, str] | None) -> Record | None:
    """onecard.json of a finished run; None where there is none that can be used."""
    if not (path / RECORD_NAME).is_file():
        found.unchecked.append(f"the plan: there is no {RECORD_NAME}")
        return None
    record = None
    try:
        record = read_record(path / RECORD_NAME)
    except UnknownVersionError as error:
        found.unchecked.append(f"the plan: {error}")
        return None
    except UnfinishedError:
        pass
    except InputError:
        found.problems.append(f"{RECORD_NAME} is damaged")
        return None
    if record is not None and not record.model_fields_set >= {"files", "plan"}:
        found.problems.append(f"{RECORD_NAME} is damaged")
        return None
    if record is None or record.plan is None:
        if (path / "config.json").exists():
            found.problems.append(f"{RECORD_NAME} is of a run that has not finished")
        return None
    names = record.files
    if sums is not None:
        listed = {*sums, SUMS_NAME}
        found.problems += [f"{name} is in {RECORD_NAME} and not in {SUMS_NAME}" for name in sorted({*names} - listed)]
        found.problems += [f"{name} is in {SUMS_NAME} and not in {RECORD_NAME}" for name in sorted(listed - {*names})]
    else:
        gone = [name for name in names if not (path / name).is_file()]
        found.problems += [f"{name} is missing, and {RECORD_NAME} names it" for name in gone]
    return record


def _compare_config(adapter: Adapter, record: Record | None, found: Checked) -> None:
    """config.json against the original's fields in the record."""
    if record is None:
        return
    if not record.model.config:
        found.unchecked.append(f"config.json against the original's: {RECORD_NAME} does not hold its fields")
        return
    found.problems += [
        f"config.json: {difference.told()}" for difference in differences_from(record.model.config, adapter.config)
    ]


def _strays(path: Path, folder: Folder, sums: dict[str, str] | None) -> Iterator[str]:
    """Files that belong to nothing and that a loader may take."""
    shards = {shard.name for shard in folder.shards}
    for item in sorted(path.iterdir()):
        known = item.name in shards or (sums is not None and item.name in sums)
        if (item.suffix in LOADED or item.name in ADAPTER_FILES) and not known:
            yield f"{item.name} is in the folder and belongs to nothing in it"
