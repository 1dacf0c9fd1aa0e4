"""What a rule is, and the rules that several engines share.

A rule is a pure function of a View that gives one line per offender, together with its name, its severity, the way out
for the user, and its place in the engine's source (docs/engines.md is a table of the rules). A checkpoint that breaks
an `error` rule does not load, or loads and answers nonsense. One that breaks a `warning` rule loads, but not
everywhere, or larger than intended. Each engine's rules are a tuple; there is no registry.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ...models.adapter import Role
from ...models.cache import Split
from ..formats.stored_weight import FLOATS
from .view import COMPRESSED_TENSORS, PARTS, Kept, Kind, View

# A message shows this many offenders of a rule; the JSON line has them all.
SHOWN = 8


@dataclass(frozen=True)
class Rule:
    name: str
    severity: Literal["error", "warning"]
    look: Callable[[Any], Iterable[str]]
    way_out: str
    source: str


@dataclass(frozen=True)
class Breach:
    """A rule that a checkpoint breaks, and the offenders."""

    rule: Rule
    offenders: tuple[str, ...]

    def line(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            "rule": self.rule.name,
            "severity": self.rule.severity,
            "offenders": list(self.offenders),
            "way_out": self.rule.way_out,
            "source": self.rule.source,
        }

    def told(self) -> str:
        """For people: the first offenders, and the way out."""
        more = len(self.offenders) - SHOWN
        shown = [*self.offenders[:SHOWN], *([f"and {more} more, all in the JSON line"] if more > 0 else [])]
        return "\n".join([f"{self.rule.name}:", *(f"    - {line}" for line in shown), f"    {self.rule.way_out}"])


def hold(view: Any, rules: Iterable[Rule]) -> list[Breach]:
    """Every rule that the view breaks, in order."""
    found = [Breach(rule, tuple(rule.look(view))) for rule in rules]
    return [breach for breach in found if breach.offenders]


# --- what config.json announces


def announced(view: View, matrix: Kept) -> tuple[int, int, bool] | None:
    """(bits, inputs per scale, symmetric) that compressed-tensors' block assigns to the matrix; None if it is not
    quantized. A target that names the module or its unit takes precedence over an expression, and that over a class."""
    if ignored(view, matrix.module) or ignored(view, matrix.unit):
        return None
    aims = [(max(g.aims_at(matrix.module), g.aims_at(matrix.unit)), -at, g) for at, g in enumerate(view.groups)]
    strength, _, group = max(aims, key=lambda aim: aim[:2], default=(0, 0, None))
    if not strength or group is None:
        return None
    size = group.group_size if group.strategy == "group" else matrix.shape[1]
    return group.bits, size, group.symmetric


def ignored(view: View, module: str) -> bool:
    """Whether `ignore` matches the module, by name or expression."""
    return any(_matches(str(entry), module) for entry in (view.block or {}).get("ignore") or [])


def _matches(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    try:
        return re.match(entry[3:], module) is not None
    except re.error:
        return False


def said(width: tuple[int, int, bool], inputs: int) -> str:
    bits, size, symmetric = width
    over = "by row" if size == inputs else f"group {size}"
    return f"int{bits} {over}" + ("" if symmetric else " asymmetric")


# --- rules over the files alone


def fused_experts(view: View) -> Iterator[str]:
    """Experts in 3-D tensors, although the block says that they are quantized one by one."""
    quantized = [m for m in view.experts if m.kind is Kind.FUSED and not ignored(view, m.module)]
    if view.block is None:
        return
    for tensor in dict.fromkeys(m.tensor for m in quantized):
        info = view.infos[tensor]
        yield f"{tensor} ({info.dtype} {list(info.shape)}) holds all experts of its layer"


def missing_parts(view: View) -> Iterator[str]:
    for matrix in view.kept.values():
        lacking = [part for part in PARTS.get(matrix.kind, ()) if part not in matrix.parts]
        yield from (f"{matrix.module}.{part} is missing beside {matrix.tensor.rpartition('.')[2]}" for part in lacking)


def one_scheme(view: View) -> Iterator[str]:
    """Units that the engine fuses and that have several widths."""
    for unit, members in view.units.items():
        found = widths(members)
        if len(found) > 1:
            told = [f"{width} ({_named(unit, modules)})" for width, modules in found.items()]
            yield f"{unit} holds {' and '.join(told)}"


def widths(members: list[Kept]) -> dict[str, list[str]]:
    """Width in words -> modules. One group that fills its row counts as `by row` only if that is so for all members;
    otherwise it counts by its size, since rows may differ in length."""
    there = [m for m in members if m.kind is not Kind.MISSING]
    by_row = all(m.group == m.shape[1] for m in there if m.quantized)
    found: dict[str, list[str]] = {}
    for matrix in there:
        found.setdefault(matrix.said(by_row), []).append(matrix.module)
    return found


def _named(unit: str, modules: list[str]) -> str:
    """'q_proj, k_proj', '3.up_proj and 46 more'."""
    short = [m.removeprefix(f"{unit}.") if m.startswith(f"{unit}.") else m.rpartition(".")[2] for m in modules]
    return ", ".join(short) if len(short) < 4 else f"{short[0]} and {len(short) - 1} more"


def names(view: View) -> Iterator[str]:
    """Tensors that config.json promises and that are missing, and tensors that it does not promise."""
    for matrix in view.kept.values():
        if matrix.kind is Kind.MISSING:
            yield f"{matrix.tensor} is missing"
    yield from (f"{name} is missing" for name in view.plain if name not in view.infos and not _packed(view, name))
    yield from (f"{name} is no name that the model has" for name in view.stray if not _of_plain(view, name))


def _packed(view: View, name: str) -> bool:
    stem = name.removesuffix(".weight")
    return any(f"{stem}.{leaf}" in view.infos for leaf in ("weight_packed", "qweight"))


def _of_plain(view: View, name: str) -> bool:
    """Whether it is a part of a packed head or vision tower, which another rule reports."""
    return f"{name.rpartition('.')[0]}.weight" in view.plain and view.adapter.role(name) in (Role.VISION, Role.HEAD)


def shapes(view: View) -> Iterator[str]:
    """Unquantized tensors whose shape contradicts config.json, and packed ones that no width explains."""
    for name, shape in view.plain.items():
        info = view.infos.get(name)
        if info is not None and info.shape != shape and info.dtype in FLOATS:
            yield f"{name} is {list(info.shape)}, and config.json says {list(shape)}"
    for matrix in view.kept.values():
        info = matrix.parts.get("weight")
        if matrix.kind is Kind.PLAIN and info is not None and info.shape != matrix.shape:
            yield f"{matrix.tensor} is {list(info.shape)}, and config.json says {list(matrix.shape)}"
        elif matrix.kind in (Kind.PACKED, Kind.GPTQ) and matrix.bits is None:
            stored = view.infos[matrix.tensor].shape
            yield f"{matrix.tensor} is {list(stored)}, which no width gives a weight of {list(matrix.shape)}"


def as_announced(view: View) -> Iterator[str]:
    """Quantized matrices that are not stored as the config groups say. `ignore_list` reports unquantized ones."""
    if view.method != COMPRESSED_TENSORS or view.unread is not None:
        return
    for matrix in view.kept.values():
        wanted = announced(view, matrix)
        if matrix.kind not in (Kind.PACKED, Kind.CODES) or matrix.bits is None or matrix.group is None:
            continue
        stored = (matrix.bits, matrix.group, not matrix.zero_points)
        if wanted is None:
            yield f"{matrix.module} is kept as {matrix.width}, and config.json says that it stays whole"
        elif stored != wanted:
            yield f"{matrix.module} is kept as {matrix.width}, and config.json says {said(wanted, matrix.shape[1])}"


def ignore_list(view: View) -> Iterator[str]:
    """Unquantized matrices that config.json says are quantized."""
    if view.method != COMPRESSED_TENSORS or view.unread is not None:
        return
    for matrix in view.kept.values():
        wanted = announced(view, matrix)
        if matrix.kind is Kind.PLAIN and wanted is not None:
            yield f"{matrix.module} is kept as {matrix.width}, and config.json says {said(wanted, matrix.shape[1])}"


def ignore_others(view: View) -> Iterator[str]:
    """Head, routers and vision tower where `ignore` does not list them, so that a class target includes them."""
    if view.method != COMPRESSED_TENSORS or not any("Linear" in group.targets for group in view.groups):
        return
    for name, shape in view.plain.items():
        module, _, leaf = name.rpartition(".")
        linear = (
            leaf == "weight" and len(shape) == 2 and view.adapter.role(name) in (Role.ROUTER, Role.HEAD, Role.VISION)
        )
        # `ignore` may list the head by its last name alone.
        if linear and not ignored(view, module) and not ignored(view, module.rpartition(".")[2]):
            yield f"{module} is kept whole and is not in `ignore`"


def config_read(view: View) -> Iterator[str]:
    if view.unread is not None:
        yield f"config.json's quantization_config is not understood: {view.unread}"


def vision_untouched(view: View) -> Iterator[str]:
    """Tensors of the vision tower and the projector that are packed or integers."""
    for name in sorted(view.infos):
        if view.adapter.has_vision and view.adapter.role(name) is Role.VISION:
            leaf = name.rpartition(".")[2]
            if view.infos[name].dtype not in FLOATS or leaf in ("weight_packed", "weight_scale", "qweight", "scales"):
                yield f"{name} is {view.infos[name].dtype}"


def experts_whole(view: View) -> Iterator[str]:
    """Experts in bf16 although the checkpoint says that it is quantized."""
    whole = [m for m in view.experts if m.kind in (Kind.PLAIN, Kind.FUSED) and m.width in FLOATS]
    if view.block is None or not whole:
        return
    layers = {m.unit for m in whole}
    bytes_whole = sum(view.infos[tensor].nbytes for tensor in {m.tensor for m in whole})
    share = bytes_whole / max(1, sum(info.nbytes for info in view.infos.values()))
    yield (
        f"{len(whole):,} of {len(view.experts):,} expert matrices, in {len(layers)} layers, are kept as "
        f"{whole[0].width}: {bytes_whole / 1e9:.3g} GB, {share:.0%} of all bytes"
    )


def tensor_parallel(view: View) -> Iterator[str]:
    """Heads, experts and groups of scales that the ranks cannot share evenly."""
    ranks, (q, kv) = view.tensor_parallel, view.heads()
    if q % ranks:
        yield f"{q} attention heads over {ranks} ranks"
    if kv % ranks and ranks % kv:
        yield f"{kv} key-value heads over {ranks} ranks"
    told: dict[str, None] = {}
    for matrix in view.kept.values():
        # With more ranks than key-value heads, k and v are copied.
        if matrix.split is Split.COPIED or (matrix.split is Split.KV_HEADS and ranks > kv):
            continue
        outputs, inputs = matrix.shape
        split_inputs = matrix.split is Split.INPUTS
        if (inputs if split_inputs else outputs) % ranks:
            told[f"{_called(matrix)}: {inputs if split_inputs else outputs} over {ranks} ranks"] = None
        elif matrix.group is not None and matrix.group < inputs and split_inputs and (inputs // ranks) % matrix.group:
            told[f"{_called(matrix)}: {inputs // ranks} inputs a rank in groups of {matrix.group}"] = None
        elif matrix.zero_points and matrix.bits and not split_inputs and (outputs // ranks) % (32 // matrix.bits):
            told[f"{_called(matrix)}: {outputs // ranks} packed zero points a rank"] = None
    yield from told


def _called(matrix: Kept) -> str:
    return f"{matrix.role.value} {matrix.module.rpartition('.')[2]}"
