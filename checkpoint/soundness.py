"""What is wrong with the tensors of a checkpoint folder: first their layout from headers, then every value, read once.

A packed weight must have all its parts, in the shapes that its scheme and config.json require. A plain tensor must have
the promised shape. All floats must be finite, and a matrix of zeros is told: an expert of zeros loads, runs and
answers. A damaged tensor raises nothing; each problem is one line, so that a report can list them all.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from ..core.scheme import Scheme
from ..core.tensors import TORCH_DTYPES, TensorInfo
from .formats import compressed_tensors_read as ct_read
from .formats import compressed_tensors_write as ct
from .formats.packing import BITS_A_WORD
from .source import INDEX_NAME, Folder
from .source_checks import pieces

PARTS = (ct.PACKED, ct.SCALE, ct.SHAPE, ct.ZERO)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Stored:
    """A folder's tensors, sorted into packed modules and plain tensors."""

    schemes: dict[str, Scheme] = field(default_factory=dict)
    plain: dict[str, TensorInfo] = field(default_factory=dict)
    # Packed modules whose parts do not fit together.
    broken: set[str] = field(default_factory=set)


def index_problems(folder: Folder) -> Iterator[str]:
    """Tensors for which index and headers disagree; a loader would not find them."""
    path = folder.path / INDEX_NAME
    if not path.exists():
        return
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    for name, (shard, _) in sorted(folder.offsets.items()):
        if name not in weight_map:
            yield f"{name} is in {shard.name} and not in {INDEX_NAME}"
        elif weight_map[name] != shard.name:
            yield f"{name} is in {shard.name}, and {INDEX_NAME} says {weight_map[name]}"


def stored_modules(folder: Folder, expected: Shapes) -> tuple[Stored, list[str]]:
    """Sort the tensors by name, with one line for each problem. A packed weight's scheme follows from its parts and its
    promised shape."""
    found, problems = Stored(), []
    modules: dict[str, set[str]] = {}
    for name, info in folder.infos.items():
        module, _, leaf = name.rpartition(".")
        if leaf in PARTS:
            modules.setdefault(module, set()).add(leaf)
        else:
            found.plain[name] = info
    for module in sorted(modules):
        scheme = _scheme(folder, module, modules[module], expected)
        if isinstance(scheme, Scheme):
            found.schemes[module] = scheme
        else:
            found.broken.add(module)
            problems += scheme
    return found, problems


def _scheme(folder: Folder, module: str, parts: Collection[str], expected: Shapes) -> Scheme | list[str]:
    """The scheme of one packed weight, or what is wrong with it."""
    weight = f"{module}.weight"
    problems = [f"{module}.{part} is missing" for part in (ct.PACKED, ct.SCALE, ct.SHAPE) if part not in parts]
    if weight not in expected or len(expected[weight]) != 2:
        problems.append(f"{module} is packed, and config.json knows no such matrix")
    if weight in folder.infos:
        problems.append(f"{module} is stored twice, packed and unpacked")
    if problems:
        return problems
    (outputs, inputs), codes = expected[weight], folder.infos[f"{module}.{ct.PACKED}"].shape
    scales = folder.infos[f"{module}.{ct.SCALE}"]
    widths = [bits for bits in (4, 8) if codes == (outputs, -(-inputs * bits // 32))]
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    if not widths:
        return [f"{module}.{ct.PACKED} is {list(codes)}, and config.json says a weight of {[outputs, inputs]}"]
    if groups == 0 or inputs % groups:
        return [f"{module}.{ct.SCALE} is {list(scales.shape)}, and config.json says a weight of {[outputs, inputs]}"]
    try:
        scheme = Scheme(widths[0], inputs // groups, ct.ZERO not in parts)
    except ValueError as error:
        return [f"{module}: {error}"]
    for part, wanted in ct.layout(scheme, outputs, inputs, scales.dtype).items():
        info = folder.infos[f"{module}.{part}"]
        if (info.dtype, info.shape) != wanted:
            problems.append(
                f"{module}.{part} is {info.dtype} {list(info.shape)}, and must be {wanted[0]} {list(wanted[1])}"
            )
    if not TORCH_DTYPES[scales.dtype].is_floating_point:
        problems.append(f"{module}.{ct.SCALE} is stored as {scales.dtype}")
    return problems or scheme


def shape_problems(stored: Stored, expected: Shapes, left_aside: Collection[str]) -> Iterator[str]:
    """Promised tensors that are missing or have another shape, and tensors that config.json does not promise and that
    are not `left_aside`."""
    packed = {f"{module}.weight" for module in (*stored.schemes, *stored.broken)}
    for name in sorted(expected):
        if name in packed:
            continue
        if name not in stored.plain:
            yield f"{name} is missing"
        elif stored.plain[name].shape != expected[name]:
            yield f"{name} is {list(stored.plain[name].shape)}, and config.json says {list(expected[name])}"
    for name in sorted(stored.plain.keys() - expected.keys() - {*left_aside}):
        yield f"{name} is in the folder and config.json knows no such tensor"


@dataclass
class ReadValues:
    """What reading every value found: a line for each problem, and the names of what is all zeros, which only somebody
    who knows the original can judge. `X[3]` is the matrix of expert 3 in the fused tensor X."""

    problems: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)


def read_values(folder: Folder, stored: Stored, expected: Shapes) -> ReadValues:
    """Read every tensor, in the order of the files: non-finite values, zeros, and wrong stored shapes."""
    found = ReadValues()
    for name in sorted(folder.infos, key=lambda n: (folder.offsets[n][0].name, folder.offsets[n][1])):
        module, _, leaf = name.rpartition(".")
        if leaf == ct.SHAPE and module in stored.schemes:
            said = folder.get(name).tolist()
            if tuple(said) != expected[f"{module}.weight"]:
                found.problems.append(f"{name} says {said}, and config.json {list(expected[f'{module}.weight'])}")
        elif leaf == ct.PACKED and module in stored.schemes:
            if _zero_codes(folder, module, stored.schemes[module]):
                found.zeros.append(module)
        elif TORCH_DTYPES[folder.infos[name].dtype].is_floating_point:
            _read_floats(folder, name, found, is_scale=leaf == ct.SCALE)
    return found


def _read_floats(folder: Folder, name: str, found: ReadValues, is_scale: bool) -> None:
    """NaN, Inf, and matrices or scales that are all zeros. Fused experts are a stack of matrices, tested one by one."""
    shape = folder.infos[name].shape
    stacked = len(shape) == 3
    nan = inf = seen = 0
    zero: list[int] = []
    for first, part in pieces(folder, name):
        values = part.float() if part.dtype.itemsize == 1 else part  # torch cannot sum fp8
        matrices = values if stacked else values[None]
        sums = matrices.flatten(1).sum(1, dtype=torch.float64)
        seen += len(matrices)
        # A sum of finite bf16 values in fp64 is finite. A sum that is not zero also rules out a matrix of zeros.
        if not torch.isfinite(sums).all():
            nan += int(torch.isnan(values).sum())
            inf += int(torch.isinf(values).sum())
        zero += [first + i for i in (sums == 0).nonzero().flatten().tolist() if not matrices[i].any()]
    if nan or inf:
        found.problems.append(f"{name} holds {nan} NaN, {inf} Inf")
    if stacked:
        found.zeros += [f"{name}[{index}]" for index in zero]
    elif (len(shape) > 1 or is_scale) and seen and len(zero) == seen:
        found.zeros.append(name)


def _zero_codes(folder: Folder, module: str, scheme: Scheme) -> bool:
    """Whether every code is the one for zero; scales do not matter."""
    words = folder.get(f"{module}.{ct.PACKED}")
    if scheme.symmetric:
        zero_word = pack_to_int32(torch.zeros(1, BITS_A_WORD // scheme.bits, dtype=torch.int8), scheme.bits)
        return not bool((words != zero_word).any())
    parts = {part: folder.get(f"{module}.{part}") for part in (ct.SCALE, ct.ZERO)}
    parts |= {ct.PACKED: words, ct.SHAPE: folder.get(f"{module}.{ct.SHAPE}")}
    weight = ct_read.unpack(parts, scheme)
    assert weight.zero_points is not None
    grouped = weight.codes.unflatten(-1, (weight.scales.shape[-1], -1))
    return not bool((grouped != weight.zero_points.unsqueeze(-1)).any())
