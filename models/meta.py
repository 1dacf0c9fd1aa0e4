"""transformers modules without weights: built on the meta device, so that shapes cost no memory."""

from typing import Any

import torch
from torch import nn


def meta_module(cls: Any, config: Any, *args: Any) -> Any:
    """`cls(config, ...)` on the meta device, in eval mode. Attention is sdpa: exact, and linear in memory."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return cls(config, *args).eval().requires_grad_(False)


def meta_shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor of the transformers model `cls`."""
    return {name: tuple(tensor.shape) for name, tensor in meta_module(cls, config).state_dict().items()}


def cast_floating(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def materialize_buffers(module: nn.Module, fresh: nn.Module) -> None:
    """Give `module` (on meta) the computed, unstored buffers of `fresh`, an equal module built for real."""
    for name, buffer in fresh.named_buffers():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
