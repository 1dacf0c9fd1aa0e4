"""PackedSource: an emitted checkpoint as a TensorSource of dequantized weights.

Wherever a folder holds `X.weight_packed`, this source offers `X.weight` in the model's dtype; every other tensor is
passed through. What the verification walks over is therefore exactly what was written to disk.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..core.errors import InputError
from ..core.scheme import Scheme
from ..core.tensors import TORCH_DTYPES, Index, TensorInfo
from .formats import compressed_tensors as ct
from .source import Folder


@dataclass(frozen=True)
class PackedSource:
    """`schemes` maps each quantized module name to its scheme."""

    folder: Folder
    schemes: dict[str, Scheme]
    virtual: dict[str, TensorInfo]

    @property
    def names(self) -> Collection[str]:
        return self.virtual.keys()

    def info(self, name: str) -> TensorInfo:
        return self.virtual[name]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in self.schemes:
            return self.folder.get(name, index)
        scheme = self.schemes[module]
        suffixes = (ct.PACKED, ct.SCALE, ct.SHAPE) + (() if scheme.symmetric else (ct.ZERO,))
        stored = {s: self.folder.get(f"{module}.{s}") for s in suffixes}
        if tuple(stored[ct.SHAPE].tolist()) != self.virtual[name].shape:
            raise InputError(
                f"{module}.{ct.SHAPE} in {self.folder.path} says {stored[ct.SHAPE].tolist()}, and the codes are "
                f"{list(self.virtual[name].shape)}: the checkpoint is damaged"
            )
        weight = ct.unpack(stored, scheme)
        dense = weight.dequantize(TORCH_DTYPES[self.virtual[name].dtype])
        return dense[index] if index else dense


def open_packed(folder: Folder, quantization_config: dict[str, object]) -> PackedSource:
    """Read the config block and the headers. Raises InputError for formats or tensors that are not understood."""
    method = quantization_config.get("quant_method")
    if method != ct.NAME:
        raise InputError(f"{folder.path} is quantized by {method!r}; this command reads {ct.NAME} pack-quantized")
    try:
        groups = ct.read_schemes(dict(quantization_config))
    except Exception as error:  # the package raises pydantic's and its own kinds
        raise InputError(f"{folder.path / 'config.json'}: its quantization_config is not understood: {error}") from None
    bits = {scheme.bits for scheme in groups.values()}
    if len(bits) != 1:
        raise InputError(f"{folder.path} mixes widths {sorted(bits)}, which this version does not read")
    schemes: dict[str, Scheme] = {}
    virtual: dict[str, TensorInfo] = {}
    problems = []
    suffixes = (ct.PACKED, ct.SCALE, ct.SHAPE, ct.ZERO)
    for name, info in folder.infos.items():
        module, _, leaf = name.rpartition(".")
        if leaf == ct.PACKED:
            missing = [s for s in (ct.SCALE, ct.SHAPE) if f"{module}.{s}" not in folder.infos]
            if missing:
                problems.append(f"{module} has no {' and no '.join(missing)}")
                continue
            try:
                scheme = ct.scheme_of(module, lambda n: folder.infos[n].shape, folder.infos, next(iter(bits)))
            except ValueError as error:
                problems.append(f"{module} {error}")
                continue
            if scheme not in groups.values():
                problems.append(f"{module} is stored as {scheme}, which config.json does not announce")
                continue
            schemes[module] = scheme
            columns = info.shape[1] * (32 // scheme.bits)
            virtual[f"{module}.weight"] = TensorInfo(
                (info.shape[0], columns), folder.infos[f"{module}.{ct.SCALE}"].dtype
            )
        elif leaf not in suffixes:
            virtual[name] = info
    if problems:
        raise InputError("\n".join([f"{folder.path} is no sound {ct.NAME} checkpoint:", *problems[:40]]))
    return PackedSource(folder, schemes, virtual)
