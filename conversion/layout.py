"""A checkpoint that is read, written anew as safetensors: compressed-tensors, GPTQ's layout, NF4, or dense bf16.

Codes pass from reader to writer as they are; NF4 alone, which is no grid of integers, is quantized anew, from whatever
the weights read as. Nothing is rounded but what a format cannot hold otherwise: scales to fp16
(GPTQ), and weights that are dequantized to bf16. Everything is planned from headers, and written shard by shard, one
in memory at a time. `model` may be one whose files are not written yet: `can_hold`, `lay_out_*` and `config_*` look at
names, shapes and schemes alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.emit import ShardWriter
from ..checkpoint.formats import bitsandbytes_write, gptq_write
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.formats import compressed_tensors_write as ct
from ..checkpoint.model import Model
from ..checkpoint.packed import PackedSource
from ..checkpoint.plan import Layout, Shard, by_part, make_plan, shards_of
from ..core.errors import InputError
from ..core.layout import StoredTensor
from ..core.quantized_weight import QuantizedWeight
from ..core.rows import Step
from ..core.scheme import NF4, NF4_BLOCK, Scheme
from ..core.tensors import TORCH_DTYPES
from ..models.adapter import QUANTIZABLE, Adapter, Location, Role

# A shard that a hub takes, and that fits beside what is made from it in the memory of a small machine.
MAX_SHARD_BYTES = 5_000_000_000
MOST_NAMED = 3
# What keeps q and k of Llama 4 in 16 bits in GPTQ's layout; said in the files' own config, too.
PERMUTED = (
    "engines permute the rows of these weights for RoPE when they load them: of `weight`, not of `qweight`, "
    "`scales` and `qzeros`. Quantized they would be garbled; they, and what is fused with them, are in 16 bits"
)


@dataclass(frozen=True)
class Conversion:
    """What is to be written. `made_of`: stored tensor -> what `make` gives it with others. `make`: of one of these the
    tensors that it becomes, by their stored names. `schemes`: module -> what it is stored as."""

    shards: tuple[Shard, ...]
    schemes: dict[str, Scheme]
    made_of: dict[str, str]
    make: Callable[[str], dict[str, torch.Tensor]]


def write(conversion: Conversion, out: Path, step: Step) -> None:
    """Every shard, each whole or not at all."""
    for shard in conversion.shards:
        step.begin(f"write {shard.file}")
        writer = ShardWriter([shard], out)
        for name in writer.names():
            if not writer.has(name):
                for stored, tensor in conversion.make(conversion.made_of[name]).items():
                    writer.put(stored, tensor)
        writer.check_complete()


def coded(model: Model) -> dict[str, Scheme]:
    """Module -> Scheme of every weight that is stored as integer codes, sorted: what is said of them has one order."""
    return {
        name.removesuffix(".weight"): weight.scheme
        for name, weight in sorted(model.packed.items())
        if weight.scheme is not None and name.endswith(".weight")
    }


def dense(model: Model, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The canonical tensor `name`: what is stored in parts in `dtype`, rounded to it once (None: as its format reads
    it); what is stored as it was, as it was."""
    where = model.adapter.locate(name, model.source.names)
    if dtype is not None and where.tensor in model.packed and isinstance(model.source, PackedSource):
        tensor = model.source.dense(where.tensor, dtype, where.index)
    else:
        tensor = model.source.get(where.tensor, where.index)
    return tensor.T.contiguous() if where.transposed else tensor


def codes(model: Model, module: str) -> QuantizedWeight:
    """The codes of a module that `coded` names."""
    assert isinstance(model.source, PackedSource)
    weight = model.source.quantized(f"{module}.weight")
    assert weight is not None, module
    return weight


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def can_hold(model: Model, problem: Callable[[str, Scheme, tuple[int, ...]], str | None]) -> list[str]:
    """Every reason why a format of integer codes cannot hold a model. `problem`: of a module's name, scheme and shape,
    the same."""
    if not model.packed:
        return ["nothing in it is quantized: quantize it first, with `onecard quantize` and this format in the recipe"]
    reasons: dict[str, list[str]] = {}
    for name, weight in model.packed.items():
        module = name.removesuffix(".weight")
        if weight.scheme is None:
            why: str | None = f"stored as {weight.width}, which has no integer codes in plain groups"
        elif model.adapter.role(name) not in QUANTIZABLE:
            why = f"quantized and no matrix of a block ({model.adapter.role(name).value})"
        else:
            why = problem(module, weight.scheme, weight.info.shape)
        if why is not None:
            reasons.setdefault(why, []).append(module)
    return [f"{_listed(names)}: {why}" for why, names in reasons.items()]


def _as_codes(
    model: Model, schemes: dict[str, Scheme], layout: Layout, pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]]
) -> Conversion:
    return _in_parts(model, schemes, layout, lambda module: pack(codes(model, module)))


def _in_parts(
    model: Model, schemes: dict[str, Scheme], layout: Layout, parts: Callable[[str], dict[str, torch.Tensor]]
) -> Conversion:
    """`parts`: of a module its stored tensors by suffix. Raises ValueError for what they cannot hold."""
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
    """Module -> number of weights, of every module of the blocks."""
    return {m: outputs * inputs for b in range(adapter.n_blocks) for _, m, outputs, inputs in adapter.modules(b)}


def units(adapter: Adapter) -> dict[str, str]:
    """Module -> unit, of every module of the blocks."""
    return {
        module: adapter.unit(module) for block in range(adapter.n_blocks) for _, module, _, _ in adapter.modules(block)
    }


def plain_config(model: Model) -> dict[str, Any]:
    """config.json as the family's published faults are mended, without a word of quantization."""
    said = ("quantization_config", "compression_config")
    config = {key: value for key, value in model.adapter.emitted(model.config).items() if key not in said}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in said}
    return config


# compressed-tensors


def compressed_problems(model: Model) -> list[str]:
    return can_hold(model, lambda module, scheme, shape: None)


def lay_out_compressed(model: Model) -> Conversion:
    return _as_codes(model, coded(model), ct.layout, ct.pack)


def config_compressed(model: Model) -> dict[str, Any]:
    schemes = coded(model)
    own = {module: unit for module, unit in units(model.adapter).items() if module in schemes}
    block = ct_config.quantization_config(schemes, own, sizes(model.adapter), kept_linears(model.adapter, schemes))
    return plain_config(model) | {"quantization_config": block}


# GPTQ's layout


def gptq_schemes(model: Model) -> tuple[dict[str, Scheme], list[str]]:
    """What is stored as codes, and what was and is stored in 16 bits: units with rows that engines permute."""
    found, adapter = coded(model), model.adapter
    permuted = {adapter.unit(module) for module in found if adapter.permuted_at_load(module)}
    dequantized = [module for module in found if adapter.unit(module) in permuted]
    return {module: scheme for module, scheme in found.items() if module not in {*dequantized}}, dequantized


def gptq_problems(model: Model, version: int) -> list[str]:
    schemes, _ = gptq_schemes(model)

    def problem(module: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        if module not in schemes:
            return None
        if version == 1 and not scheme.symmetric:
            return "asymmetric, and readers of version 1 differ in zero points of 0: gptq-v2 holds them"
        return gptq_write.size_problem(*shape)

    reasons = can_hold(model, problem)
    return reasons or ([] if schemes else ["all that is quantized would stay in 16 bits: " + PERMUTED])


def lay_out_gptq(model: Model, version: int) -> Conversion:
    return _as_codes(model, gptq_schemes(model)[0], gptq_write.layout, lambda weight: gptq_write.pack(weight, version))


def gptq_block(model: Model, version: int) -> dict[str, Any]:
    """What config.json and quantize_config.json say of the quantization."""
    schemes, dequantized = gptq_schemes(model)
    meta: dict[str, Any] = {"quantizer": [f"onecard:{__version__}"]}
    if dequantized:
        meta["kept_in_16_bits"] = {"modules": gptq_write.expressions(dequantized, {}), "why": PERMUTED}
    return gptq_write.quantization_config(
        schemes, kept_linears(model.adapter, schemes), units(model.adapter), sizes(model.adapter), version, meta
    )


def config_gptq(model: Model, version: int) -> dict[str, Any]:
    return plain_config(model) | {"quantization_config": gptq_block(model, version)}


# bitsandbytes' NF4

NF4_SCHEME = Scheme(4, NF4_BLOCK, True, NF4)


def nf4_schemes(model: Model) -> dict[str, Scheme]:
    """Of a quantized checkpoint what is quantized there; of an original what the recipe nf4 quantizes."""
    modules = [entry for block in range(model.adapter.n_blocks) for entry in model.adapter.modules(block)]
    names = model.source.names
    return {
        module: NF4_SCHEME
        for site, module, _, _ in modules
        if (
            model.adapter.locate(f"{module}.weight", names).tensor in model.packed
            if model.packed
            else site.role is not Role.ATTENTION
        )
    }


def nf4_problems(model: Model) -> list[str]:
    shapes = model.adapter.expected()
    wrong: dict[int, list[str]] = {}
    for module in nf4_schemes(model):
        if not NF4_SCHEME.divides(shapes[f"{module}.weight"][1]):
            wrong.setdefault(shapes[f"{module}.weight"][1], []).append(module)
    reasons = [
        f"{_listed(names)}: {inputs} inputs, and a row must be a whole number of blocks of {NF4_BLOCK}"
        for inputs, names in wrong.items()
    ]
    if any(weight.width == str(NF4_SCHEME) for weight in model.packed.values()):
        reasons.append("it is in NF4 already")
    return reasons


def nf4_warnings(model: Model) -> list[str]:
    if not model.packed:
        return []
    return [
        "NF4 is no grid of integers: no code could be kept, and what it rounds comes on top of what was rounded "
        "before. Export the original, or quantize it with method bnb-nf4, for NF4 of the weights as they were"
    ]


def lay_out_nf4(model: Model) -> Conversion:
    return _in_parts(
        model,
        nf4_schemes(model),
        bitsandbytes_write.layout,
        lambda module: bitsandbytes_write.quantize(dense(model, f"{module}.weight"), NF4_SCHEME)[0],
    )


def config_nf4(model: Model) -> dict[str, Any]:
    return config_bitsandbytes(model, nf4_schemes(model))


def config_bitsandbytes(model: Model, schemes: dict[str, Scheme]) -> dict[str, Any]:
    block = bitsandbytes_write.quantization_config(schemes, kept_linears(model.adapter, schemes))
    return plain_config(model) | {"quantization_config": block}


# Dense bf16, as the source had it


def lay_out_bf16(model: Model) -> Conversion:
    """The layout that the family's originals have: what they fuse is fused again, axis by axis as there."""
    adapter = model.adapter
    shapes = adapter.disk_shapes(())
    members: dict[str, list[tuple[str, Location]]] = {name: [] for name in shapes}
    for name in adapter.expected():
        where = adapter.locate(name, shapes.keys())
        members[where.tensor].append((name, where))

    def dtype(name: str) -> str:
        found = {adapter.locate(member, model.source.names).tensor for member, _ in members[name]}
        kept = {model.source.info(tensor).dtype for tensor in found - model.packed.keys()}
        return kept.pop() if len(kept) == 1 and not found & model.packed.keys() else "BF16"

    stored = {name: StoredTensor(name, dtype(name), shape) for name, shape in shapes.items()}

    def make(name: str) -> dict[str, torch.Tensor]:
        wanted = TORCH_DTYPES[stored[name].dtype]
        if len(members[name]) == 1 and members[name][0][1] == Location(name):
            return {name: dense(model, members[name][0][0], wanted).to(wanted)}
        whole = torch.empty(shapes[name], dtype=wanted)
        for member, where in members[name]:
            part = dense(model, member, wanted).to(wanted)
            whole[where.index] = part.T if where.transposed else part
        return {name: whole}

    parts = [[[stored[name]] for name in names] for names in by_part(adapter, shapes)]
    return Conversion(shards_of(parts, MAX_SHARD_BYTES), {}, {name: name for name in shapes}, make)


def config_bf16(model: Model) -> dict[str, Any]:
    """With the dtype that what was quantized has now; a checkpoint of which nothing was keeps what it says."""
    config = plain_config(model)
    if not model.packed:
        return config

    def said(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in values.items()}

    config = said(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = said(config["text_config"])
    return config
