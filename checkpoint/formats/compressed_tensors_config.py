"""compressed-tensors' `quantization_config` in config.json: built for our own checkpoints, and read from any tool's.

Both directions go through the compressed-tensors package's own classes, which validate the block.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
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

from ...core.scheme import BY_ROW, Scheme

NAME = "compressed-tensors"
# How a config group stores codes: packed into words, or one by one; `mixed-precision` refers to the groups.
PACK, NAIVE = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"


def quantization_config(
    schemes: Mapping[str, Scheme], units: Mapping[str, str], sizes: Mapping[str, int], ignore: list[str]
) -> dict[str, Any]:
    """The `quantization_config` block of a checkpoint that `compressed_tensors_write` packs.

    `schemes`: module -> Scheme. `units`: module -> what an engine fuses it into. `sizes`: module -> number of weights.
    `ignore`: every Linear module that is not quantized.

    The scheme of most weights becomes the group that targets the class `Linear`: vLLM looks its MoE scheme up under
    that name. Other groups name their modules, and the fused modules that vLLM makes of them: vLLM matches a fused
    module by its own name before it falls back on the class.
    """
    total = dict.fromkeys(schemes.values(), 0)
    for module, scheme in schemes.items():
        total[scheme] += sizes[module]
    by_size = sorted(total, key=lambda scheme: (-total[scheme], str(scheme)))
    groups = {}
    for number, scheme in enumerate(by_size):
        targets = _targets([m for m, s in schemes.items() if s == scheme], units) if number else ["Linear"]
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=_arguments(scheme))
    config = QuantizationConfig(
        config_groups=groups,
        format=PACK,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return dict(config.model_dump(mode="json", exclude_none=True))


def _arguments(scheme: Scheme) -> QuantizationArgs:
    by_row = scheme.group_size == BY_ROW
    return QuantizationArgs(
        num_bits=scheme.bits,
        type=QuantizationType.INT,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy.CHANNEL if by_row else QuantizationStrategy.GROUP,
        group_size=None if by_row else scheme.group_size,
        dynamic=False,
    )


def _targets(modules: list[str], units: Mapping[str, str]) -> list[str]:
    """Names of modules and of the units that they are fused into. A layer has thousands of experts: one expression
    covers all that lie under the unit's name."""
    found: dict[str, None] = {}
    for module in modules:
        unit = units[module]
        if module.startswith(f"{unit}."):
            found[f"re:{re.escape(unit)}[.].+"] = None
        else:
            found |= {module: None, unit: None}
    return list(found)


def read_schemes(block: dict[str, Any]) -> dict[str, Scheme]:
    """Name of each config group -> its Scheme. Raises ValueError for groups that Scheme cannot describe."""
    config = QuantizationConfig.model_validate(block)
    schemes = {}
    for name, group in config.config_groups.items():
        args = getattr(group, "weights", None)
        by_row = args is not None and str(args.strategy) == "channel"
        sized = args is not None and str(args.type) == "int" and (by_row or args.group_size)
        if args is None or not sized or config.format != PACK:
            raise ValueError(f"group {name} of format {config.format!r} is no integer scheme by group or row")
        schemes[name] = Scheme(args.num_bits, BY_ROW if by_row else args.group_size, args.symmetric)
    return schemes


def announced(block: dict[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """Module -> Scheme, for those Linear modules of `linears` that the block says are quantized.

    Raises ValueError for groups that Scheme cannot describe.
    """
    schemes = read_schemes(block)
    config = QuantizationConfig.model_validate(block)
    named = {entry for entry in config.ignore or [] if not entry.startswith("re:")}
    patterns = [entry for entry in config.ignore or [] if entry.startswith("re:")]
    linear = torch.nn.Linear(1, 1, device="meta")
    found: dict[str, Scheme] = {}
    for name in linears:
        # `ignore` lists thousands of plain names: a set finds them without matching.
        if name in named or type(linear).__name__ in named:
            continue
        # A target that is a name takes precedence over a class, as it does in the package's own loader.
        for by_name in (True, False):
            for group, scheme in schemes.items():
                targets = [t for t in config.config_groups[group].targets if (t != "Linear") == by_name]
                if name not in found and is_match(name, linear, targets, patterns):
                    found[name] = scheme
    return found


@dataclass(frozen=True)
class Group:
    """One entry of config_groups."""

    name: str
    targets: tuple[str, ...]
    format: str
    type: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    # Rows and columns of the rectangle of weights that share a scale.
    block: tuple[int, int]

    def aims_at(self, module: str) -> int:
        """How narrowly a target matches the module: 3 by name, 2 by expression, 1 by class, 0 not at all."""
        best = 0
        for target in self.targets:
            if target == module:
                return 3
            if target.startswith("re:") and re.match(target[3:], module):
                best = 2
            elif target == "Linear":
                best = max(best, 1)
        return best


def read_groups(block: Mapping[str, Any]) -> list[Group]:
    """The config groups of any tool's block, presets resolved. Groups without weights are left out.

    Raises ValueError, or what pydantic raises, for a block that is not understood.
    """
    block = deepcopy(dict(block))
    for scheme in (block.get("config_groups") or {}).values():
        if isinstance(scheme, dict) and isinstance(scheme.get("weights"), dict):
            # The stored tensors show an order of columns; newer versions of the package refuse its old names.
            scheme["weights"].pop("actorder", None)
    config = QuantizationConfig.model_validate(block)
    _refuse_unreadable(block, config)
    return [_group(name, scheme, config) for name, scheme in config.config_groups.items() if scheme.weights is not None]


def _refuse_unreadable(block: Mapping[str, Any], config: QuantizationConfig) -> None:
    """Raises ValueError for rotated weights, sparse weights, and targets that are no expression."""
    transform, sparsity = block.get("transform_config"), block.get("sparsity_config") or {}
    if (transform or {}).get("config_groups"):
        raise ValueError("its weights are rotated (transform_config), and only an engine undoes that when it runs them")
    if sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"its weights are stored {sparsity['format']} (sparsity_config)")
    for target in (target for scheme in config.config_groups.values() for target in scheme.targets):
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"the target {target!r} is no expression ({error})") from None


def _group(name: str, scheme: QuantizationScheme, config: QuantizationConfig) -> Group:
    args = scheme.weights
    stored_as, strategy, kind = _plain(scheme.format or config.format), _plain(args.strategy), _plain(args.type)
    if stored_as == MIXED:
        raise ValueError(f"group {name} says no format, and the folder is {MIXED}")
    if stored_as != PACK and stored_as not in NAIVE:
        raise ValueError(
            f"group {name} is stored as {stored_as!r}; {', '.join((PACK, *NAIVE))} are read"
            + (" (save it with save_compressed=True)" if stored_as in ("dense", "fakequant") else "")
        )
    if strategy not in ("tensor", "channel", "group", "block") or (stored_as == PACK and kind != "int"):
        raise ValueError(f"group {name} is {kind}{args.num_bits} with one scale per {strategy}, which is not read")
    rectangle = args.block_structure or (1, args.group_size if strategy == "group" else 1)
    return Group(
        name=name,
        targets=tuple(scheme.targets),
        format=stored_as,
        type=kind,
        bits=args.num_bits,
        symmetric=args.symmetric,
        strategy=strategy,
        group_size=args.group_size or 0,
        block=(rectangle[0], rectangle[1]),
    )


def _plain(value: Any) -> str:
    """The package gives either an enumeration or its value."""
    return str(getattr(value, "value", value))
