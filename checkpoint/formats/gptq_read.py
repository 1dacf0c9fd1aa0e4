"""GPTQ's layout, as AutoGPTQ, GPTQModel and transformers write and read it.

A Linear `[out, in]` is `qweight` int32 `[in * bits / 32, out]` (fields packed along the inputs, lowest first), `qzeros`
int32 `[groups, out * bits / 32]` (packed along the outputs), `scales` `[groups, out]` and `g_idx` int32 `[in]`, each
input's group; the weight is `(q - z) * scale`. Version 1 (`checkpoint_format: gptq`, or nothing said) stores each zero
point less 1; version 2 (`gptq_v2`) stores it plainly. Widths 2, 3, 4 and 8.

Not read: formats that are made for one kernel (marlin, bitblas), and AWQ's order of fields.

Specification: AutoGPTQ `qlinear_cuda_old.py`, GPTQModel `nn_modules/qlinear` and its conversion between the versions.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...core.scheme import BY_ROW, QuantizedWeight, Scheme
from ...core.tensors import TensorInfo
from ..source import Folder
from .stored_weight import (
    BITS_A_WORD,
    FLOATS,
    Reading,
    StoredWeight,
    integer_scheme,
    missing,
    scaled,
    unpack_fields,
    words_for,
)

NAME = "gptq"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
WIDTHS = (2, 3, 4, 8)


def dense(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, bits: int, version: int) -> torch.Tensor:
    """The weight [O, I]. Raises ValueError when `g_idx` names a group that is not there."""
    scales_GO, words = parts["scales"], parts["qweight"]
    groups, outputs = scales_GO.shape
    inputs = words.shape[0] * BITS_A_WORD // bits
    codes_OI = unpack_fields(words.T.contiguous(), bits, inputs)
    zeros_GO = zero_points(parts["qzeros"], bits, outputs, version)
    even = torch.arange(inputs) // -(-inputs // groups)
    group_of = parts["g_idx"].long() if "g_idx" in parts else even
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ValueError(f"g_idx names groups {int(group_of.min())} to {int(group_of.max())} of {groups}")
    plain = inputs % groups == 0 and torch.equal(group_of, even)
    return scaled(codes_OI, scales_GO.T, zeros_GO.T, None if plain else group_of, dtype)


def quantized(parts: Mapping[str, torch.Tensor], *, scheme: Scheme, version: int) -> QuantizedWeight:
    """The codes [O, I] and zero points [O, G] less half the range, so that both are signed, and the scales as they are.
    Raises ValueError for groups in an order of their own, and for zero points where the scheme has none."""
    scales_GO, words = parts["scales"], parts["qweight"]
    groups, outputs = scales_GO.shape
    inputs = words.shape[0] * BITS_A_WORD // scheme.bits
    if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), torch.arange(inputs) // (inputs // groups)):
        raise ValueError("g_idx gives its groups an order of their own")
    half = 1 << (scheme.bits - 1)
    codes_OI = (unpack_fields(words.T.contiguous(), scheme.bits, inputs) - half).to(torch.int8)
    zeros_OG = (zero_points(parts["qzeros"], scheme.bits, outputs, version).T - half).to(torch.int8).contiguous()
    if scheme.symmetric and bool(zeros_OG.any()):
        raise ValueError("it is announced as symmetric (sym), and has zero points")
    return QuantizedWeight(codes_OI, scales_GO.T.contiguous(), None if scheme.symmetric else zeros_OG, scheme)


def zero_points(words: torch.Tensor, bits: int, outputs: int, version: int) -> torch.Tensor:
    """int32 [G, outputs]. The 1 of version 1 is added to whole words, as GPTQModel takes it off: a zero point of 0 has
    then borrowed from the field above it, and gets it back. (Readers that add field by field differ there and nowhere
    else.) A field of three bits may lie in two words: there it is field by field."""
    if version == 1 and BITS_A_WORD % bits == 0:
        ones = sum(1 << at for at in range(0, BITS_A_WORD, bits))
        words = words + ones
    zeros_GO = unpack_fields(words, bits, outputs)
    return (zeros_GO + 1) & ((1 << bits) - 1) if version == 1 and BITS_A_WORD % bits else zeros_GO


def find(folder: Folder, block: Mapping[str, Any]) -> Reading:
    """Every `X.qweight` with its companions as `X.weight`."""
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
    told = ", ".join(f"{leaf} {dtypes[leaf]} {list(shape)}" for leaf, shape in shapes.items())
    if any(dtype != "I32" for leaf, dtype in dtypes.items() if leaf != "scales") or dtypes["scales"] not in FLOATS:
        raise ValueError(f"has {told}: codes, zeros and g_idx must be I32, scales {', '.join(FLOATS)}")
    block = dict(block) | override(block, stem)
    # Rules of its own for a module (GPTQModel's `dynamic`) may change its width: then the shapes say which.
    for bits in WIDTHS if block.get("dynamic") else (int(block["bits"]),):
        if _fits(shapes, bits, block):
            groups, outputs = shapes["scales"]
            inputs = shapes["qweight"][0] * BITS_A_WORD // bits
            size = "one group" if groups == 1 else f"group {-(-inputs // groups)}"
            # With desc_act a group's inputs lie anywhere, unless the groups were laid out before (static_groups).
            neighbours = inputs % groups == 0 and (not block.get("desc_act") or bool(block.get("static_groups")))
            group = BY_ROW if block.get("group_size", BY_ROW) in (BY_ROW, None) else inputs // groups
            scheme = integer_scheme(bits, group, block.get("sym") is True) if neighbours else None
            return StoredWeight(
                TensorInfo((outputs, inputs), dtypes["scales"]),
                f"int{bits} {size}",
                names,
                partial(dense, bits=bits, version=version),
                scheme=scheme,
                codes=None if scheme is None else partial(quantized, scheme=scheme, version=version),
            )
    raise ValueError(f"has {told}, which {block['bits']} bits in groups of {block.get('group_size')} do not give")


def override(block: Mapping[str, Any], module: str) -> dict[str, Any]:
    """What the first rule of `dynamic` that matches a module says of it; nothing for those that it leaves alone. Raises
    ValueError for a rule that is none."""
    for rule, fields in (block.get("dynamic") or {}).items():
        try:
            if re.match(rule.removeprefix("+:").removeprefix("-:"), module):
                return dict(fields) if not rule.startswith("-:") else {}
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(f"meets the rule {rule!r} of `dynamic`, which is none ({error})") from None
    return {}


def _fits(shapes: Mapping[str, tuple[int, ...]], bits: int, block: Mapping[str, Any]) -> bool:
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
