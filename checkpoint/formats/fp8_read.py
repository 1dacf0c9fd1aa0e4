"""fp8 weights with scales, read: `quant_method: fp8` (blocks, from DeepSeek, Qwen and transformers) and `fbgemm_fp8`
(Meta's).

A weight is stored as F8_E4M3 (or E5M2) under its own name. Beside it lies `X_scale_inv` or `X_scale`; either name means
a factor to multiply by, stored as a float or as a power of two (F8_E8M0). The scale has one value, one per row, or one
per block of `weight_block_size` (the last block of an axis may be cut). Scales of fused experts `[experts, ., .]` have
an axis of experts, so one expert can be read alone. fbgemm_fp8 stores Llama 4's experts as `[experts, in, out]` with
one scale per output, of shape `[experts, 1, out]` for gate and up and `[experts, out, 1]` for down.

The dense weight is the product, rounded once to the dtype of the unquantized weights (bf16), as the formats' own
dequantizers do. An engine multiplies in fp8 and quantizes activations too; a warning says that this is not measured.

Specification: DeepSeek-V3's `weights dequantization` notes; transformers `integrations/finegrained_fp8`, `fbgemm_fp8`.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...core.tensors import TensorInfo
from ..source import Folder
from .scales import spread, spreads
from .stored_weight import FLOATS, Reading, StoredWeight

FP8_BLOCKS, FBGEMM = "fp8", "fbgemm_fp8"
NAMES = (FP8_BLOCKS, FBGEMM)
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
# Scales that are powers of two (config.json: `scale_fmt: ue8m0`).
POWERS = "F8_E8M0"
# Tensors of activations and of the key-value cache.
ASIDE = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")


def dense(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, block: tuple[int, int], by_last: bool
) -> torch.Tensor:
    """weight [(E,) R, C] * scale in fp32, rounded once to `dtype`. `by_last`: one scale per index of the last axis."""
    weight, scale = parts["weight"].to(torch.float32), parts["scale"].to(torch.float32)
    columns = (*weight.shape[:-2], 1, weight.shape[-1])
    shape = columns if by_last else aligned(tuple(scale.shape), tuple(weight.shape))
    assert shape is not None
    return (weight * spread(scale.view(shape), tuple(weight.shape), _axes(weight.ndim, block))).to(dtype)


def aligned(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The scale's shape with as many axes as the weight, for one value, or one per row or expert; otherwise the shape
    itself. None where the number of axes fits neither."""
    if torch.Size(scale).numel() == 1:
        return (1,) * len(weight)
    if len(scale) == 1 and scale[0] == weight[0]:
        return (scale[0], *(1,) * (len(weight) - 1))
    return scale if len(scale) == len(weight) else None


def _axes(axes: int, block: tuple[int, int]) -> tuple[int, ...]:
    return (1,) * (axes - 2) + block


def kept_dtype(folder: Folder) -> str:
    """The dtype of most bytes of unquantized weights; F32 if there are none."""
    count: Counter[str] = Counter()
    for name, info in folder.infos.items():
        if info.dtype in FLOATS and not name.endswith((*SCALES, *ASIDE)):
            count[info.dtype] += info.nbytes
    return max(count, key=lambda dtype: count[dtype], default="F32")


def find(folder: Folder, block: Mapping[str, Any]) -> Reading:
    """Every fp8 tensor with its scale."""
    reading = Reading(str(block.get("quant_method")))
    size = block.get("weight_block_size")
    if size is not None and not (
        isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        reading.problems.append(f"config.json has weight_block_size {size!r}: it must be two positive integers")
        return reading
    blocks = (size[0], size[1]) if size else (1, 1)
    dtype = kept_dtype(folder)
    for name, info in folder.infos.items():
        if name.endswith(ASIDE):
            reading.aside.add(name)
        elif info.dtype in FP8:
            try:
                reading.weights[name] = _weight(name, folder.infos, blocks, dtype, reading.label == FBGEMM)
            except ValueError as error:
                reading.problems.append(f"{name} {error}")
    reading.warnings.append(
        "an engine quantizes its activations to fp8 when it runs: the figures here measure the weights alone"
    )
    return reading


def _weight(
    name: str, infos: Mapping[str, TensorInfo], block: tuple[int, int], kept: str, fbgemm: bool
) -> StoredWeight:
    info = infos[name]
    scale = next((name + suffix for suffix in SCALES if name + suffix in infos), None)
    if scale is None:
        raise ValueError(f"is {info.dtype} and has neither {' nor '.join(name + s for s in SCALES)}")
    of = infos[scale]
    if of.dtype not in (*FLOATS, POWERS):
        raise ValueError(f"has a scale of {of.dtype}: {', '.join((*FLOATS, POWERS))} are read")
    by_last = fbgemm and len(info.shape) == 3
    shape = aligned(of.shape, info.shape)
    if by_last and of.shape in ((info.shape[0], 1, info.shape[2]), (info.shape[0], info.shape[2], 1)):
        shape = (info.shape[0], 1, info.shape[2])
    elif by_last:
        shape = None
    if len(info.shape) not in (2, 3) or shape is None or not spreads(shape, info.shape, _axes(len(info.shape), block)):
        raise ValueError(
            f"is {list(info.shape)} and its scale {list(of.shape)}: neither one value, nor one per row, nor one per "
            f"{block[0]} x {block[1]} block"
        )
    if max(shape) == 1:
        width = "one scale"
    else:
        last = tuple(s < n for s, n in zip(shape, info.shape, strict=True) if s > 1)
        width = f"block {block[0]}x{block[1]}" if any(last) else "by row"
    by_expert = frozenset({"weight"} | ({"scale"} if shape[0] > 1 else set())) if len(info.shape) == 3 else frozenset()
    return StoredWeight(
        TensorInfo(info.shape, kept if of.dtype in ("F32", POWERS) else of.dtype),
        f"fp8 {width}",
        {"weight": name, "scale": scale},
        partial(dense, block=block, by_last=by_last),
        by_expert,
    )
