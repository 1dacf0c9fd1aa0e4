"""The formats in which a run writes its shards, each as the few functions that the run calls.

`onecard export` makes every other format from compressed-tensors shards (conversion/). A format here either packs
integer codes that a method has decided (`pack`), or is a quantizer itself and takes dense weights (`quantize`). It
never does both.

Shape legend: O outputs, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...core.quantized_weight import QuantizedWeight
from ...core.scheme import Scheme
from . import bitsandbytes_write, compressed_tensors_write
from .bitsandbytes_read import NAME as BITSANDBYTES
from .compressed_tensors_config import NAME as COMPRESSED_TENSORS


@dataclass(frozen=True)
class ShardFormat:
    """How one weight is stored in a run's shards."""

    # (scheme, O, I, safetensors dtype of the model) -> suffix of each stored tensor -> its (dtype, shape)
    layout: Callable[[Scheme, int, int, str], dict[str, tuple[str, tuple[int, ...]]]]
    # One weight's codes -> its stored tensors by suffix.
    pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]] | None = None
    # A dense weight [O, I] -> its stored tensors by suffix, and the dense weight that they decode to.
    quantize: Callable[[torch.Tensor, Scheme], tuple[dict[str, torch.Tensor], torch.Tensor]] | None = None


SHARD_FORMATS = {
    COMPRESSED_TENSORS: ShardFormat(compressed_tensors_write.layout, pack=compressed_tensors_write.pack),
    BITSANDBYTES: ShardFormat(bitsandbytes_write.layout, quantize=bitsandbytes_write.quantize),
}


def shard_format(name: str) -> ShardFormat:
    """The format of the shards that a run writes when its recipe's `format` is `name`."""
    return SHARD_FORMATS.get(name, SHARD_FORMATS[COMPRESSED_TENSORS])
