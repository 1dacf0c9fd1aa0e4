"""PackedSource: a quantized checkpoint, ours or another tool's, as a TensorSource of dequantized weights.

Wherever a folder holds a weight in parts, this source offers the weight itself under its own name, in the dtype that
the format reads it as; every other tensor is passed through. What the verification walks over is therefore exactly what
was written to disk. A weight is read and unpacked when it is asked for, and nothing is kept: an expert costs an expert.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import InputError, input_error
from ..core.quantized_weight import QuantizedWeight
from ..core.tensors import TORCH_DTYPES, Index, TensorInfo
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
    """`label`: the format in words. `weights`: every dense weight that is stored in parts. `virtual`: all names that
    the source gives, with what they read as. `warnings`: what the numbers leave out."""

    folder: Folder
    label: str
    weights: dict[str, StoredWeight]
    virtual: dict[str, TensorInfo]
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> Collection[str]:
        return self.virtual.keys()

    @property
    def schemes(self) -> dict[str, str]:
        """Module -> its width in words, for every module `X` whose `X.weight` is stored in parts."""
        return {n.removesuffix(".weight"): w.width for n, w in self.weights.items() if n.endswith(".weight")}

    def info(self, name: str) -> TensorInfo:
        return self.virtual[name]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        if name not in self.weights:
            return self.folder.get(name, index)
        return self.dense(name, TORCH_DTYPES[self.virtual[name].dtype], index)

    def dense(self, name: str, dtype: torch.dtype, index: Index = ()) -> torch.Tensor:
        """A weight that is stored in parts, in any dtype; of fused experts one alone if `index` names it."""
        weight = self.weights[name]
        first = index[0] if index and weight.by_expert and isinstance(index[0], int) else None
        parts = {
            part: self.folder.get(stored, () if first is None or part not in weight.by_expert else (first,))
            for part, stored in weight.parts.items()
        }
        if first is not None:
            # What is not by expert is shared: its axis of experts has one place.
            parts = {
                part: value if part in weight.by_expert or value.ndim < 3 else value[0] for part, value in parts.items()
            }
            index = index[1:]
        try:
            dense = weight.decode(parts, dtype)
        except ValueError as error:
            raise InputError(f"{name} in {self.folder.path}: {error}: the checkpoint is damaged") from None
        return dense[index].contiguous() if index else dense

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A weight that is integer codes as those codes, bit for bit; None of every other. Raises InputError when its
        parts contradict each other."""
        weight = self.weights.get(name)
        if weight is None or weight.codes is None:
            return None
        try:
            return weight.codes({part: self.folder.get(stored) for part, stored in weight.parts.items()})
        except ValueError as error:
            raise InputError(f"{name} in {self.folder.path}: {error}: the checkpoint is damaged") from None


def open_packed(folder: Folder, quantization_config: object) -> PackedSource:
    """Read the config block and the headers (and the few bytes that say a weight's shape). Raises InputError for
    formats or tensors that are not understood, with every offender."""
    if not isinstance(quantization_config, dict):
        raise InputError(f"{folder.path / 'config.json'}: its quantization_config is no object")
    method = quantization_config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise InputError(
            f"{folder.path} is quantized by {method!r}; onecard reads {', '.join(READERS)}, and weights in bf16, "
            "fp16 and fp32 that are not quantized"
        )
    reading = READERS[method](folder, quantization_config)
    if not reading.weights and not reading.problems:
        reading.problems.append(f"config.json says {method}, and not one weight is stored so")
    taken = {stored for weight in reading.weights.values() for stored in weight.parts.values()} | reading.aside
    virtual = {name: info for name, info in folder.infos.items() if name not in taken}
    reading.problems += [
        f"{name} is stored twice, quantized and as it was" for name in reading.weights if name in virtual
    ]
    if reading.problems:
        shown = reading.problems[:MOST_SHOWN]
        if len(reading.problems) > MOST_SHOWN:
            shown.append(f"... and {len(reading.problems) - MOST_SHOWN} more")
        raise input_error(
            f"{folder.path} is no sound {method} checkpoint:",
            shown,
            "Fetch it again, config.json and all weights of one revision, or let the tool that made it save it in a "
            "format named above.",
        )
    virtual |= {name: weight.info for name, weight in reading.weights.items()}
    return PackedSource(folder, reading.label, reading.weights, virtual, tuple(reading.warnings))
