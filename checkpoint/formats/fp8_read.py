"""fp8 weights with scales: `quant_method: fp8` (DeepSeek's and Qwen's blocks, transformers) and `fbgemm_fp8` (Meta's).

A weight is stored as F8_E4M3 (or E5M2) under its own name; beside it `X_scale_inv` or `X_scale`, by which it is
multiplied whatever the name says: one value, one a row, or one for every block of `weight_block_size` (the last block
of an axis may be cut). Fused experts `[experts, ., .]` have a scale with an axis of experts, so that one expert is
read alone; fbgemm_fp8 keeps Llama 4's as `[experts, in, out]` with a scale an output, whose axes are
`[experts, 1, out]` for gate and up and `[experts, out, 1]` for down.

The dense weight is the product, rounded once to the dtype that the kept weights have (bf16), as the formats' own
dequantizers do. An engine multiplies in fp8 and quantizes activations too: a warning says that this is not measured.

Specification: DeepSeek-V3's `weights dequantization` notes; transformers `integrations/finegrained_fp8`, `fbgemm_fp8`.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...core.tensors import TensorInfo
from ..source import Folder
from .stored_weight import FLOATS, Reading, StoredWeight, spread, spreads

FP8_BLOCKS, FBGEMM = "fp8", "fbgemm_fp8"
NAMES = (FP8_BLOCKS, FBGEMM)
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
# Of activations and of the key-value cache.
ASIDE = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")


def dense(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, block: tuple[int, int], by_last: bool
) -> torch.Tensor:
    """weight [(E,) R, C] * scale in fp32, rounded once. `by_last`: one scale for each place of the last axis."""
    weight, scale = parts["weight"].to(torch.float32), parts["scale"].to(torch.float32)
    columns = (*weight.shape[:-2], 1, weight.shape[-1])
    shape = columns if by_last else aligned(tuple(scale.shape), tuple(weight.shape))
    assert shape is not None
    return (weight * spread(scale.view(shape), tuple(weight.shape), _axes(weight.ndim, block))).to(dtype)


def aligned(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The scale's shape with as many axes as the weight: a single value, one a row or expert, or as it is."""
    if torch.Size(scale).numel() == 1:
        return (1,) * len(weight)
    if len(scale) == 1 and scale[0] == weight[0]:
        return (scale[0], *(1,) * (len(weight) - 1))
    return scale if len(scale) == len(weight) else None


def _axes(axes: int, block: tuple[int, int]) -> tuple[int, ...]:
    return (1,) * (axes - 2) + block


def kept_dtype(folder: Folder) -> str:
    """The dtype of most bytes that are weights as they were; F32 if there are none."""
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
        reading.problems.append(f"config.json has weight_block_size {size!r}: two whole numbers are wanted")
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
        "its activations are quantized to fp8 when an engine runs it: what is measured is the weights alone"
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
    if of.dtype not in FLOATS:
        raise ValueError(f"has a scale of {of.dtype}: {', '.join(FLOATS)} are read")
    by_last = fbgemm and len(info.shape) == 3
    shape = aligned(of.shape, info.shape)
    if by_last and of.shape in ((info.shape[0], 1, info.shape[2]), (info.shape[0], info.shape[2], 1)):
        shape = (info.shape[0], 1, info.shape[2])
    elif by_last:
        shape = None
    if len(info.shape) not in (2, 3) or shape is None or not spreads(shape, info.shape, _axes(len(info.shape), block)):
        raise ValueError(
            f"is {list(info.shape)} and its scale {list(of.shape)}: neither one value, nor one a row, nor one for each "
            f"{block[0]} x {block[1]}"
        )
    if max(shape) == 1:
        width = "one scale"
    else:
        last = tuple(s < n for s, n in zip(shape, info.shape, strict=True) if s > 1)
        width = f"block {block[0]}x{block[1]}" if any(last) else "by row"
    by_expert = frozenset({"weight"} | ({"scale"} if shape[0] > 1 else set())) if len(info.shape) == 3 else frozenset()
    return StoredWeight(
        TensorInfo(info.shape, of.dtype if of.dtype != "F32" else kept),
        f"fp8 {width}",
        {"weight": name, "scale": scale},
        partial(dense, block=block, by_last=by_last),
        by_expert,
    )
