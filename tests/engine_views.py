"""Drafts: headers of a sound checkpoint in each layout, by its specification, without files; tests break them."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from onecard.checkpoint.engines.view import View, look
from onecard.core.tensors import TensorInfo
from onecard.models.adapter import Adapter

GROUP = 32
Infos = dict[str, TensorInfo]


@dataclass
class Draft:
    """The parts that a test changes: headers, config.json's block, and the number of cards."""

    adapter: Adapter
    infos: Infos
    block: dict[str, Any] | None
    tensor_parallel: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    def view(self) -> View:
        return look(self.config, self.block, self.adapter, self.infos, self.tensor_parallel)

    def matrix(self, end: str, block: int = 0) -> tuple[str, int, int]:
        """(module, outputs, inputs) of the block's one matrix with this end of its name."""
        return next((m, o, i) for _, m, o, i in self.adapter.modules(block) if m.endswith(end))

    def drop(self, module: str) -> None:
        for name in [name for name in self.infos if name.startswith(f"{module}.")]:
            del self.infos[name]

    def put(self, module: str, parts: Infos) -> None:
        self.drop(module)
        self.infos |= {f"{module}.{leaf}": info for leaf, info in parts.items()}


def packed(outputs: int, inputs: int, bits: int = 4, group: int = GROUP, symmetric: bool = True) -> Infos:
    """The stored parts of a matrix in compressed-tensors' pack-quantized layout."""
    parts = {
        "weight_packed": TensorInfo((outputs, inputs * bits // 32), "I32"),
        "weight_scale": TensorInfo((outputs, inputs // group), "BF16"),
        "weight_shape": TensorInfo((2,), "I64"),
    }
    if not symmetric:
        parts["weight_zero_point"] = TensorInfo((outputs * bits // 32, inputs // group), "I32")
    return parts


def gptq(outputs: int, inputs: int, bits: int = 4, group: int = GROUP) -> Infos:
    return {
        "qweight": TensorInfo((inputs * bits // 32, outputs), "I32"),
        "qzeros": TensorInfo((inputs // group, outputs * bits // 32), "I32"),
        "scales": TensorInfo((inputs // group, outputs), "F16"),
        "g_idx": TensorInfo((inputs,), "I32"),
    }


def plain(outputs: int, inputs: int) -> Infos:
    return {"weight": TensorInfo((outputs, inputs), "BF16")}


def group_of(bits: int = 4, size: int = GROUP, targets: tuple[str, ...] = ("Linear",), symmetric: bool = True) -> Any:
    return {
        "targets": list(targets),
        "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size},
    }


def drafted(adapter: Adapter, layout: Callable[..., Infos] | None, keep: tuple[str, ...] = ()) -> Draft:
    """Every matrix of the text blocks in `layout` (None: bf16 as published). Names that end in one of `keep` stay in
    bf16, as do all other tensors."""
    if layout is None:
        names = {name: TensorInfo(shape, "BF16") for name, shape in adapter.disk_shapes(()).items()}
        return Draft(adapter, names, None)
    draft = Draft(adapter, {name: TensorInfo(shape, "BF16") for name, shape in adapter.expected().items()}, None)
    for block in range(adapter.n_blocks):
        for _, module, outputs, inputs in adapter.modules(block):
            if not module.endswith(keep or ("/",)):
                draft.put(module, layout(outputs, inputs))
    whole = [n.removesuffix(".weight") for n, i in draft.infos.items() if n.endswith(".weight") and len(i.shape) == 2]
    draft.block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group_of()},
        "ignore": whole,
    }
    if layout is gptq:
        dynamic = {f"-:.*{end}$": {} for end in keep}
        draft.block = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "dynamic": dynamic,
        }
    return deepcopy(draft)
