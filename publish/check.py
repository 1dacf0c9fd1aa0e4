"""Is this folder what it says it is: its files against SHA256SUMS, its tensors against onecard.json and config.json.

Reads every byte and runs nothing. What is found is listed whole; what could not be checked, because another tool made
the folder or because something else is broken, is said. It cannot tell whether the papers themselves were exchanged
along with the weights: that is what `verify` against the original is for.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.assign import schemes_of
from ..checkpoint.checksums import SUMS_NAME, read_sums, sha256_file
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.gguf.read import holds_gguf, open_gguf
from ..checkpoint.model import quantization_block
from ..checkpoint.packed import READERS, PackedSource, open_packed
from ..checkpoint.soundness import Stored, index_problems, shape_problems, stored_modules, value_problems
from ..checkpoint.source import PICKLES, Folder, open_folder
from ..core.errors import DamageError, InputError
from ..core.file_names import RECORD_NAME
from ..core.scheme import BY_ROW, INT8_ROWS, NF4, NF4_BLOCK, Scheme
from ..models.adapter import Adapter, Role
from ..models.families import load_adapter
from ..models.known import read_config
from ..recipe import recorded_recipe
from ..report.reading import READABLE_VERSIONS, check_record

# What a loader may pick up although the index does not name it, and what could run code.
LOADED = (".safetensors", *PICKLES, ".py", ".gguf")
SHOWN = 40
Told = Callable[[str], None]


@dataclass
class Checked:
    """What was found. `problems` and `unchecked` are lines for people; `facts` are counts for both."""

    checkpoint: str
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.problems

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": self.checkpoint,
            "sound": self.sound,
            **self.facts,
            "problems": self.problems,
            "not_checked": self.unchecked,
        }

    def refuse(self) -> None:
        """Raises DamageError when anything is wrong; one message with every offender."""
        if self.sound:
            return
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  - and {len(self.problems) - SHOWN} more, all in the JSON line")
        raise DamageError(
            "\n".join(
                [
                    f"{self.checkpoint} is not what its papers say:",
                    *lines,
                    "Fetch these files again, or make the checkpoint anew; do not use it as it is.",
                ]
            )
        )


def check(checkpoint: str, told: Told | None = None) -> Checked:
    """Check a local folder; `told` hears what is being looked at. Raises InputError when it is no checkpoint."""
    path, found = Path(checkpoint), Checked(checkpoint)
    if not path.is_dir():
        raise InputError(f"{checkpoint} is no folder: name a checkpoint that lies on this machine")
    sums = _digests(path, found, told)
    record = _record(path, found, sums)
    papers = sums is not None or record is not None
    if not papers and not (path / "config.json").exists() and (path / RECORD_NAME).exists():
        raise InputError(f"{checkpoint} is not finished: go on with `onecard quantize` and --resume")
    try:
        config, adapter = read_config(path), load_adapter(path)
    except InputError as error:
        if not papers:
            raise
        return _stop(found, _offenders(error), "config.json cannot be used")
    try:
        packed = open_gguf(path, adapter.text_only()) if holds_gguf(path) else None
        folder = packed.folder if packed is not None else open_folder(path)
    except InputError as error:
        return _stop(found, _offenders(error), "the weights cannot be opened")
    found.problems += _strays(path, folder, sums)
    found.problems += index_problems(folder)
    found.facts |= {"weight_bytes": folder.file_bytes, "tensors": len(folder.infos)}
    if packed is not None:
        if told is not None:
            told("values")
        _unpacked(packed, found)
        if record is not None:
            found.problems += _size_problems(record, adapter, folder)
        if record is not None and record.get("export"):
            widths = Counter(weight.width for weight in packed.weights.values())
            found.problems += _width_counts(widths, record["export"].get("matrices", {}))
        found.problems += value_problems(folder, Stored(plain=dict(folder.infos)), {})
        return found
    _tensors(folder, config, adapter, record, found, told)
    return found


def _stop(found: Checked, problems: list[str], why: str) -> Checked:
    """Nothing further can be looked at; what the digests have said already is not said twice."""
    said = {p.split(" ", 1)[0] for p in found.problems if p.endswith(("is missing", f"than {SUMS_NAME} says"))}
    found.problems += [p for p in problems if not any(name in p for name in said)]
    found.unchecked.append(f"tensors, widths and values: {why}")
    return found


def _offenders(error: InputError) -> list[str]:
    """The lines of a message that lists its offenders, or the message."""
    listed = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    return listed or [str(error)]


def _digests(path: Path, found: Checked, told: Told | None) -> dict[str, str] | None:
    """SHA256SUMS, with every file in it read and compared; None where there is none that can be used."""
    if not (path / SUMS_NAME).is_file():
        found.unchecked.append(f"digests: there is no {SUMS_NAME}")
        return None
    try:
        sums = read_sums(path / SUMS_NAME)
    except InputError as error:
        found.problems += [f"{SUMS_NAME}: {offender}" for offender in _offenders(error)]
        return None
    if told is not None:
        told("digests")
    for name in sorted(sums):
        if not (path / name).is_file():
            found.problems.append(f"{name} is missing")
        elif sha256_file(path / name) != sums[name]:
            found.problems.append(f"{name} has another digest than {SUMS_NAME} says")
    found.facts["files"] = len(sums)
    return sums


def _record(path: Path, found: Checked, sums: dict[str, str] | None) -> dict[str, Any] | None:
    """onecard.json of a finished run; None where there is none that can be used."""
    if not (path / RECORD_NAME).is_file():
        found.unchecked.append(f"the plan: there is no {RECORD_NAME}")
        return None
    try:
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        version = record.get("schema_version")
        names = [str(name) for name in record["files"]]
        if version is not None and version not in READABLE_VERSIONS:
            found.unchecked.append(f"the plan: {RECORD_NAME} has the schema version {version}, which is not known here")
            return None
        if version is None or not record["plan"]:
            if (path / "config.json").exists():
                found.problems.append(f"{RECORD_NAME} is of a run that has not finished")
            return None
        check_record(record, RECORD_NAME)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        found.problems.append(f"{RECORD_NAME} is damaged")
        return None
    if sums is not None:
        listed = {*sums, SUMS_NAME}
        found.problems += [f"{name} is in {RECORD_NAME} and not in {SUMS_NAME}" for name in sorted({*names} - listed)]
        found.problems += [f"{name} is in {SUMS_NAME} and not in {RECORD_NAME}" for name in sorted(listed - {*names})]
    else:
        gone = [name for name in names if not (path / name).is_file()]
        found.problems += [f"{name} is missing, and {RECORD_NAME} names it" for name in gone]
    return dict(record)


def _strays(path: Path, folder: Folder, sums: dict[str, str] | None) -> Iterator[str]:
    """Files that belong to nothing and that a loader may take."""
    shards = {shard.name for shard in folder.shards}
    for item in sorted(path.iterdir()):
        known = item.name in shards or (sums is not None and item.name in sums)
        if item.suffix in LOADED and not known:
            yield f"{item.name} is in the folder and belongs to nothing in it"


def _tensors(
    folder: Folder,
    config: dict[str, Any],
    adapter: Adapter,
    record: dict[str, Any] | None,
    found: Checked,
    told: Told | None,
) -> None:
    """Layout, widths and values."""
    block = quantization_block(folder.path, config)
    ours = block is None or (isinstance(block, dict) and block.get("quant_method") == ct_config.NAME)
    exported = (record or {}).get("export") or None
    if exported is not None:
        found.problems += _matrix_problems(folder, block, exported)
    if block is not None and (record is None or not ours):
        if record is not None:
            found.problems += _size_problems(record, adapter, folder)
        read = _by_reader(folder, block, adapter, found)
        if record is not None and exported is None and read is not None:
            found.problems += _plan_problems(_as_planned(read), record, adapter, set())
        elif record is None:
            found.unchecked.append("widths: only what onecard made has a plan to hold them against")
        stored, expected = Stored(plain=dict(folder.infos)), {}
    else:
        canonical = adapter.expected()
        stored, problems = stored_modules(folder, canonical)
        expected = canonical if stored.schemes or stored.broken else adapter.disk_shapes(folder.names)
        if record is not None:
            found.problems += _size_problems(record, adapter, folder)
        found.problems += problems
        found.problems += shape_problems(stored, expected)
        # What is missing has been said, and has no width.
        packed = {f"{module}.weight" for module in (*stored.schemes, *stored.broken)}
        absent = {name.removesuffix(".weight") for name in expected.keys() - stored.plain.keys() - packed}
        told_of = stored.broken | absent
        found.problems += _width_problems(stored, block, adapter, canonical, told_of, found)
        if record is not None and exported is None:
            found.problems += _plan_problems(stored, record, adapter, told_of)
        found.facts["quantized_modules"] = len(stored.schemes)
    if told is not None:
        told("values")
    found.problems += value_problems(folder, stored, expected)


def _by_reader(folder: Folder, block: object, adapter: Adapter, found: Checked) -> PackedSource | None:
    """Another tool's files, and ours in another format than compressed-tensors: the format's own reader says which
    parts make a weight; every weight is unpacked once, and none may be zero."""
    found.facts["quantized_modules"] = 0
    if not isinstance(block, dict) or block.get("quant_method") not in READERS:
        method = block.get("quant_method") if isinstance(block, dict) else block
        found.unchecked.append(f"shapes and widths: {method!r} is not read here, {', '.join(READERS)} are")
        return None
    try:
        source = open_packed(folder, block)
        read_as = Stored(plain={name: source.info(name) for name in source.names})
        found.problems += shape_problems(read_as, adapter.disk_shapes(source.names))
        _unpacked(source, found)
    except InputError as error:
        found.problems += _offenders(error)
        return None
    return source


def _as_planned(source: PackedSource) -> Stored:
    """What a recipe of ours can name, of what a reader found; another width is no scheme, and so was not planned."""
    known = {str(scheme): scheme for scheme in (Scheme(4, NF4_BLOCK, True, NF4), Scheme(8, BY_ROW, True, INT8_ROWS))}
    schemes = {module: known[width] for module, width in source.schemes.items() if width in known}
    return Stored(schemes, {name: source.info(name) for name in source.names})


def _matrix_problems(folder: Folder, block: object, exported: dict[str, Any]) -> Iterator[str]:
    """A record of `onecard export` says how many matrices lie there at which width."""
    stored: Counter[str] = Counter()
    if isinstance(block, dict) and block.get("quant_method") in READERS:
        with suppress(InputError):  # what its reader has against it is told beside this
            stored = Counter(weight.width for weight in open_packed(folder, block).weights.values())
    yield from _width_counts(stored, exported.get("matrices", {}))


def _width_counts(stored: Counter[str], wanted: dict[str, int]) -> Iterator[str]:
    for width in sorted({*wanted, *stored}):
        if stored[width] != wanted.get(width, 0):
            yield f"{stored[width]} matrices are stored as {width}, and {RECORD_NAME} says {wanted.get(width, 0)}"


def _unpacked(source: PackedSource, found: Checked) -> None:
    """Every weight that is stored in parts, unpacked once."""
    found.facts["quantized_modules"] = len(source.weights)
    for name, weight in source.weights.items():
        shape = weight.info.shape
        # Of fused experts one after the other.
        for index in [(i,) for i in range(shape[0])] if len(shape) == 3 else [()]:
            try:
                if not source.dense(name, torch.float32, index).any():
                    found.problems.append(f"{name}{list(index) or ''} is all zeros")
            except InputError as error:
                found.problems += _offenders(error)


def _stored_as(stored: Stored, module: str) -> str:
    info = stored.plain.get(f"{module}.weight")
    return str(stored.schemes.get(module) or (info.dtype if info else "nothing"))


def _at(schemes: dict[str, Scheme], module: str, inputs: int) -> Scheme | None:
    return schemes[module].at(inputs) if module in schemes else None


def _width_problems(
    stored: Stored,
    block: Any,
    adapter: Adapter,
    shapes: dict[str, tuple[int, ...]],
    told_of: set[str],
    found: Checked,
) -> Iterator[str]:
    """Every Linear module, but those in `told_of`, is stored as config.json's quantization_config announces it."""
    if block is None:
        yield from (f"{m} is packed, and config.json has no quantization_config" for m in sorted(stored.schemes))
        return
    keep = (Role.EMBEDDING, Role.NORM)
    linears = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and adapter.role(name) not in keep
    ]
    try:
        wanted = ct_config.announced(block, linears)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        yield f"config.json has a quantization_config that is not understood ({type(error).__name__})"
        return
    named = {str(entry) for entry in block.get("ignore") or [] if not str(entry).startswith("re:")}
    strange = sorted(named - {*linears} - {name.rpartition(".")[0] for name in shapes} - {"lm_head"})
    if strange:
        found.unchecked.append(f"widths against config.json: its `ignore` names {strange[0]}, which no file holds")
        return
    for module in sorted({*wanted, *stored.schemes} - told_of):
        if stored.schemes.get(module) != _at(wanted, module, shapes[f"{module}.weight"][1]):
            said = wanted.get(module) or "as it was"
            yield f"{module} is stored as {_stored_as(stored, module)}, and config.json announces {said}"


def _size_problems(record: dict[str, Any], adapter: Adapter, folder: Folder) -> Iterator[str]:
    """What the record says of the model and of the bytes."""
    plan, model = record["plan"], record.get("model", {})
    facts = {"family": adapter.family, "blocks": adapter.n_blocks, "experts": adapter.n_experts}
    for key, value in facts.items():
        if model.get(key) != value:
            yield f"{RECORD_NAME} says {key} {model.get(key)}, and config.json {value}"
    if plan.get("emitted_bytes") != folder.file_bytes:
        yield f"the shards have {folder.file_bytes:,} bytes, and {RECORD_NAME} says {plan.get('emitted_bytes')}"
    if plan.get("shards", len(folder.shards)) != len(folder.shards):
        yield f"there are {len(folder.shards)} shards, and {RECORD_NAME} says {plan['shards']}"


def _plan_problems(stored: Stored, record: dict[str, Any], adapter: Adapter, told_of: set[str]) -> Iterator[str]:
    """The record's recipe says which module has which scheme."""
    recipe = record.get("recipe")
    if not recipe:
        return
    try:
        wanted = schemes_of(adapter, recorded_recipe(recipe))
    except (KeyError, TypeError, ValueError, InputError):
        yield f"the recipe in {RECORD_NAME} does not fit config.json"
        return
    for block in range(adapter.n_blocks):
        for _, module, _, inputs in adapter.modules(block):
            if module not in told_of and stored.schemes.get(module) != _at(wanted, module, inputs):
                said = wanted.get(module) or "as it was"
                yield f"{module} is stored as {_stored_as(stored, module)}, and {RECORD_NAME} says {said}"
