"""The formats that a run can write, each as the functions that the story needs of it; chosen by the recipe's `format`.

A format holds integer codes that a method has decided (`pack`), or it is a quantizer itself, which takes dense weights
(`quantize`): one of the two, and never both.

Shape legend: O outputs, I inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.scheme import QuantizedWeight, Scheme
from . import bitsandbytes_write, compressed_tensors
from .bitsandbytes import NAME as BITSANDBYTES


@dataclass(frozen=True)
class Format:
    """`layout`: (scheme, O, I, model dtype) -> suffix -> (dtype, shape) of what stores one weight. `config`: (module ->
    scheme, module -> unit, module -> weights, Linear modules that stay as they were) -> the `quantization_config`
    block. `pack`: one weight's tensors by suffix. `quantize`: the same of a dense weight [O, I], and the weight that
    they are."""

    layout: Callable[[Scheme, int, int, str], dict[str, tuple[str, tuple[int, ...]]]]
    config: Callable[[Mapping[str, Scheme], Mapping[str, str], Mapping[str, int], list[str]], dict[str, Any]]
    pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]] | None = None
    quantize: Callable[[torch.Tensor, Scheme], tuple[dict[str, torch.Tensor], torch.Tensor]] | None = None


FORMATS = {
    compressed_tensors.NAME: Format(
        compressed_tensors.layout, compressed_tensors.quantization_config, pack=compressed_tensors.pack
    ),
    BITSANDBYTES: Format(
        bitsandbytes_write.layout, bitsandbytes_write.quantization_config, quantize=bitsandbytes_write.quantize
    ),
}
