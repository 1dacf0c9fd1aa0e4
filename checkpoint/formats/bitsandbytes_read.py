"""bitsandbytes, read: NF4 and FP4 in blocks, with or without double quantization, and LLM.int8().

Four bits: `X.weight` holds the codes of the flattened weight, two per byte; the bytes may be stored as another dtype.
Beside it lie `X.weight.absmax`, `X.weight.quant_map` (the 16 values of a code), and
`X.weight.quant_state.bitsandbytes__nf4`, JSON in bytes with shape, dtype and block size. With double quantization
absmax is one byte per block: `nested_quant_map[byte] * nested_absmax + nested_offset`, one `nested_absmax` for 256
blocks. The package's own `functional.dequantize_4bit` dequantizes. It reads as many values as the shapes promise, so
everything that it is given is checked first.

Eight bits: `X.weight` int8 `[out, in]` and `X.SCB` `[out]`; the weight is `code * SCB / 127`.

transformers quantizes Linear modules only. Fused experts stay unquantized, and `onecard inspect` says so.

Specification: bitsandbytes `functional.QuantState.as_dict`; transformers `quantizer_bnb_4bit`, `quantizer_bnb_8bit`.
"""

import json
import logging
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch

from ...core.tensors import TensorInfo
from ..source import Folder
from .stored_weight import Reading, StoredWeight, missing

NAME = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LEVELS, NESTED_LEVELS = 16, 256
# A quant state is JSON of less than 200 bytes. A longer tensor is not read.
MAX_STATE_BYTES = 4096


def dense_4bit(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, state: Mapping[str, Any]) -> torch.Tensor:
    """The weight in the state's shape."""
    # On some processors it warns that a kernel for 4-bit products is missing. No product is computed here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = None
    if "nested_absmax" in parts:
        nested = QuantState(
            parts["nested_absmax"],
            code=parts["nested_quant_map"],
            blocksize=state["nested_blocksize"],
            dtype=torch.float32,
        )
    known = QuantState(
        parts["absmax"],
        # Flat, as it was quantized. The CPU kernel (0.50.2) starts a new block with every row, which gives wrong
        # scales when a row is not a whole number of blocks. The CUDA kernels do not.
        shape=torch.Size([prod(state["shape"])]),
        code=parts["quant_map"],
        blocksize=state["blocksize"],
        quant_type=state["quant_type"],
        dtype=dtype,
        offset=None if nested is None else torch.tensor(float(state["nested_offset"])),
        state2=nested,
    )
    out = dequantize_4bit(parts["codes"].view(torch.uint8).reshape(-1, 1), known)
    assert isinstance(out, torch.Tensor)
    return out.reshape(state["shape"])


def dense_8bit(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """code * SCB / 127 [O, I] in fp32, rounded once."""
    return (parts["codes"].to(torch.float32) * (parts["scb"].to(torch.float32) / 127).unsqueeze(-1)).to(dtype)


def find(folder: Folder, block: Mapping[str, Any]) -> Reading:
    """Every weight with a quant state, or with an SCB."""
    reading = Reading(NAME)
    for name, info in folder.infos.items():
        kind = next((kind for kind in TYPES if f"{name}{STATE}{kind}" in folder.infos), None)
        stem = name.removesuffix(".weight")
        try:
            if kind is not None:
                reading.weights[name] = _four_bits(name, kind, folder)
            elif info.dtype == "I8":
                reading.weights[name] = _eight_bits(name, stem, folder.infos)
            elif info.dtype == "U8" and name.endswith(".weight"):
                reading.problems.append(f"{name} is packed and has no {name}{STATE}nf4 (or fp4)")
        except ValueError as error:
            reading.problems.append(f"{name} {error}")
    reading.aside |= {name for name in folder.names if name.endswith(".weight_format")}
    if any(weight.width.startswith("int8") for weight in reading.weights.values()):
        reading.warnings.append(
            "LLM.int8() quantizes activations too when it runs: the figures here measure the weights alone"
        )
    return reading


def _four_bits(name: str, kind: str, folder: Folder) -> StoredWeight:
    infos = folder.infos
    state = _read_state(folder, f"{name}{STATE}{kind}")
    if state.get("quant_type") != kind:
        raise ValueError(f"has a quant state named {kind} that says {state.get('quant_type')!r}")
    shape, blocksize = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"has a quant state with the shape {shape!r}")
    if blocksize not in BLOCKS or state.get("dtype") not in DTYPES:
        raise ValueError(f"has a quant state with blocksize {blocksize!r} and dtype {state.get('dtype')!r}")
    nested = f"{name}.nested_absmax" in infos
    lacking = missing(name, (".absmax", ".quant_map", *((".nested_quant_map",) if nested else ())), infos)
    if lacking:
        raise ValueError(lacking)
    if nested and (
        state.get("nested_blocksize") not in BLOCKS or not isinstance(state.get("nested_offset"), int | float)
    ):
        raise ValueError("has a quant state without nested_blocksize or nested_offset")
    count = prod(shape)
    blocks = -(-count // blocksize)
    parts = {"codes": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map"}
    wanted = {"absmax": ("U8" if nested else "F32", blocks), "quant_map": ("F32", LEVELS)}
    if nested:
        parts |= {part: f"{name}.{part}" for part in ("nested_absmax", "nested_quant_map")}
        wanted |= {
            "nested_absmax": ("F32", -(-blocks // state["nested_blocksize"])),
            "nested_quant_map": ("F32", NESTED_LEVELS),
        }
    wrong = [
        f"{part} {infos[parts[part]].dtype} {list(infos[parts[part]].shape)}, not {dtype} [{length}]"
        for part, (dtype, length) in wanted.items()
        if (infos[parts[part]].dtype, infos[parts[part]].shape) != (dtype, (length,))
    ]
    if infos[name].nbytes != -(-count // 2):
        wrong.append(f"{infos[name].nbytes} bytes of codes for {count} weights")
    if wrong:
        raise ValueError(f"of shape {shape} in blocks of {blocksize} has {', '.join(wrong)}")
    return StoredWeight(
        TensorInfo(tuple(shape), DTYPES[state["dtype"]]),
        f"{kind} block {blocksize}" + (", double quantized" if nested else ""),
        parts | {"state": f"{name}{STATE}{kind}"},
        partial(dense_4bit, state=state),
        # The package has other kernels on a GPU. The CPU's are those that the tests compare with.
        anywhere=False,
    )


def _read_state(folder: Folder, name: str) -> dict[str, Any]:
    info = folder.infos[name]
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > MAX_STATE_BYTES:
        raise ValueError(f"has a quant state of {info.dtype} {list(info.shape)}")
    try:
        state = json.loads(bytes(folder.get(name).tolist()))
    except (ValueError, RecursionError):
        raise ValueError("has a quant state that is no JSON") from None
    if not isinstance(state, dict):
        raise ValueError("has a quant state that is no JSON object")
    return state


def _eight_bits(name: str, stem: str, infos: Mapping[str, TensorInfo]) -> StoredWeight:
    lacking = missing(stem, (".SCB",), infos)
    if lacking:
        raise ValueError(f"is I8 and {lacking}")
    info, of = infos[name], infos[f"{stem}.SCB"]
    if len(info.shape) != 2 or of.shape != info.shape[:1] or of.dtype not in ("F32", "F16", "BF16"):
        raise ValueError(f"is {list(info.shape)} and its SCB {of.dtype} {list(of.shape)}")
    parts = {"codes": name, "scb": f"{stem}.SCB"}
    # The package computes in fp16. The scale's own dtype loses nothing.
    return StoredWeight(TensorInfo(info.shape, of.dtype), "int8 by row", parts, dense_8bit)
