"""View: what an engine's rules look at, which is config.json, the headers, and how the files store each matrix.

Nothing is refused here. A checkpoint that onecard cannot open as a model (fused experts beside packed ones, missing
scales) is what the rules must be able to report. Tensors are sorted by the format's own suffixes. The adapter says what
a module is, which unit an engine fuses it into, and what shape it must have. No weight is read.

Specification of the suffixes: compressed-tensors `compressors/pack_quantized` and `naive_quantized`; AutoGPTQ
`qlinear_cuda_old.py`; bitsandbytes `functional.QuantState.as_dict`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ...core.tensors import TensorInfo
from ...models.adapter import Adapter, Role
from ...models.cache import Split
from ..formats.compressed_tensors_config import Group, read_groups
from ..formats.packing import words_for
from ..formats.stored_weight import FLOATS

COMPRESSED_TENSORS, GPTQ, BITSANDBYTES = "compressed-tensors", "gptq", "bitsandbytes"


class Kind(StrEnum):
    """How a matrix is stored."""

    PLAIN = "plain"
    PACKED = "packed"  # compressed-tensors: weight_packed
    CODES = "codes"  # int8 or fp8 under the weight's own name, with weight_scale
    GPTQ = "gptq"  # qweight
    NF4 = "nf4"  # bitsandbytes
    FUSED = "fused"  # in the 3-D tensor of all experts
    MISSING = "missing"


# The leaf that tells a kind, narrowest first; and the leaves that each kind needs besides. Whether a zero point is
# needed depends on config.json.
TELLS = (("weight_packed", Kind.PACKED), ("qweight", Kind.GPTQ), ("weight", Kind.PLAIN))
PARTS = {
    Kind.PACKED: ("weight_scale", "weight_shape"),
    Kind.CODES: ("weight_scale",),
    Kind.GPTQ: ("scales", "qzeros"),
    Kind.NF4: ("weight.absmax", "weight.quant_map"),
}
LEAVES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale_inv",
    "SCB",
    "weight_format",
)
# Tensors of activations, of the key-value cache, and leftovers of old tools; engines read or ignore them.
ASIDE = re.compile(
    r".*\.(input_scale|input_zero_point|output_scale|output_zero_point|[qkv]_scale|[qkv]_zero_point|inv_freq)"
)


@dataclass(frozen=True)
class Kept:
    """One matrix of the text blocks, as the files store it."""

    module: str
    role: Role
    unit: str
    # [out, in], as config.json promises it.
    shape: tuple[int, int]
    kind: Kind
    # The tensor that holds its values.
    tensor: str
    # Leaf -> header.
    parts: Mapping[str, TensorInfo]
    # None when it is not quantized, or when its tensors do not say.
    bits: int | None = None
    # Inputs per scale; None as for `bits`.
    group: int | None = None
    # How tensor parallelism splits it.
    split: Split = Split.COPIED

    @property
    def quantized(self) -> bool:
        return self.kind in PARTS

    @property
    def zero_points(self) -> bool:
        return "weight_zero_point" in self.parts

    @property
    def width(self) -> str:
        """In words: 'int4 group 32', 'BF16'."""
        return self.said(self.group == self.shape[1])

    def said(self, by_row: bool) -> str:
        """The width in words. A group as long as the row can be called either; `by_row` decides."""
        if self.kind in (Kind.PLAIN, Kind.FUSED):
            return next(iter(self.parts.values())).dtype
        if self.kind is Kind.MISSING:
            return "nothing"
        kind = "nf4" if self.kind is Kind.NF4 else f"int{self.bits or '?'}"
        over = "by row" if by_row else f"group {self.group or '?'}"
        return f"{kind} {over}" + (" asymmetric" if self.zero_points else "")


@dataclass(frozen=True)
class View:
    """A checkpoint as the rules see it."""

    config: dict[str, Any]
    # config.json's quantization_config, or None.
    block: dict[str, Any] | None
    adapter: Adapter
    infos: Mapping[str, TensorInfo]
    # Module -> matrix, for every matrix of the text blocks.
    kept: Mapping[str, Kept]
    # Every other promised tensor -> its shape.
    plain: Mapping[str, tuple[int, ...]]
    # Stored tensors that config.json does not promise.
    stray: tuple[str, ...]
    # The config groups of compressed-tensors, and why they could not be read.
    groups: tuple[Group, ...] = ()
    unread: str | None = None
    tensor_parallel: int = 1
    # Unit -> its matrices.
    units: Mapping[str, list[Kept]] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        return None if self.block is None else str(self.block.get("quant_method"))

    @property
    def experts(self) -> list[Kept]:
        return [kept for kept in self.kept.values() if kept.role is Role.EXPERT]

    def heads(self) -> tuple[int, int]:
        text = self.adapter.text_config
        return int(text.num_attention_heads), int(text.num_key_value_heads)


def look(
    config: dict[str, Any], block: object, adapter: Adapter, infos: Mapping[str, TensorInfo], tensor_parallel: int = 1
) -> View:
    """Sort the headers into a View. Raises nothing."""
    kept = {k.module: k for k in _matrices(adapter, infos)}
    units: dict[str, list[Kept]] = {}
    for matrix in kept.values():
        units.setdefault(matrix.unit, []).append(matrix)
    plain = {n: s for n, s in adapter.expected().items() if n.removesuffix(".weight") not in kept}
    used = (
        {f"{m.module}.{leaf}" for m in kept.values() for leaf in m.parts} | {m.tensor for m in kept.values()} | {*plain}
    )
    stray = tuple(n for n in sorted(infos) if n not in used and not ASIDE.fullmatch(n))
    settings = dict(block) if isinstance(block, dict) else None
    groups, unread = _groups(settings)
    return View(
        config=config,
        block=settings,
        adapter=adapter,
        infos=infos,
        kept=kept,
        plain=plain,
        stray=stray,
        groups=groups,
        unread=unread,
        tensor_parallel=tensor_parallel,
        units=units,
    )


def _groups(block: dict[str, Any] | None) -> tuple[tuple[Group, ...], str | None]:
    if block is None or block.get("quant_method") != COMPRESSED_TENSORS:
        return (), None
    try:
        return tuple(read_groups(block)), None
    except Exception as error:  # pydantic's errors and the package's own
        return (), " ".join(str(error).split())


def _matrices(adapter: Adapter, infos: Mapping[str, TensorInfo]) -> Iterator[Kept]:
    for block in range(adapter.n_blocks):
        for site, module, outputs, inputs in adapter.modules(block):
            parts = {leaf: infos[f"{module}.{leaf}"] for leaf in LEAVES if f"{module}.{leaf}" in infos}
            states = {name: infos[f"{module}.{name}"] for name in _nf4_parts(module, infos)}
            kind, tensor = _kind(adapter, module, parts, states, infos)
            bits, group = _width(kind, parts, (outputs, inputs))
            if kind is Kind.FUSED:
                parts["stack"] = infos[tensor]
            yield Kept(
                module=module,
                role=site.role,
                unit=adapter.unit(module),
                shape=(outputs, inputs),
                kind=kind,
                tensor=tensor,
                parts=parts | states,
                bits=bits,
                group=group,
                split=adapter.split(f"{module}.weight"),
            )


def _nf4_parts(module: str, infos: Mapping[str, TensorInfo]) -> list[str]:
    names = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
        "quant_state.bitsandbytes__fp4",
    ]
    return [f"weight.{name}" for name in names if f"{module}.weight.{name}" in infos]


def _kind(
    adapter: Adapter,
    module: str,
    parts: Mapping[str, TensorInfo],
    states: Mapping[str, TensorInfo],
    infos: Mapping[str, TensorInfo],
) -> tuple[Kind, str]:
    """The kind, and the tensor that holds the values; for a missing matrix, the name that it should have."""
    leaf, kind = next(((leaf, kind) for leaf, kind in TELLS if leaf in parts), ("weight", Kind.MISSING))
    if kind is Kind.PLAIN and parts[leaf].dtype not in FLOATS:
        kind = Kind.NF4 if parts[leaf].dtype == "U8" or states else Kind.CODES
    if kind is Kind.MISSING:
        fused = adapter.fused_tensor(module)
        # Packed fused experts append to this name: gate_up_proj.weight_packed, gate_up_proj_scale.
        found = None if fused is None else next((n for n in (fused, *_behind(fused)) if n in infos), None)
        if found is not None:
            return Kind.FUSED, found
    return kind, f"{module}.{leaf}"


def _behind(fused: str) -> list[str]:
    return [f"{fused}{mark}{leaf}" for leaf in LEAVES for mark in (".", "_")] + [f"{fused}_packed", f"{fused}_scale"]


def _width(kind: Kind, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> tuple[int | None, int | None]:
    """Bits and inputs per scale, from the shapes of codes and scales; None when they fit no width."""
    outputs, inputs = shape
    if kind is Kind.PACKED:
        codes, scales = parts["weight_packed"].shape, parts.get("weight_scale")
        bits = next((b for b in (4, 8, 2, 3, 5, 6, 7) if codes == (outputs, words_for(inputs, b))), None)
        groups = 1 if scales is not None and len(scales.shape) == 1 else scales.shape[-1] if scales is not None else 0
    elif kind is Kind.GPTQ:
        codes, scales = parts["qweight"].shape, parts.get("scales")
        bits = next((b for b in (4, 8, 2, 3) if codes == (words_for(inputs, b), outputs)), None)
        groups = scales.shape[0] if scales is not None and scales.shape else 0
    elif kind is Kind.CODES:
        scales = parts.get("weight_scale")
        bits, groups = 8, scales.shape[-1] if scales is not None and len(scales.shape) == 2 else 1
    else:
        return None, None
    return bits, inputs // groups if groups and inputs % groups == 0 else None
