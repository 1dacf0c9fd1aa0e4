"""compressed-tensors as anybody writes it: what llm-compressor and its like leave in a folder, read as dense weights.

`compressed_tensors.py` writes one scheme, packed int in groups. Others mix config groups and widths, give a scale to a
whole row or tensor, order columns by `weight_g_idx`, have zero points, or store codes plainly: int8 or fp8 under the
weight's own name (`int-quantized`, `float-quantized`, `naive-quantized`), with a scale a tensor, row, group or block.

The config block is validated by the package's own classes; which of its groups a module belongs to is asked of its
targets, and settled by the shapes that are stored. Refused: layouts that are not these (nvfp4, mxfp4, 2:4 sparse,
marlin), weights that were rotated, and folders saved uncompressed, whose rounding happens when they run.

Specification: compressed-tensors, `compressors/pack_quantized` and `naive_quantized`, `quantization/lifecycle`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...core.scheme import BY_ROW, QuantizedWeight, Scheme
from ...core.tensors import TensorInfo
from ..source import Folder
from .compressed_tensors_config import NAME, PACK, Group, read_groups
from .compressed_tensors_write import PACKED, SCALE, SHAPE, ZERO, unpack_words
from .stored_weight import (
    FLOATS,
    Reading,
    StoredWeight,
    integer_scheme,
    missing,
    scaled,
    spread,
    spreads,
    unpack_fields,
    words_for,
)

ORDER, PLAIN = "weight_g_idx", "weight"
PLAIN_DTYPES = {"int": ("I8",), "float": ("F8_E4M3", "F8_E5M2")}
# Of activations and of the key-value cache.
ASIDE = (
    "input_scale",
    "input_zero_point",
    "input_g_idx",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
    "k_zero_point",
    "v_zero_point",
)


def dense_packed(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, bits: int, shape: tuple[int, int]
) -> torch.Tensor:
    """The weight [O, I] of packed codes. Raises ValueError when `weight_shape` or `weight_g_idx` contradicts them."""
    if tuple(parts[SHAPE].tolist()) != shape:
        raise ValueError(f"{SHAPE} says {parts[SHAPE].tolist()}, and the codes are {list(shape)}")
    outputs, inputs = shape
    half = 1 << (bits - 1)
    codes = unpack_fields(parts[PACKED], bits, inputs) - half
    scales = parts[SCALE].view(-1, 1) if parts[SCALE].ndim < 2 else parts[SCALE]
    zeros = parts.get(ZERO)
    if zeros is not None and zeros.dtype is torch.int32:  # packed along the outputs
        zeros = unpack_fields(zeros.T.contiguous(), bits, outputs).T - half
    elif zeros is not None:
        zeros = zeros.view(scales.shape)
    groups = scales.shape[1]
    order = parts.get(ORDER)
    group_of = None
    if order is not None and not bool((order == -1).all()):  # -1 throughout: there is a place for it and no order
        group_of = order.long()
        if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise ValueError(f"{ORDER} names groups {int(group_of.min())} to {int(group_of.max())} of {groups}")
    return scaled(codes, scales, zeros, group_of, dtype)


def quantized_packed(parts: Mapping[str, torch.Tensor], *, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """The codes [O, I], scales [O, G] and zero points of packed codes. Raises ValueError when
    `weight_shape` contradicts them."""
    if tuple(parts[SHAPE].tolist()) != shape:
        raise ValueError(f"{SHAPE} says {parts[SHAPE].tolist()}, and the codes are {list(shape)}")
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    # One scale may stand for a row, or for all of them.
    scales = parts[SCALE].reshape(-1, groups).expand(outputs, groups).contiguous()
    zeros = parts.get(ZERO)
    if zeros is not None and zeros.dtype is torch.int32:
        zeros = unpack_words(zeros.T.contiguous(), scheme.bits, outputs).T.contiguous()
    elif zeros is not None:
        zeros = zeros.reshape(-1, groups).expand(outputs, groups).contiguous()
    return QuantizedWeight(unpack_words(parts[PACKED], scheme.bits, inputs), scales, zeros, scheme)


def dense_plain(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, block: tuple[int, int]) -> torch.Tensor:
    """The weight [O, I] of codes that are stored one by one."""
    codes = parts[PLAIN].to(torch.float32)

    def over(part: torch.Tensor) -> torch.Tensor:
        value = part.to(torch.float32)
        return spread(value.view(*value.shape, *(1,) * (2 - value.ndim)), tuple(codes.shape), block)

    if ZERO in parts:
        codes = codes - over(parts[ZERO])
    return (codes * over(parts[SCALE])).to(dtype)


def find(folder: Folder, block: Mapping[str, Any]) -> Reading:
    """Every packed weight, and every weight stored as int8 or fp8."""
    reading = Reading(NAME)
    try:
        groups = read_groups(block)
    except Exception as error:  # the package raises pydantic's and its own kinds
        reading.problems.append(f"config.json: its quantization_config is not understood: {error}")
        return reading
    reading.label = " and ".join([NAME, *sorted({group.format for group in groups})]).replace(" and ", " ", 1)
    plain = tuple(dtype for dtypes in PLAIN_DTYPES.values() for dtype in dtypes)
    for name, info in folder.infos.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ASIDE:
            reading.aside.add(name)
        elif leaf == PACKED or (leaf == PLAIN and info.dtype in plain):
            try:
                reading.weights[f"{stem}.{PLAIN}"] = _weight(stem, leaf == PACKED, folder, groups)
            except ValueError as error:
                reading.problems.append(f"{stem} {error}")
    schemes = [scheme for scheme in block["config_groups"].values() if isinstance(scheme, dict)]
    if any(scheme.get("input_activations") for scheme in schemes):
        reading.warnings.append(
            "its activations are quantized too when an engine runs it: what is measured is the weights alone"
        )
    if block.get("kv_cache_scheme"):
        reading.warnings.append(
            "its key-value cache is quantized when an engine runs it: what is measured is the weights alone"
        )
    return reading


def _weight(stem: str, packed: bool, folder: Folder, groups: list[Group]) -> StoredWeight:
    """By the first of the groups that aim at the module, narrowest first, that its tensors agree with."""
    lacking = missing(stem, tuple(f".{leaf}" for leaf in ((SCALE, SHAPE) if packed else (SCALE,))), folder.infos)
    if lacking:
        raise ValueError(lacking)
    fitting = [group for group in groups if (group.format == PACK) == packed]
    aimed = sorted((group for group in fitting if group.aims_at(stem)), key=lambda group: -group.aims_at(stem))
    reasons = []
    for group in aimed or fitting:
        try:
            return (_packed if packed else _plain)(stem, folder, group)
        except ValueError as error:
            reasons.append(f"{group.name} ({error})")
    told = "; ".join(reasons) or f"none is stored {'packed' if packed else 'plainly'}"
    raise ValueError(f"is stored as no group of config.json announces: {told}")


def _width(group: Group) -> str:
    over = {
        "tensor": "one scale",
        "channel": "by row",
        "group": f"group {group.group_size}",
        "block": f"block {group.block[0]}x{group.block[1]}",
    }[group.strategy]
    return f"{'fp' if group.type == 'float' else 'int'}{group.bits} {over}" + ("" if group.symmetric else " asymmetric")


def _packed(stem: str, folder: Folder, group: Group) -> StoredWeight:
    infos = folder.infos
    leaves = [leaf for leaf in (PACKED, SCALE, SHAPE, ZERO, ORDER) if f"{stem}.{leaf}" in infos]
    codes, scale = infos[f"{stem}.{PACKED}"], infos[f"{stem}.{SCALE}"]
    if codes.dtype != "I32" or scale.dtype not in FLOATS:
        raise ValueError(f"has codes of {codes.dtype} and scales of {scale.dtype}")
    if infos[f"{stem}.{SHAPE}"] != TensorInfo((2,), "I64"):
        raise ValueError(f"has {SHAPE} {infos[f'{stem}.{SHAPE}']}")
    if len(codes.shape) != 2:
        raise ValueError(f"has codes {list(codes.shape)}")
    outputs = codes.shape[0]
    if group.strategy == "group":
        inputs = group.group_size * scale.shape[-1] if len(scale.shape) == 2 else 0
        rows: set[tuple[int, ...]] = {(outputs, inputs // group.group_size)}
    elif group.strategy == "block":
        raise ValueError("has blocks, which are not packed")
    else:
        inputs = int(folder.get(f"{stem}.{SHAPE}")[1])  # a row of words does not tell where it ends
        rows = {(outputs, 1), (outputs,)} if group.strategy == "channel" else {(1,), (1, 1), ()}
    told = f"has codes {list(codes.shape)} and scales {list(scale.shape)}"
    if scale.shape not in rows or inputs < 1 or codes.shape[1] != words_for(inputs, group.bits):
        raise ValueError(told)
    if group.symmetric == (ZERO in leaves):
        raise ValueError(f"has {'a' if ZERO in leaves else 'no'} {ZERO}")
    if ZERO in leaves:
        zero = infos[f"{stem}.{ZERO}"]
        along_outputs = TensorInfo(
            (words_for(outputs, group.bits), scale.shape[-1] if len(scale.shape) == 2 else 1), "I32"
        )
        if zero != along_outputs and zero != TensorInfo(scale.shape, "I8"):
            raise ValueError(f"{told}, and {ZERO} {zero.dtype} {list(zero.shape)}")
    if ORDER in leaves and (infos[f"{stem}.{ORDER}"] != TensorInfo((inputs,), "I32") or group.strategy != "group"):
        raise ValueError(f"has {ORDER} {list(infos[f'{stem}.{ORDER}'].shape)} for {inputs} inputs")
    size = group.group_size if group.strategy == "group" else BY_ROW
    scheme = integer_scheme(group.bits, size, group.symmetric) if ORDER not in leaves else None
    return StoredWeight(
        TensorInfo((outputs, inputs), scale.dtype),
        _width(group),
        {leaf: f"{stem}.{leaf}" for leaf in leaves},
        partial(dense_packed, bits=group.bits, shape=(outputs, inputs)),
        scheme=scheme,
        codes=None if scheme is None else partial(quantized_packed, scheme=scheme, shape=(outputs, inputs)),
    )


def _plain(stem: str, folder: Folder, group: Group) -> StoredWeight:
    infos = folder.infos
    leaves = [leaf for leaf in (PLAIN, SCALE, ZERO) if f"{stem}.{leaf}" in infos]
    codes, scale = infos[f"{stem}.{PLAIN}"], infos[f"{stem}.{SCALE}"]
    if codes.dtype not in PLAIN_DTYPES[group.type] or len(codes.shape) != 2 or scale.dtype not in FLOATS:
        raise ValueError(f"has {codes.dtype} {list(codes.shape)} and scales of {scale.dtype}")
    rows, columns = codes.shape
    allowed: dict[str, set[tuple[int, ...]]] = {
        "tensor": {(), (1,), (1, 1)},
        "channel": {(rows,), (rows, 1)},
        "group": {(rows, columns // max(1, group.group_size))} if columns % max(1, group.group_size) == 0 else set(),
        "block": {(-(-rows // group.block[0]), -(-columns // group.block[1]))},
    }
    if scale.shape not in allowed[group.strategy]:
        raise ValueError(f"is {list(codes.shape)} with scales {list(scale.shape)}")
    zero = infos.get(f"{stem}.{ZERO}")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"has scales {list(scale.shape)} and {ZERO} {list(zero.shape)}")
    if zero is None and not group.symmetric:
        raise ValueError(f"has no {ZERO}")
    assert spreads((*scale.shape, *(1,) * (2 - len(scale.shape))), codes.shape, group.block)
    return StoredWeight(
        TensorInfo(codes.shape, scale.dtype),
        _width(group),
        {leaf: f"{stem}.{leaf}" for leaf in leaves},
        partial(dense_plain, block=group.block),
    )


def unpack(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of pack, bit for bit."""
    outputs, inputs = stored[SHAPE].tolist()
    zero = None
    if not scheme.symmetric:
        zero = unpack_words(stored[ZERO].T.contiguous(), scheme.bits, outputs).T.contiguous()
    return QuantizedWeight(unpack_words(stored[PACKED], scheme.bits, inputs), stored[SCALE], zero, scheme)
