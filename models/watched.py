"""Looks inside a layer at numbers that it would hide: attention scores and router logits that are not finite.

What leaves a layer is finite although they are not: torch's attention on a CPU makes zeros of scores that are NaN, and
a sigmoid makes 1 of a router logit that is infinite. The layers are transformers' own, so the functions are watched
that they call. Watching changes no number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..core.finite import finite_flags, score_flags


class Watched(TorchFunctionMode):
    """While open, `flags` gets scalars on the device that are True where all is finite. `router`: the weight whose
    products are router logits, None without experts."""

    def __init__(self, router: torch.Tensor | None) -> None:
        super().__init__()
        self.router = router
        self.flags: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.flags += score_flags(*args[:3])
        elif func is F.linear and args[1] is self.router:
            self.flags += finite_flags(out)
        return out
