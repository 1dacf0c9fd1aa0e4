"""GPTQ's layout, read: what AutoGPTQ, GPTQModel and transformers write.

A Linear `[out, in]` is `qweight` int32 `[in * bits / 32, out]` (fields packed along the inputs, lowest first), `qzeros`
int32 `[groups, out * bits / 32]` (packed along the outputs), `scales` `[groups, out]` and `g_idx` int32 `[in]`, the
group of each input. The weight is `(q - z) * scale`. Version 1 (`checkpoint_format: gptq`, or none) stores each zero
point minus 1; version 2 (`gptq_v2`) stores it unchanged. Widths are 2, 3, 4 and 8 bits.

Not read: formats for a single kernel (marlin, bitblas), and AWQ's order of fields.

Specification: AutoGPTQ `qlinear_cuda_old.py`, GPTQModel `nn_modules/qlinear` and its conversion between the versions.
Shape legend: O outputs, I inputs, G groups along I.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import BY_ROW, Scheme
from ...core.tensors import TensorInfo
from ..source import Folder
from .packing import BITS_A_WORD, unpack_columns, words_for
from .scales import scaled
from .stored_weight import FLOATS, Reading, StoredWeight, integer_scheme, missing

NAME = "gptq"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
WIDTHS = (2, 3, 4, 8)


def dense(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, bits: int, version: int) -> torch.Tensor:
    """The weight [O, I]. Raises ValueError when `g_idx` names a group that does not exist."""
    scales_GO = parts["scales"]
    groups, outputs = scales_GO.shape
    codes_OI = _codes(parts["qweight"], bits)
    inputs = codes_OI.shape[1]
    zeros_GO = zero_points(parts["qzeros"], bits, outputs, version)
    even = torch.arange(inputs, device=codes_OI.device) // -(-inputs // groups)
    group_of = parts["g_idx"].long() if "g_idx" in parts else even
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ValueError(f"g_idx names groups {int(group_of.min())} to {int(group_of.max())} of {groups}")
    plain = inputs % groups == 0 and torch.equal(group_of, even)
    return scaled(codes_OI, scales_GO.T, zeros_GO.T, None if plain else group_of, dtype)


def quantized(parts: Mapping[str, torch.Tensor], *, scheme: Scheme, version: int) -> QuantizedWeight:
    """Signed codes [O, I], scales [O, G] and zero points [O, G].

    Raises ValueError when `g_idx` orders the groups in another way, and for zero points in a symmetric scheme.
    """
    scales_GO = parts["scales"]
    groups, outputs = scales_GO.shape
    codes_OI = _codes(parts["qweight"], scheme.bits).contiguous()
    inputs = codes_OI.shape[1]
    if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), torch.arange(inputs) // (inputs // groups)):
        raise ValueError("g_idx gives its groups an order of their own")
    zeros_OG = zero_points(parts["qzeros"], scheme.bits, outputs, version).T.contiguous()
    if scheme.symmetric and bool(zeros_OG.any()):
        raise ValueError("it is announced as symmetric (sym), and has zero points")
    return QuantizedWeight(codes_OI, scales_GO.T.contiguous(), None if scheme.symmetric else zeros_OG, scheme)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """qweight -> int8 codes [O, I]: the stored unsigned field minus half its range."""
    return unpack_columns(words, bits, words.shape[0] * BITS_A_WORD // bits).T


def zero_points(words: torch.Tensor, bits: int, outputs: int, version: int) -> torch.Tensor:
    """qzeros -> int8 zero points [G, outputs]: the unsigned zero point minus half its range, as for the codes.

    For version 1 the 1 is added to whole words, because GPTQModel subtracts it from whole words: a zero point of 0
    borrows from the field above, and gets the 1 back here. Readers that add the 1 field by field differ in that case
    only. A field of three bits may cross two words, so its 1 is added field by field.
    """
    whole_fields = BITS_A_WORD % bits == 0
    if version == 1 and whole_fields:
        words = words + sum(1 << at for at in range(0, BITS_A_WORD, bits))
    zeros_GO: torch.Tensor = unpack_from_int32(words, bits, torch.Size((words.shape[0], outputs)))
    if version == 1 and not whole_fields:
        half = 1 << (bits - 1)
        zeros_GO = (zeros_GO + half + 1) % (1 << bits) - half
    return zeros_GO


def find(folder: Folder, block: Mapping[str, Any]) -> Reading:
    """Every `X.qweight` with its companions, as `X.weight`."""
    stored_as = block.get("checkpoint_format") or block.get("format") or "gptq"
    reading = Reading(f"{NAME} version {VERSIONS.get(stored_as, '?')}")
    bits = block.get("bits")
    if stored_as not in VERSIONS or block.get("is_marlin_format"):
        reading.problems.append(
            f"config.json has checkpoint_format {stored_as!r}, which is made for one kernel: {', '.join(VERSIONS)} are "
            "read"
        )
    if bits not in WIDTHS:
        reading.problems.append(f"config.json has bits {bits!r}: {', '.join(map(str, WIDTHS))} are read")
    if block.get("pack_dtype") not in (None, "int32"):
        reading.problems.append(f"config.json has pack_dtype {block['pack_dtype']!r}: int32 is read")
    if reading.problems:
        return reading
    for name in folder.names:
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            try:
                weight = _weight(stem, folder.infos, block, VERSIONS[stored_as])
            except ValueError as error:
                reading.problems.append(f"{stem} {error}")
            else:
                reading.weights[f"{stem}.weight"] = weight
    return reading


def _weight(stem: str, infos: Mapping[str, TensorInfo], block: Mapping[str, Any], version: int) -> StoredWeight:
    lacking = missing(stem, (".qzeros", ".scales"), infos)
    if lacking:
        raise ValueError(lacking)
    names = {leaf: f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{leaf}" in infos}
    shapes = {leaf: infos[name].shape for leaf, name in names.items()}
    dtypes = {leaf: infos[name].dtype for leaf, name in names.items()}
    found = ", ".join(f"{leaf} {dtypes[leaf]} {list(shape)}" for leaf, shape in shapes.items())
    if any(dtype != "I32" for leaf, dtype in dtypes.items() if leaf != "scales") or dtypes["scales"] not in FLOATS:
        raise ValueError(f"has {found}: codes, zeros and g_idx must be I32, scales {', '.join(FLOATS)}")
    block = dict(block) | override(block, stem)
    # A rule of GPTQModel's `dynamic` may change a module's width; then the shapes show which it is.
    for bits in WIDTHS if block.get("dynamic") else (int(block["bits"]),):
        if _fits(shapes, bits, block):
            groups, outputs = shapes["scales"]
            inputs = shapes["qweight"][0] * BITS_A_WORD // bits
            size = "one group" if groups == 1 else f"group {-(-inputs // groups)}"
            # With desc_act the inputs of a group are scattered, unless the groups were fixed first (static_groups).
            neighbours = inputs % groups == 0 and (not block.get("desc_act") or bool(block.get("static_groups")))
            group = BY_ROW if block.get("group_size", BY_ROW) in (BY_ROW, None) else inputs // groups
            scheme = integer_scheme(bits, group, block.get("sym") is True) if neighbours else None
            return StoredWeight(
                info=TensorInfo((outputs, inputs), dtypes["scales"]),
                width=f"int{bits} {size}",
                parts=names,
                decode=partial(dense, bits=bits, version=version),
                scheme=scheme,
                codes=None if scheme is None else partial(quantized, scheme=scheme, version=version),
            )
    raise ValueError(f"has {found}, which {block['bits']} bits in groups of {block.get('group_size')} do not give")


def override(block: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The settings of the first rule in `dynamic` that matches a module; empty for a rule that leaves it unquantized.

    Raises ValueError for a rule that is no valid expression.
    """
    for rule, fields in (block.get("dynamic") or {}).items():
        try:
            if re.match(rule.removeprefix("+:").removeprefix("-:"), module):
                return dict(fields) if not rule.startswith("-:") else {}
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(f"meets the rule {rule!r} of `dynamic`, which is invalid ({error})") from None
    return {}


def _fits(shapes: Mapping[str, tuple[int, ...]], bits: int, block: Mapping[str, Any]) -> bool:
    """Whether the shapes are those of `bits` bits in the announced groups."""
    if any(len(shape) != (1 if leaf == "g_idx" else 2) for leaf, shape in shapes.items()):
        return False
    (rows, outputs), (groups, _) = shapes["qweight"], shapes["scales"]
    inputs, left = divmod(rows * BITS_A_WORD, bits)
    size = block.get("group_size", -1)
    announced = 1 if size in (-1, None) else -(-inputs // size) if isinstance(size, int) and size > 0 else None
    return (
        left == 0
        and groups > 0
        and (bool(block.get("dynamic")) or groups == announced)
        and shapes["scales"] == (groups, outputs)
        and shapes["qzeros"] == (groups, words_for(outputs, bits))
        and shapes.get("g_idx", (inputs,)) == (inputs,)
    )
