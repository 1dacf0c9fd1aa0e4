"""Norms that one kernel computes give the bits of transformers' own; and no family has a norm that is not known."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from onecard.checkpoint.model import open_model
from onecard.models.norms import EPSILON, fuse_norms
from walking import cpu_walk


def norms(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_modules() if "Norm" in type(module).__name__}


@pytest.mark.parametrize("family", ["scout", "qwen3", "mixtral", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_transformers_norms(baby: Callable[..., Path], family: str, dtype: torch.dtype) -> None:
    model = open_model(str(baby(family)))
    layer = cpu_walk(model, dtype=dtype).load(0).layer
    fused = copy.deepcopy(layer)
    fuse_norms(fused)
    own, ours = norms(layer), dict(fused.named_modules())
    assert {type(module).__name__ for module in own.values()} <= EPSILON.keys()
    assert len(own) >= 2
    generator = torch.Generator().manual_seed(5)
    for name, module in own.items():
        width = len(module.weight) if isinstance(getattr(module, "weight", None), torch.Tensor) else 16
        x = (torch.randn(3, 5, width, generator=generator) * 20).to(dtype)
        x[0, 0] = 0
        assert ours[name].forward.__func__ is not module.forward.__func__  # type: ignore[union-attr]
        assert torch.equal(ours[name](x), module(x)), name
        assert torch.equal(copy.deepcopy(ours[name])(x), module(x)), name
