"""Conversion: an opened checkpoint laid out anew as safetensors, for every format that `onecard export` writes.

Integer codes pass from reader to writer unchanged. NF4 is no grid of integers, so it alone quantizes again. Otherwise
only what a format cannot store is rounded: scales to fp16 (GPTQ), dequantized weights to bf16. Everything is planned
from headers and written shard by shard, with one shard in memory. The files of `model` need not exist yet: planning
uses names, shapes and schemes only.

Each `to_*.py` of this room adds one format: `problems` (why it cannot hold a model), `lay_out` and `config`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.emit import ShardWriter
from ..checkpoint.model import Model
from ..checkpoint.packed import PackedSource
from ..checkpoint.plan import Layout, Shard, make_plan, pieces_of, shards_of
from ..core.errors import DamageError, InputError
from ..core.finite import all_finite, count_nonfinite
from ..core.layout import StoredTensor
from ..core.quantized_weight import QuantizedWeight
from ..core.rows import Step
from ..core.scheme import Scheme
from ..models.adapter import QUANTIZABLE, Adapter, Role
from ..models.slabs import slabs_of

# Small enough for the hub, and for the memory of a small machine beside the weights that are being converted.
MAX_SHARD_BYTES = 5_000_000_000
MOST_NAMED = 3


@dataclass(frozen=True)
class Conversion:
    """What will be written."""

    shards: tuple[Shard, ...]
    # Module -> the scheme that it is stored in.
    schemes: dict[str, Scheme]
    # Stored tensor -> the name that `make` takes to produce it, alone or with others.
    made_of: dict[str, str]
    # One of those names -> the tensors that it becomes, by their stored names.
    make: Callable[[str], dict[str, torch.Tensor]]


def shards_for(parts: list[list[list[StoredTensor]]]) -> tuple[Shard, ...]:
    """The files for the tensors of each part of the model (checkpoint/plan.py)."""
    return shards_of(pieces_of(parts, MAX_SHARD_BYTES), MAX_SHARD_BYTES)


def write(conversion: Conversion, out: Path, step: Step) -> None:
    """Write every shard; each file appears complete or not at all."""
    for shard in conversion.shards:
        step.begin(f"write {shard.file}")
        writer = ShardWriter([shard], out)
        for name in writer.names():
            if not writer.has(name):
                for stored, tensor in conversion.make(conversion.made_of[name]).items():
                    writer.put(stored, tensor)
        writer.check_complete()


def coded(model: Model) -> dict[str, Scheme]:
    """Module -> Scheme of every weight that is stored as integer codes, sorted by name."""
    return {
        name.removesuffix(".weight"): weight.scheme
        for name, weight in sorted(model.packed.items())
        if weight.scheme is not None and name.endswith(".weight")
    }


def dense(model: Model, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The canonical tensor `name`.

    A weight that is stored in parts is rounded once to `dtype` (None: the dtype that its format reads as). Any other
    tensor is returned as stored. Raises DamageError for numbers that are not finite.
    """
    ((_, tensor),) = dense_each(model, [name], dtype)
    return tensor


def dense_each(
    model: Model, names: Iterable[str], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `dense`, for several tensors. What they are cut from is read once."""
    for slab in slabs_of(model.adapter, model.source, names):
        tensor, leading = slab.key
        if dtype is not None and tensor in model.packed and isinstance(model.source, PackedSource):
            whole = model.source.dense(tensor, dtype, leading)
        else:
            whole = model.source.get(tensor, leading)
        for name, weight in slab.weights(whole):
            _refuse_nonfinite(model, name, weight)
            yield name, weight.contiguous()


def codes(model: Model, module: str) -> QuantizedWeight:
    """The codes of a module that `coded` lists. Raises DamageError for scales that are not finite."""
    assert isinstance(model.source, PackedSource)
    weight = model.source.quantized(f"{module}.weight")
    assert weight is not None, module
    _refuse_nonfinite(model, f"the scales of {module}", weight.scales)
    return weight


def _refuse_nonfinite(model: Model, what: str, tensor: torch.Tensor) -> None:
    if not all_finite(tensor):
        raise DamageError(
            f"{model.name} is damaged: {what} hold {count_nonfinite(tensor)}. Nothing that loads was written. `onecard "
            "check` lists every such tensor; fetch the files again, or make them anew"
        )


def listed(names: list[str]) -> str:
    """The first MOST_NAMED names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def code_problems(model: Model, problem: Callable[[str, Scheme, tuple[int, ...]], str | None]) -> list[str]:
    """Every reason why a format of integer codes cannot hold a model.

    `problem`: module, scheme and shape -> the format's own reason against that matrix, or None.
    """
    if not model.packed:
        return ["nothing in it is quantized: quantize it first, with `onecard quantize` and this format in the recipe"]
    reasons: dict[str, list[str]] = {}
    for name, weight in model.packed.items():
        module = name.removesuffix(".weight")
        if weight.scheme is None:
            why: str | None = f"stored as {weight.width}, which has no integer codes in plain groups"
        elif model.adapter.role(name) not in QUANTIZABLE:
            why = f"quantized, and no matrix of a block ({model.adapter.role(name).value})"
        else:
            why = problem(module, weight.scheme, weight.info.shape)
        if why is not None:
            reasons.setdefault(why, []).append(module)
    return [f"{listed(names)}: {why}" for why, names in reasons.items()]


def lay_out_codes(
    model: Model, schemes: dict[str, Scheme], layout: Layout, pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]]
) -> Conversion:
    """A conversion that keeps the codes of the modules in `schemes`; everything else becomes or stays dense."""
    return lay_out_parts(model, schemes, layout, lambda module: pack(codes(model, module)))


def lay_out_parts(
    model: Model, schemes: dict[str, Scheme], layout: Layout, parts: Callable[[str], dict[str, torch.Tensor]]
) -> Conversion:
    """`parts`: module -> its stored tensors by suffix. It raises ValueError for a weight that they cannot hold, which
    becomes an InputError."""
    plan = make_plan(model.adapter, model.source, schemes, layout, MAX_SHARD_BYTES, 0)
    shapes = model.adapter.expected()
    made_of = {stored.name: stored.name for _, stored in plan.tensors()}
    for module, scheme in schemes.items():
        outputs, inputs = shapes[f"{module}.weight"]
        made_of |= {f"{module}.{leaf}": f"{module}.weight" for leaf in layout(scheme, outputs, inputs, "F16")}

    def make(name: str) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        if module not in schemes:
            return {name: dense(model, name)}
        try:
            return {f"{module}.{leaf}": tensor for leaf, tensor in parts(module).items()}
        except ValueError as error:
            raise InputError(
                f"{module} {error}: export it to another format (compressed-tensors holds all scales)"
            ) from None

    return Conversion(plan.shards, schemes, made_of, make)


def kept_linears(adapter: Adapter, schemes: Iterable[str]) -> list[str]:
    """Every Linear module that is not in `schemes`."""
    no_linear = (Role.EMBEDDING, Role.NORM)
    kept = [
        name.removesuffix(".weight")
        for name, shape in adapter.expected().items()
        if len(shape) == 2
        and name.endswith(".weight")
        and adapter.role(name) not in no_linear
        and name.removesuffix(".weight") not in {*schemes}
    ]
    return sorted([*kept, "lm_head"] if adapter.tied_head else kept)


def sizes(adapter: Adapter) -> dict[str, int]:
    """Module -> number of weights, for every module of the blocks."""
    return {m: outputs * inputs for b in range(adapter.n_blocks) for _, m, outputs, inputs in adapter.modules(b)}


def units(adapter: Adapter) -> dict[str, str]:
    """Module -> the unit that engines fuse it into, for every module of the blocks."""
    return {
        module: adapter.unit(module) for block in range(adapter.n_blocks) for _, module, _, _ in adapter.modules(block)
    }


def plain_config(model: Model) -> dict[str, Any]:
    """config.json without quantization blocks, and with the family's published faults mended."""
    said = ("quantization_config", "compression_config")
    config = {key: value for key, value in model.adapter.emitted(model.config).items() if key not in said}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in said}
    return config
