"""compressed-tensors `pack-quantized`: the int4/int8 weight-only layout that vLLM and transformers load.

A Linear `[out, in]` becomes `weight_packed` int32 `[out, ceil(in * bits / 32)]` (code + 2^(bits-1) as an unsigned
field, element j of a word at bits `bits * j`), `weight_scale` `[out, in / group]` in the model's dtype and
`weight_shape` int64 `[2]`; asymmetric adds `weight_zero_point`, packed the same way along out. Packing is a pair of
pure functions. The config block is built and validated by the compressed-tensors package's own classes.

Specification: compressed-tensors, `compressors/pack_quantized` (the reader that the tests hold this against).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import is_match

from ...core.scheme import BY_ROW, QuantizedWeight, Scheme
from .stored import unpack_fields

NAME = "compressed-tensors"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def layout(scheme: Scheme, outputs: int, inputs: int, model_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of the tensors that store one weight."""
    per_word = 32 // scheme.bits
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        PACKED: ("I32", (outputs, inputs // per_word)),
        SCALE: (model_dtype, (outputs, scheme.groups(inputs))),
        SHAPE: ("I64", (2,)),
    }
    if not scheme.symmetric:
        stored[ZERO] = ("I32", (-(-outputs // per_word), scheme.groups(inputs)))
    return stored


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [R, C] -> int32 words [R, ceil(C * bits / 32)], little end first; missing fields are zero bits."""
    per_word = 32 // bits
    missing = -codes.shape[1] % per_word
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    fields = torch.nn.functional.pad(unsigned, (0, missing)).unflatten(1, (-1, per_word))
    words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=codes.device)
    for j in range(per_word):
        words |= fields[:, :, j] << (bits * j)
    return words


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of pack_words: int32 [R, W] -> int8 codes [R, columns]."""
    return (unpack_fields(words, bits, columns) - (1 << (bits - 1))).to(torch.int8)


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One 2-D QuantizedWeight -> its stored tensors by suffix, on the CPU."""
    bits = weight.scheme.bits
    stored = {
        PACKED: pack_words(weight.codes, bits).cpu(),
        SCALE: weight.scales.cpu().contiguous(),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        stored[ZERO] = pack_words(weight.zero_points.T.contiguous(), bits).T.contiguous().cpu()
    return stored


def unpack(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of pack, bit for bit."""
    outputs, inputs = stored[SHAPE].tolist()
    zero = None
    if not scheme.symmetric:
        zero = unpack_words(stored[ZERO].T.contiguous(), scheme.bits, outputs).T.contiguous()
    return QuantizedWeight(unpack_words(stored[PACKED], scheme.bits, inputs), stored[SCALE], zero, scheme)


def quantization_config(
    schemes: Mapping[str, Scheme], units: Mapping[str, str], sizes: Mapping[str, int], ignore: list[str]
) -> dict[str, Any]:
    """The `quantization_config` block of config.json.

    schemes: module -> Scheme; units: module -> what an engine fuses it into; sizes: module -> weights. `ignore` names
    every Linear module that stays as it was. The scheme that most weights have is the group of the class `Linear`:
    vLLM looks its MoE scheme up under that name. Others are groups that name their modules, and the fused ones that
    vLLM makes of them: it matches a fused module by its own name before it falls back on the class.
    """
    total = dict.fromkeys(schemes.values(), 0)
    for module, scheme in schemes.items():
        total[scheme] += sizes[module]
    by_size = sorted(total, key=lambda scheme: (-total[scheme], str(scheme)))
    groups = {}
    for number, scheme in enumerate(by_size):
        targets = _targets([m for m, s in schemes.items() if s == scheme], units) if number else ["Linear"]
        by_row = scheme.group_size == BY_ROW
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type=QuantizationType.INT,
            symmetric=scheme.symmetric,
            strategy=QuantizationStrategy.CHANNEL if by_row else QuantizationStrategy.GROUP,
            group_size=None if by_row else scheme.group_size,
            dynamic=False,
        )
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights)
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return dict(config.model_dump(mode="json", exclude_none=True))


def _targets(modules: list[str], units: Mapping[str, str]) -> list[str]:
    """Names of modules and of the units that they are fused into; of experts, of which there are thousands, one
    expression for all that lie under the unit's name."""
    found: dict[str, None] = {}
    for module in modules:
        unit = units[module]
        if module.startswith(f"{unit}."):
            found[f"re:{re.escape(unit)}[.].+"] = None
        else:
            found |= {module: None, unit: None}
    return list(found)


def read_schemes(block: dict[str, Any]) -> dict[str, Scheme]:
    """Config-group name -> Scheme of a `quantization_config` block. Raises ValueError for other schemes."""
    config = QuantizationConfig.model_validate(block)
    schemes = {}
    for name, group in config.config_groups.items():
        args = getattr(group, "weights", None)
        by_row = args is not None and str(args.strategy) == "channel"
        sized = args is not None and str(args.type) == "int" and (by_row or args.group_size)
        if args is None or not sized or config.format != "pack-quantized":
            raise ValueError(f"group {name} of format {config.format!r} is no integer scheme by group or row")
        schemes[name] = Scheme(args.num_bits, BY_ROW if by_row else args.group_size, args.symmetric)
    return schemes


def announced(block: dict[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """Module -> Scheme of those of the Linear modules `linears` that a `quantization_config` says are quantized.

    Raises ValueError for other schemes.
    """
    schemes = read_schemes(block)
    config = QuantizationConfig.model_validate(block)
    named = {entry for entry in config.ignore or [] if not entry.startswith("re:")}
    patterns = [entry for entry in config.ignore or [] if entry.startswith("re:")]
    linear = torch.nn.Linear(1, 1, device="meta")
    found: dict[str, Scheme] = {}
    for name in linears:
        # Thousands of names: those that stand there as they are need no matching.
        if name in named or type(linear).__name__ in named:
            continue
        # A name goes before a class, as the readers have it.
        for by_name in (True, False):
            for group, scheme in schemes.items():
                targets = [t for t in config.config_groups[group].targets if (t != "Linear") == by_name]
                if name not in found and is_match(name, linear, targets, patterns):
                    found[name] = scheme
    return found
