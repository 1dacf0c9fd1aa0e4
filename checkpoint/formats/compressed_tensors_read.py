"""compressed-tensors, read: folders that llm-compressor and other tools write, as dense weights.

`compressed_tensors_write` writes one scheme, packed integers in groups. Other tools mix config groups and widths. They
use one scale for a whole row or tensor, order columns by `weight_g_idx`, add zero points, or store codes one by one:
int8 or fp8 under the weight's own name (`int-quantized`, `float-quantized`, `naive-quantized`), with one scale per
tensor, row, group or block.

A module belongs to a config group whose targets match it and whose layout the stored shapes agree with. Refused:
other layouts (nvfp4, mxfp4, 2:4 sparse, marlin), rotated weights, and folders saved uncompressed, which are rounded
only when they run.

Specification: compressed-tensors, `compressors/pack_quantized` and `naive_quantized`, `quantization/lifecycle`.
Shape legend: O outputs, I inputs, G groups along I.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import BY_ROW, Scheme
from ...core.tensors import TensorInfo
from ..source import Folder
from .compressed_tensors_config import NAME, PACK, Group, read_groups
from .compressed_tensors_write import PACKED, SCALE, SHAPE, ZERO
from .packing import unpack_columns, words_for
from .scales import scaled, spread, spreads
from .stored_weight import FLOATS, Reading, StoredWeight, integer_scheme, missing

ORDER, PLAIN = "weight_g_idx", "weight"
PLAIN_DTYPES = {"int": ("I8",), "float": ("F8_E4M3", "F8_E5M2")}
# Tensors of activations and of the key-value cache.
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


def unpack(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of compressed_tensors_write.pack, bit for bit."""
    outputs, inputs = stored[SHAPE].tolist()
    return quantized_packed(stored, scheme=scheme, shape=(outputs, inputs))


def dense_packed(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, bits: int, shape: tuple[int, int]
) -> torch.Tensor:
    """The weight [O, I] of packed codes. Raises ValueError when `weight_shape` or `weight_g_idx` contradicts them."""
    _check_shape(parts, shape)
    codes = unpack_from_int32(parts[PACKED], bits, torch.Size(shape))
    scales = parts[SCALE].view(-1, 1) if parts[SCALE].ndim < 2 else parts[SCALE]
    zeros = parts.get(ZERO)
    if zeros is not None and zeros.dtype is torch.int32:  # packed along the outputs
        zeros = unpack_columns(zeros, bits, shape[0])
    elif zeros is not None:
        zeros = zeros.view(scales.shape)
    groups = scales.shape[1]
    order = parts.get(ORDER)
    group_of = None
    if order is not None and not bool((order == -1).all()):  # -1 throughout means that there is no order
        group_of = order.long()
        if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise ValueError(f"{ORDER} names groups {int(group_of.min())} to {int(group_of.max())} of {groups}")
    return scaled(codes, scales, zeros, group_of, dtype)


def quantized_packed(parts: Mapping[str, torch.Tensor], *, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Codes [O, I], scales [O, G] and zero points [O, G] of packed codes. Raises ValueError when `weight_shape`
    contradicts them."""
    _check_shape(parts, shape)
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    # The file may hold one scale for a row, or one for all rows.
    scales = parts[SCALE].reshape(-1, groups).expand(outputs, groups).contiguous()
    zeros = parts.get(ZERO)
    if zeros is not None and zeros.dtype is torch.int32:  # packed along the outputs
        zeros = unpack_columns(zeros, scheme.bits, outputs)
    elif zeros is not None:
        zeros = zeros.reshape(-1, groups).expand(outputs, groups).contiguous()
    return QuantizedWeight(unpack_from_int32(parts[PACKED], scheme.bits, torch.Size(shape)), scales, zeros, scheme)


def _check_shape(parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> None:
    if tuple(parts[SHAPE].tolist()) != shape:
        raise ValueError(f"{SHAPE} says {parts[SHAPE].tolist()}, and the codes are {list(shape)}")


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
    """Every packed weight, and every weight that is stored as int8 or fp8."""
    reading = Reading(NAME)
    try:
        groups = read_groups(block)
    except Exception as error:  # pydantic's errors and the package's own
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
            "an engine quantizes its activations too when it runs: the figures here measure the weights alone"
        )
    if block.get("kv_cache_scheme"):
        reading.warnings.append(
            "an engine quantizes its key-value cache when it runs: the figures here measure the weights alone"
        )
    return reading


def _weight(stem: str, packed: bool, folder: Folder, groups: list[Group]) -> StoredWeight:
    """Read the weight by the first matching group that its tensors agree with; the narrowest targets come first."""
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
    detail = "; ".join(reasons) or f"none is stored {'packed' if packed else 'plainly'}"
    raise ValueError(f"is not stored as any group of config.json says: {detail}")


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
    shape = _packed_shape(stem, folder, group)
    scale = infos[f"{stem}.{SCALE}"]
    _check_companions(stem, infos, group, shape)
    size = group.group_size if group.strategy == "group" else BY_ROW
    scheme = integer_scheme(group.bits, size, group.symmetric) if ORDER not in leaves else None
    return StoredWeight(
        info=TensorInfo(shape, scale.dtype),
        width=_width(group),
        parts={leaf: f"{stem}.{leaf}" for leaf in leaves},
        decode=partial(dense_packed, bits=group.bits, shape=shape),
        scheme=scheme,
        codes=None if scheme is None else partial(quantized_packed, scheme=scheme, shape=shape),
    )


def _packed_shape(stem: str, folder: Folder, group: Group) -> tuple[int, int]:
    """(outputs, inputs) of a packed weight. Raises ValueError when codes and scales do not fit the group."""
    infos = folder.infos
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
        allowed: set[tuple[int, ...]] = {(outputs, inputs // group.group_size)}
    elif group.strategy == "block":
        raise ValueError("has blocks, which are not packed")
    else:
        inputs = int(folder.get(f"{stem}.{SHAPE}")[1])  # the last word of a row may be partly empty
        allowed = {(outputs, 1), (outputs,)} if group.strategy == "channel" else {(1,), (1, 1), ()}
    if scale.shape not in allowed or inputs < 1 or codes.shape[1] != words_for(inputs, group.bits):
        raise ValueError(f"has codes {list(codes.shape)} and scales {list(scale.shape)}")
    return outputs, inputs


def _check_companions(stem: str, infos: Mapping[str, TensorInfo], group: Group, shape: tuple[int, int]) -> None:
    """Raises ValueError when zero points or an order of columns do not fit the group."""
    outputs, inputs = shape
    codes, scale = infos[f"{stem}.{PACKED}"], infos[f"{stem}.{SCALE}"]
    zero, order = infos.get(f"{stem}.{ZERO}"), infos.get(f"{stem}.{ORDER}")
    if group.symmetric == (zero is not None):
        raise ValueError(f"has {'no' if zero is None else 'a'} {ZERO}")
    if zero is not None:
        columns = scale.shape[-1] if len(scale.shape) == 2 else 1
        along_outputs = TensorInfo((words_for(outputs, group.bits), columns), "I32")
        if zero != along_outputs and zero != TensorInfo(scale.shape, "I8"):
            raise ValueError(
                f"has codes {list(codes.shape)} and scales {list(scale.shape)}, and {ZERO} {zero.dtype} "
                f"{list(zero.shape)}"
            )
    if order is not None and (order != TensorInfo((inputs,), "I32") or group.strategy != "group"):
        raise ValueError(f"has {ORDER} {list(order.shape)} for {inputs} inputs")


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
        info=TensorInfo(codes.shape, scale.dtype),
        width=_width(group),
        parts={leaf: f"{stem}.{leaf}" for leaf in leaves},
        decode=partial(dense_plain, block=group.block),
    )
