"""StoredWeight and Reading: what every reader of a format returns.

Each format's reader has a `find`. It looks at names, shapes and dtypes only, and returns which dense weights a folder
holds, in which stored parts, together with every contradiction. Pure functions then turn the parts of one weight into
that weight. A reader does not know what a weight is for. It executes nothing from a checkpoint: the config block and
JSON parts are data.

Some formats hold plain integer codes. Their weights can also be read as codes, so that another format can store them
without rounding again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from ...core.tensors import TensorInfo

# Stored parts by role -> the dense weight, computed in fp32 and rounded once to the dtype. Raises ValueError for parts
# that contradict each other.
Decode = Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]
# Stored parts by role -> the same weight as codes. Raises ValueError when they contradict the scheme.
Codes = Callable[[Mapping[str, torch.Tensor]], QuantizedWeight]
# The dtypes that scales, and hence dense weights, may have.
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class StoredWeight:
    """One dense weight that a folder stores in parts."""

    # Shape and dtype of the dense weight.
    info: TensorInfo
    # The scheme in words, e.g. 'int4 group 128'.
    width: str
    # Role of a part in the format -> name of the stored tensor.
    parts: dict[str, str]
    decode: Decode
    # Roles whose first axis is the weight's (fused experts): one expert is read without the others.
    by_expert: frozenset[str] = frozenset()
    # Set for 2-D weights of integer codes whose groups are neighbouring inputs; None for all others (NF4, fp8, groups
    # in an order of their own).
    scheme: Scheme | None = None
    codes: Codes | None = None
    # Whether `decode` computes wherever the parts are. Otherwise it is given them on the CPU.
    anywhere: bool = True


@dataclass
class Reading:
    """What `find` saw in a folder."""

    # The format in words.
    label: str
    # Dense weights by name.
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    # Stored tensors that are neither a weight nor a part of one, e.g. activation scales.
    aside: set[str] = field(default_factory=set)
    # Reasons to refuse the checkpoint.
    problems: list[str] = field(default_factory=list)
    # What a measurement of these files leaves out; they go into the record.
    warnings: list[str] = field(default_factory=list)


def integer_scheme(bits: int, group_size: int, symmetric: bool) -> Scheme | None:
    """The Scheme of stored integer codes, or None for a width or group size that Scheme does not have."""
    try:
        return Scheme(bits, group_size, symmetric)
    except ValueError:
        return None


def missing(stem: str, suffixes: tuple[str, ...], infos: Mapping[str, TensorInfo]) -> str | None:
    """'has no scales and no qzeros', or None when every companion of `stem` is there."""
    lacking = [suffix for suffix in suffixes if stem + suffix not in infos]
    return f"has no {' and no '.join(s.lstrip('._') for s in lacking)}" if lacking else None
