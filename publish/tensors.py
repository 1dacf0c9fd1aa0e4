"""A folder's tensors against its record and its config.json: sizes, shapes, widths, values.

compressed-tensors' files are looked at part by part. Files in another format go through that format's own reader, which
says which parts make a weight; every weight is then unpacked once, and none may be zero.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.assign import schemes_of
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.formats import compressed_tensors_write as ct
from ..checkpoint.model import quantization_block
from ..checkpoint.packed import READERS, PackedSource, open_packed
from ..checkpoint.soundness import Stored, read_values, shape_problems, stored_modules
from ..checkpoint.source import Folder
from ..checkpoint.source_checks import untied_copy
from ..core.errors import InputError
from ..core.file_names import RECORD_NAME
from ..core.finite import all_finite
from ..core.record.schema import ExportFacts, Record
from ..core.rows import Step
from ..core.scheme import BY_ROW, INT8_ROWS, NF4, NF4_BLOCK, Scheme
from ..models.adapter import Adapter, Role
from ..recipe import recorded_recipe
from .findings import Checked, listed, offenders


@dataclass(frozen=True)
class Tensors:
    """A folder of safetensors and what its papers say; `record` is None where it has none."""

    folder: Folder
    config: dict[str, Any]
    adapter: Adapter
    record: Record | None

    @property
    def block(self) -> object | None:
        """config.json's quantization_config."""
        return quantization_block(self.folder.path, self.config)

    @property
    def export(self) -> ExportFacts | None:
        return None if self.record is None else self.record.export


def check_gguf(
    packed: PackedSource, adapter: Adapter, record: Record | None, found: Checked, step: Step | None
) -> None:
    """A GGUF file goes through its own reader; a record says how many of its matrices have which width."""
    folder = packed.folder
    if step is not None:
        step.begin("values")
    zeros = _unpack_all(packed, found)
    if record is not None:
        found.problems += _size_problems(record, adapter, folder)
        if record.export is not None:
            widths = Counter(weight.width for weight in packed.weights.values())
            found.problems += _count_problems(widths, record.export.matrices)
    values = read_values(folder, Stored(plain=dict(folder.infos)), {})
    found.problems += values.problems
    _judge_zeros([*zeros, *values.zeros], adapter, packed.names, record, found)


def check_tensors(tensors: Tensors, found: Checked, step: Step | None) -> None:
    """Layout, widths and values of safetensors."""
    folder, adapter, record, block = tensors.folder, tensors.adapter, tensors.record, tensors.block
    ours = block is None or (isinstance(block, dict) and block.get("quant_method") == ct_config.NAME)
    if tensors.export is not None:
        found.problems += _matrix_problems(folder, block, tensors.export)
    if record is not None:
        found.problems += _size_problems(record, adapter, folder)
    expected: dict[str, tuple[int, ...]] = {}
    zeros: list[str] = []
    names = folder.names
    if block is not None and (record is None or not ours):
        read = _by_reader(folder, block, adapter, found)
        if read is not None:
            zeros, names = _unpack_all(read, found), read.names
        if record is None:
            found.unchecked.append("widths: only what onecard made has a plan to compare them with")
        elif tensors.export is None and read is not None:
            found.problems += _plan_problems(_as_planned(read), record, adapter, set())
        stored = Stored(plain=dict(folder.infos))
    else:
        stored, expected = _by_parts(tensors, block, found)
    if step is not None:
        step.begin("values")
    found.problems += filter(None, [untied_copy(folder, adapter)])
    values = read_values(folder, stored, expected)
    found.problems += values.problems
    _judge_zeros([*zeros, *values.zeros], adapter, names, record, found)


def _judge_zeros(
    zeros: list[str], adapter: Adapter, names: Collection[str], record: Record | None, found: Checked
) -> None:
    """`zeros`: modules, tensors, or matrices of fused tensors that are all zeros. A record knows which of them are so
    in the original, as a pruned model's are; without one nobody here can tell."""
    known = None if record is None else record.model.zero_matrices
    if known is None:
        if zeros:
            found.unchecked.append(
                f"zeros: {listed(zeros)} all zeros. Pruned models have such matrices, and so have damaged files: "
                "`onecard verify` against the original shows which these are"
            )
        return
    faithful = _faithful_zeros(adapter, names, {*known})
    found.problems += [f"{name} is all zeros" for name in zeros if name not in faithful]


def _faithful_zeros(adapter: Adapter, names: Collection[str], known: Collection[str]) -> set[str]:
    """What may be all zeros, since the canonical matrices `known` are so in the original: by the names of modules, of
    their scales, of tensors, and of matrices in fused tensors."""
    modules = {name.removesuffix(".weight") for name in known}
    found = modules | {f"{module}.{ct.SCALE}" for module in modules}
    # A slice of a fused tensor may be zero if all the matrices in it are.
    slices: dict[str, bool] = {}
    for name in adapter.expected() if known else ():
        where = adapter.locate(name, names)
        key = f"{where.tensor}[{where.index[0]}]" if where.index else where.tensor
        slices[key] = slices.get(key, True) and name in known
    return found | {key for key, zero in slices.items() if zero}


def _by_parts(tensors: Tensors, block: object, found: Checked) -> tuple[Stored, dict[str, tuple[int, ...]]]:
    """(what is stored, the shapes that it must have) of compressed-tensors' files, or of dense ones."""
    folder, adapter = tensors.folder, tensors.adapter
    canonical = adapter.expected()
    stored, problems = stored_modules(folder, canonical)
    expected = canonical if stored.schemes or stored.broken else adapter.disk_shapes(folder.names)
    found.problems += problems
    found.problems += shape_problems(stored, expected, adapter.left_aside(folder.names))
    # A missing weight has been named, and has no width.
    packed = {f"{module}.weight" for module in (*stored.schemes, *stored.broken)}
    absent = {name.removesuffix(".weight") for name in expected.keys() - stored.plain.keys() - packed}
    named = stored.broken | absent
    if block is None:
        found.problems += [f"{m} is packed, and config.json has no quantization_config" for m in sorted(stored.schemes)]
    else:
        found.problems += _width_problems(stored, block, adapter, named, found)
    if tensors.record is not None and tensors.export is None:
        found.problems += _plan_problems(stored, tensors.record, adapter, named)
    found.facts["quantized_modules"] = len(stored.schemes)
    return stored, expected


def _by_reader(folder: Folder, block: object, adapter: Adapter, found: Checked) -> PackedSource | None:
    """Another tool's files, and ours in another format than compressed-tensors; None where no reader takes them."""
    found.facts["quantized_modules"] = 0
    if not isinstance(block, dict) or block.get("quant_method") not in READERS:
        method = block.get("quant_method") if isinstance(block, dict) else block
        found.unchecked.append(f"shapes and widths: {method!r} is not read here, {', '.join(READERS)} are")
        return None
    try:
        source = open_packed(folder, block)
        read_as = Stored(plain={name: source.info(name) for name in source.names})
        found.problems += shape_problems(read_as, adapter.disk_shapes(source.names), adapter.left_aside(source.names))
    except InputError as error:
        found.problems += offenders(error)
        return None
    return source


def _as_planned(source: PackedSource) -> Stored:
    """What a reader found, in the schemes that a recipe of ours can name; another width was not planned."""
    known = {str(scheme): scheme for scheme in (Scheme(4, NF4_BLOCK, True, NF4), Scheme(8, BY_ROW, True, INT8_ROWS))}
    schemes = {module: known[width] for module, width in source.schemes.items() if width in known}
    return Stored(schemes, {name: source.info(name) for name in source.names})


def _matrix_problems(folder: Folder, block: object, exported: ExportFacts) -> Iterator[str]:
    """A record of `onecard export` says how many matrices are stored at which width."""
    stored: Counter[str] = Counter()
    if isinstance(block, dict) and block.get("quant_method") in READERS:
        with suppress(InputError):  # _by_reader tells what its reader objects to
            stored = Counter(weight.width for weight in open_packed(folder, block).weights.values())
    yield from _count_problems(stored, exported.matrices)


def _count_problems(stored: Counter[str], wanted: dict[str, int]) -> Iterator[str]:
    for width in sorted({*wanted, *stored}):
        if stored[width] != wanted.get(width, 0):
            yield f"{stored[width]} matrices are stored as {width}, and {RECORD_NAME} says {wanted.get(width, 0)}"


def _unpack_all(source: PackedSource, found: Checked) -> list[str]:
    """Unpack every weight that is stored in parts, once. Returns the names of those that are all zeros."""
    found.facts["quantized_modules"] = len(source.weights)
    zeros = []
    for name, weight in source.weights.items():
        shape = weight.info.shape
        # Fused experts are unpacked one by one.
        for index in [(i,) for i in range(shape[0])] if len(shape) == 3 else [()]:
            try:
                dense = source.dense(name, torch.float32, index)
                if not all_finite(dense):
                    found.problems.append(f"{name}{list(index) or ''} unpacks to numbers that are not finite")
                elif not dense.any():
                    zeros.append(f"{name}{list(index) or ''}")
            except InputError as error:
                found.problems += offenders(error)
    return zeros


def _stored_as(stored: Stored, module: str) -> str:
    info = stored.plain.get(f"{module}.weight")
    return str(stored.schemes.get(module) or (info.dtype if info else "nothing"))


def _at(schemes: dict[str, Scheme], module: str, inputs: int) -> Scheme | None:
    return schemes[module].at(inputs) if module in schemes else None


def _width_problems(stored: Stored, block: Any, adapter: Adapter, named: set[str], found: Checked) -> Iterator[str]:
    """Every Linear module, except those `named` already, is stored as config.json's quantization_config announces."""
    shapes = adapter.expected()
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
    ignored = {str(entry) for entry in block.get("ignore") or [] if not str(entry).startswith("re:")}
    strange = sorted(ignored - {*linears} - {name.rpartition(".")[0] for name in shapes} - {"lm_head"})
    if strange:
        found.unchecked.append(f"widths against config.json: its `ignore` names {strange[0]}, which no file holds")
        return
    for module in sorted({*wanted, *stored.schemes} - named):
        if stored.schemes.get(module) != _at(wanted, module, shapes[f"{module}.weight"][1]):
            said = wanted.get(module) or "as it was"
            yield f"{module} is stored as {_stored_as(stored, module)}, and config.json announces {said}"


def _size_problems(record: Record, adapter: Adapter, folder: Folder) -> Iterator[str]:
    """What the record says of the model and of its bytes."""
    plan, model = record.plan, record.model
    assert plan is not None, "check takes no record without a plan"
    for key, said, value in (
        ("family", model.family, adapter.family),
        ("blocks", model.blocks, adapter.n_blocks),
        ("experts", model.experts, adapter.n_experts),
    ):
        if said != value:
            yield f"{RECORD_NAME} says {key} {said}, and config.json {value}"
    if plan.emitted_bytes != folder.file_bytes:
        yield f"the shards have {folder.file_bytes:,} bytes, and {RECORD_NAME} says {plan.emitted_bytes}"
    if plan.shards is not None and plan.shards != len(folder.shards):
        yield f"there are {len(folder.shards)} shards, and {RECORD_NAME} says {plan.shards}"


def _plan_problems(stored: Stored, record: Record, adapter: Adapter, named: set[str]) -> Iterator[str]:
    """Every module, except those `named` already, has the scheme that the record's recipe gives it."""
    if not record.recipe:
        return
    try:
        wanted = schemes_of(adapter, recorded_recipe(record.recipe))
    except (KeyError, TypeError, ValueError, InputError):
        yield f"the recipe in {RECORD_NAME} does not fit config.json"
        return
    for block in range(adapter.n_blocks):
        for _, module, _, inputs in adapter.modules(block):
            if module not in named and stored.schemes.get(module) != _at(wanted, module, inputs):
                said = wanted.get(module) or "as it was"
                yield f"{module} is stored as {_stored_as(stored, module)}, and {RECORD_NAME} says {said}"
