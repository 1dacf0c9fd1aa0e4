"""bitsandbytes, written: NF4 in blocks of 64 with double quantization, and the int8 rows of LLM.int8().

The package's own functions quantize and store in one step: a dense weight goes in, its stored parts come out. There is
no QuantizedWeight here, and existing integer codes cannot be kept. Names, dtypes and contents are those that
bitsandbytes' own modules save. Only the length of the quant state is ours: it is JSON with a number from the data
(`nested_offset`), so its length would depend on the weights. Spaces, which JSON allows after a value, pad it to a
length that follows from the shape. Weights are quantized on the CPU, so the kind of GPU changes no byte.

Specification: bitsandbytes `functional.quantize_4bit`, `QuantState.as_dict`, `nn.Linear8bitLt._save_to_state_dict`;
Dettmers et al., arXiv 2305.14314 (NF4, double quantization) and 2208.07339 (LLM.int8()).
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...core.json_text import json_text
from ...core.scheme import INT8_ROWS, NF4, Scheme
from ...core.tensors import DTYPE_NAMES
from .bitsandbytes_read import DTYPES, LEVELS, NAME, NESTED_LEVELS, STATE, dense_4bit

# Scales that double quantization groups; the package fixes it.
NESTED_BLOCK = 256
# Length of the longest float that Python prints: -1.7976931348623157e+308.
MOST_FLOAT_CHARS = 24
TORCH_NAMES = {stored: name for name, stored in DTYPES.items()}
STATE_PART = f"weight{STATE}nf4"


def layout(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of the tensors that store one weight."""
    if scheme.grid == INT8_ROWS:
        return {"weight": ("I8", (outputs, inputs)), "SCB": ("F32", (outputs,)), "weight_format": ("U8", ())}
    assert scheme.grid == NF4, scheme
    blocks = -(-outputs * inputs // scheme.group_size)
    return {
        "weight": ("U8", (-(-outputs * inputs // 2), 1)),
        "weight.absmax": ("U8", (blocks,)),
        "weight.quant_map": ("F32", (LEVELS,)),
        "weight.nested_absmax": ("F32", (-(-blocks // NESTED_BLOCK),)),
        "weight.nested_quant_map": ("F32", (NESTED_LEVELS,)),
        STATE_PART: ("U8", (_state_bytes(scheme, outputs, inputs, model_dtype),)),
    }


def _state_bytes(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> int:
    """The most bytes that the quant state of a weight of that shape can have."""
    without_offset = {
        "quant_type": "nf4",
        "blocksize": scheme.group_size,
        "dtype": TORCH_NAMES[model_dtype],
        "shape": [outputs, inputs],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": 0,
    }
    return len(json_text(without_offset)) - 1 + MOST_FLOAT_CHARS


def quantize(weight_OI: torch.Tensor, scheme: Scheme) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantize a dense weight [O, I] in the model's dtype -> its stored parts by suffix, and the weight [O, I] that
    they decode to: in the model's dtype for NF4, in fp32 for int8."""
    if scheme.grid == INT8_ROWS:
        return _int8_rows(weight_OI)
    assert scheme.grid == NF4, scheme
    return _nf4(weight_OI, scheme)


def _nf4(weight_OI: torch.Tensor, scheme: Scheme) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight_OI.contiguous(), blocksize=scheme.group_size, compress_statistics=True, quant_type="nf4"
    )
    facts = state.as_dict()
    beside = {key: value for key, value in facts.items() if isinstance(value, torch.Tensor)}
    said = {key: value for key, value in facts.items() if key not in beside}
    outputs, inputs = weight_OI.shape
    length = _state_bytes(scheme, outputs, inputs, DTYPE_NAMES[weight_OI.dtype])
    written = json_text(said).ljust(length)
    assert len(written) == length, (written, length)
    parts = {"weight": codes, **{f"weight.{key}": value for key, value in beside.items()}}
    parts[STATE_PART] = torch.frombuffer(bytearray(written.encode()), dtype=torch.uint8)
    return parts, dense_4bit({"codes": codes, **beside}, weight_OI.dtype, state=said)


def _int8_rows(weight_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    # The function takes fp16 only, which is what bitsandbytes' Linear8bitLt passes to it.
    codes, scales, _ = int8_vectorwise_quant(weight_OI.contiguous().to(torch.float16))
    # 0 means `row`, the only order that bitsandbytes still writes.
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, int8_vectorwise_dequant(codes, scales)


def quantization_config(schemes: Mapping[str, Scheme], keep: list[str]) -> dict[str, Any]:
    """The `quantization_config` block of config.json. All modules must share one scheme. `keep` names every Linear
    module that is not quantized: transformers replaces all others by bitsandbytes' own."""
    (scheme,) = set(schemes.values())
    return {
        "quant_method": NAME,
        "load_in_4bit": scheme.grid == NF4,
        "load_in_8bit": scheme.grid == INT8_ROWS,
        "llm_int8_skip_modules": keep,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.grid == NF4,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
