"""GPTQ's layout, written: a weight's integer codes as AutoGPTQ, GPTQModel, transformers and vLLM read them.

`gptq_read` describes the layout. Version 1 stores each zero point minus 1. Readers add the 1 back in different ways
(field by field, or on whole words) and agree on everything but a zero point of 0. Symmetric weights have none, so
version 1, which every reader knows, is used for them alone. Version 2 holds both kinds.

Scales are fp16: AutoGPTQ knows no other dtype. A bf16 scale between 2^-17 and 65504 is exact in fp16. A scale that fp16
would change by more than bf16 rounds is refused. A scale may be negative (quantize/grid.py), since readers only
multiply by it. `g_idx` numbers the groups in order; AutoGPTQ requires the tensor.

`dynamic` lists modules that stay in 16 bits (`-:`) or have another width, as expressions over module names.

Specification: AutoGPTQ `qlinear_cuda_old.py`; GPTQModel `quantization/config.py`; vLLM
`quantization/utils/gptq_utils.py`, which also matches the names of fused modules.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from .packing import BITS_A_WORD
from .scales import fp16_scales

# AutoGPTQ counts words as `features // 32 * bits`, which would truncate other sizes.
MULTIPLE = 32
CHECKPOINT_FORMATS = {1: "gptq", 2: "gptq_v2"}


def layout(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of the tensors that store one weight `[outputs, inputs]`."""
    per_word, groups = BITS_A_WORD // scheme.bits, scheme.groups(inputs)
    return {
        "qweight": ("I32", (inputs // per_word, outputs)),
        "qzeros": ("I32", (groups, outputs // per_word)),
        "scales": ("F16", (groups, outputs)),
        "g_idx": ("I32", (inputs,)),
    }


def size_problem(outputs: int, inputs: int) -> str | None:
    """Why a weight of that shape cannot be stored, or None."""
    if outputs % MULTIPLE or inputs % MULTIPLE:
        return f"is {outputs} x {inputs}, and readers count in multiples of {MULTIPLE}"
    return None


def pack(weight: QuantizedWeight, version: int) -> dict[str, torch.Tensor]:
    """One 2-D QuantizedWeight -> its stored tensors by suffix, on the CPU.

    Raises ValueError for a scale that fp16 cannot hold.
    """
    bits, groups = weight.scheme.bits, weight.scales.shape[1]
    outputs, inputs = weight.codes.shape
    assert version == 2 or weight.zero_points is None, "version 1 is for symmetric weights"
    zeros_GO = torch.zeros(groups, outputs, dtype=torch.int8)
    if weight.zero_points is not None:
        zeros_GO = weight.zero_points.T.cpu()
    words_GW = pack_to_int32(zeros_GO, bits)
    if version == 1:
        # Every field is the middle of its range, so none borrows from the next.
        words_GW = words_GW - sum(1 << at for at in range(0, BITS_A_WORD, bits))
    return {
        "qweight": pack_to_int32(weight.codes.cpu(), bits).T.contiguous(),
        "qzeros": words_GW,
        "scales": fp16_scales(weight.scales.cpu()).T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def expressions(modules: Iterable[str], units: Mapping[str, str]) -> list[str]:
    """Expressions that match these modules and the units that engines fuse them into, with any prefix.

    One expression covers the modules of one kind in all blocks. `units`: module -> its unit. A unit that contains its
    modules (the experts of a layer) stands for all of them.
    """
    kinds: dict[tuple[str, str], dict[str, None]] = {}
    for module in modules:
        unit = units.get(module, module)
        above = module.startswith(f"{unit}.")
        for name in (unit,) if above else (module, unit):
            head, number, tail = _split(name)
            kinds.setdefault((head, f"{tail}(?:[.].+)?" if above else tail), {})[number] = None
    return [_joined(head, list(numbers), tail) for (head, tail), numbers in kinds.items()]


def _split(name: str) -> tuple[str, str, str]:
    """Split a name at its first numeric part: (escaped head, number, escaped tail). Without one, all is head."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return re.escape(".".join(parts[:at])), "".join(parts[at : at + 1]), re.escape(".".join(parts[at + 1 :]))


def _joined(head: str, numbers: list[str], tail: str) -> str:
    middle = f"[.](?:{'|'.join(sorted(numbers, key=int))})" if numbers != [""] else ""
    return f"(?:.*[.])?{head}{middle}{'[.]' if middle and tail else ''}{tail}$"


def quantization_config(
    schemes: Mapping[str, Scheme],
    kept: Iterable[str],
    units: Mapping[str, str],
    sizes: Mapping[str, int],
    version: int,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The `quantization_config` block of config.json, which is also the content of quantize_config.json.

    `schemes`: module -> Scheme. `kept`: Linear modules that are not quantized. `units`: module -> what an engine fuses
    it into. `sizes`: module -> number of weights. The scheme of most weights is the folder's own; the others become
    rules of `dynamic`.
    """
    total = dict.fromkeys(schemes.values(), 0)
    for module, scheme in schemes.items():
        total[scheme] += sizes[module]
    by_size = sorted(total, key=lambda scheme: (-total[scheme], str(scheme)))
    dynamic: dict[str, dict[str, Any]] = {f"-:{found}": {} for found in expressions(kept, units)}
    for scheme in by_size[1:]:
        chosen = [module for module, own in schemes.items() if own == scheme]
        dynamic |= {f"+:{found}": _fields(scheme) for found in expressions(chosen, units)}
    return {
        "quant_method": "gptq",
        **_fields(by_size[0]),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": CHECKPOINT_FORMATS[version],
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": dict(meta),
    }


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
