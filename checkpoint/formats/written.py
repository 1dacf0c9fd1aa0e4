"""The formats that a run writes its shards in, each as the functions that the story needs of it. All other formats are
made of the first one's shards (export.py).

A format holds integer codes that a method has decided (`pack`), or it is a quantizer itself, which takes dense weights
(`quantize`): one of the two, and never both.

Shape legend: O outputs, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...core.scheme import QuantizedWeight, Scheme
from . import bitsandbytes_write, compressed_tensors
from .bitsandbytes import NAME as BITSANDBYTES


@dataclass(frozen=True)
class Format:
    """`layout`: (scheme, O, I, model dtype) -> suffix -> (dtype, shape) of what stores one weight.
    `pack`: one weight's tensors by suffix. `quantize`: the same of a dense weight [O, I], and the weight that
    they are."""

    layout: Callable[[Scheme, int, int, str], dict[str, tuple[str, tuple[int, ...]]]]
    pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]] | None = None
    quantize: Callable[[torch.Tensor, Scheme], tuple[dict[str, torch.Tensor], torch.Tensor]] | None = None


OWN = {
    compressed_tensors.NAME: Format(compressed_tensors.layout, pack=compressed_tensors.pack),
    BITSANDBYTES: Format(bitsandbytes_write.layout, quantize=bitsandbytes_write.quantize),
}


def own_format(name: str) -> Format:
    """What a run with the recipe's `format` writes its shards in."""
    return OWN.get(name, OWN[compressed_tensors.NAME])
