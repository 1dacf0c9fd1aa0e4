"""PackedSource: a quantized checkpoint, ours or another tool's, as a TensorSource of dequantized weights.

For each weight that a folder stores in parts, this source gives the dense weight under its own name; it passes every
other tensor through. So verification runs on exactly what is on disk. A weight is read and unpacked on demand, and
nothing is cached: reading one expert costs the memory of one expert.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import InputError, input_error
from ..core.quantized_weight import QuantizedWeight
from ..core.tensors import CPU, TORCH_DTYPES, Allocate, Index, Stored, TensorInfo, pageable
from .formats import bitsandbytes_read, compressed_tensors_read, fp8_read, gptq_read
from .formats.compressed_tensors_config import NAME as COMPRESSED_TENSORS
from .formats.stored_weight import Reading, StoredWeight
from .source import Folder

READERS: dict[str, Callable[[Folder, Mapping[str, Any]], Reading]] = {
    COMPRESSED_TENSORS: compressed_tensors_read.find,
    gptq_read.NAME: gptq_read.find,
    bitsandbytes_read.NAME: bitsandbytes_read.find,
    **dict.fromkeys(fp8_read.NAMES, fp8_read.find),
}
MOST_SHOWN = 40


@dataclass(frozen=True)
class PackedSource:
    """A folder with the dense weights that its format's reader found."""

    folder: Folder
    # The format in words.
    label: str
    # Every dense weight that is stored in parts.
    weights: dict[str, StoredWeight]
    # All names that this source gives, with shape and dtype.
    virtual: dict[str, TensorInfo]
    # What a measurement of these files does not cover.
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> Collection[str]:
        return self.virtual.keys()

    @property
    def schemes(self) -> dict[str, str]:
        """Module `X` -> width in words, for every `X.weight` that is stored in parts."""
        return {n.removesuffix(".weight"): w.width for n, w in self.weights.items() if n.endswith(".weight")}

    def info(self, name: str) -> TensorInfo:
        return self.virtual[name]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        return self.stored(name, index).on(CPU)

    def stored(self, name: str, index: Index = (), allocate: Allocate = pageable) -> Stored:
        """Raises InputError when the parts contradict each other; so does making the tensor of them."""
        if name not in self.weights:
            return self.folder.stored(name, index, allocate)
        return self._packed(name, TORCH_DTYPES[self.virtual[name].dtype], index, allocate)

    def dense(self, name: str, dtype: torch.dtype, index: Index = ()) -> torch.Tensor:
        """A weight that is stored in parts, in any dtype. Raises InputError when the parts contradict each other."""
        return self._packed(name, dtype, index, pageable).on(CPU)

    def _packed(self, name: str, dtype: torch.dtype, index: Index, allocate: Allocate) -> Stored:
        """When `index` names one of fused experts, only that expert is read."""
        weight = self.weights[name]
        first = index[0] if index and weight.by_expert and isinstance(index[0], int) else None
        parts = {
            part: self.folder.stored(
                stored, () if first is None or part not in weight.by_expert else (first,), allocate
            ).on(CPU)
            for part, stored in weight.parts.items()
        }
        if first is not None:
            # A part that is not by expert is shared; its expert axis, if any, has length 1.
            parts = {
                part: value if part in weight.by_expert or value.ndim < 3 else value[0] for part, value in parts.items()
            }
            index = index[1:]

        def make(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
            try:
                dense = weight.decode(parts, dtype)
            except ValueError as error:
                raise InputError(f"{name} in {self.folder.path}: {error}: the checkpoint is damaged") from None
            return dense[index].contiguous() if index else dense

        return Stored(parts, make, weight.anywhere)

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The integer codes of a weight, bit for bit; None for a weight that has none. Raises InputError when its parts
        contradict each other."""
        weight = self.weights.get(name)
        if weight is None or weight.codes is None:
            return None
        try:
            return weight.codes({part: self.folder.get(stored) for part, stored in weight.parts.items()})
        except ValueError as error:
            raise InputError(f"{name} in {self.folder.path}: {error}: the checkpoint is damaged") from None


def open_packed(folder: Folder, quantization_config: object) -> PackedSource:
    """Open a quantized folder from its config block, headers, and the few bytes that hold a weight's shape.

    Raises InputError for an unknown format, or with every tensor that contradicts it.
    """
    if not isinstance(quantization_config, dict):
        raise InputError(f"{folder.path / 'config.json'}: its quantization_config is no object")
    method = quantization_config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise InputError(
            f"{folder.path} is quantized by {method!r}; onecard reads {', '.join(READERS)}, and unquantized weights in "
            "bf16, fp16 and fp32"
        )
    reading = READERS[method](folder, quantization_config)
    if not reading.weights and not reading.problems:
        reading.problems.append(f"config.json says {method}, and no weight is stored in that format")
    taken = {stored for weight in reading.weights.values() for stored in weight.parts.values()} | reading.aside
    virtual = {name: info for name, info in folder.infos.items() if name not in taken}
    reading.problems += [
        f"{name} is stored twice, quantized and unquantized" for name in reading.weights if name in virtual
    ]
    if reading.problems:
        raise input_error(
            f"{folder.path} is no sound {method} checkpoint:",
            reading.problems,
            "Fetch it again, config.json and all weights of one revision, or let the tool that made it save it in a "
            "format named above.",
            MOST_SHOWN,
        )
    virtual |= {name: weight.info for name, weight in reading.weights.items()}
    return PackedSource(folder, reading.label, reading.weights, virtual, tuple(reading.warnings))
