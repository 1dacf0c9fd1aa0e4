"""transformers modules on the meta device: they have shapes and need no memory."""

from typing import Any

import torch


def meta_module(cls: Any, config: Any, *args: Any) -> Any:
    """`cls(config, ...)` on the meta device, in eval mode. Attention is sdpa: exact, its memory linear in tokens."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return cls(config, *args).eval().requires_grad_(False)


def meta_shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor of the transformers model `cls`."""
    return {name: tuple(tensor.shape) for name, tensor in meta_module(cls, config).state_dict().items()}
