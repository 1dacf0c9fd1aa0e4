"""The kernels of a pass through a decoder layer, counted without a card: the layer runs on the meta device.

What transformers' layers and our own modules do is seen where torch dispatches it: each operation that moves numbers is
a kernel, with its bytes and its operations. Attention is one kernel on a card, whatever the meta device makes of it.
Experts give a shape there and nothing else (models/experts.py); `expert_kernels` counts them from the code.

Shape legend: N rows, T tokens a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from ..core.device import Compute
from ..models.adapter import Adapter, Half, Role
from ..models.block import Block
from ..models.norms import fuse_norms
from ..models.short_row import OnMeta

aten = torch.ops.aten
# They give memory or a view, and no kernel.
FREE = ("empty", "detach", "alias", "lift_fresh", "_unsafe_view")
# Who computes: the tensor cores by a library's product or by our own (quantize/kernels.product_kernel), the rest of the
# card, or a factorisation.
BF16, TILED, FP32, FACTOR = "bf16", "tiled", "fp32", "factor"


@dataclass(frozen=True)
class Kernel:
    """One launch: the bytes that it moves, its operations, and the unit that does them."""

    nbytes: float
    flops: float = 0.0
    unit: str = BF16


@dataclass(frozen=True)
class LayerKernels:
    """The kernels of one pass of a batch, without experts. `back`: of the way back to the rows, by half; `to_weights`:
    to the matrices of the feed-forward half alone, as in tuning."""

    forward: dict[Half, tuple[Kernel, ...]]
    back: dict[Half, tuple[Kernel, ...]]
    to_weights: tuple[Kernel, ...]
    norm: tuple[Kernel, ...]


def layer_kernels(adapter: Adapter, index: int, rows: int, row_tokens: int) -> LayerKernels:
    """Of block `index`, for a batch of so many rows, in bf16."""
    calls = OnMeta(adapter, Compute(torch.device("cpu"), torch.bfloat16, rows * row_tokens))
    block = Block(adapter, index, adapter.build_block(index).to(torch.bfloat16), calls)
    router = adapter.router_site(index)
    if router is not None:
        block.module(router.first_module).to(torch.float32)
    fuse_norms(block.layer)
    for parameter in block.layer.parameters():
        parameter.requires_grad_(False)
    hidden = torch.empty(rows, row_tokens, adapter.hidden_size, dtype=torch.bfloat16, device="meta")
    calls.of(index, row_tokens)  # what it computes is no kernel of a pass

    def passed(half: Half) -> tuple[Kernel, ...]:
        with _counted() as found:
            block.forward(hidden, half)
        return tuple(found)

    def back(half: Half, entering: torch.Tensor) -> tuple[Kernel, ...]:
        with _counted() as found:
            out = block.differentiable(entering, half).hidden
            there = len(found)
            if out.requires_grad:
                out.backward(torch.empty_like(out))
        return tuple(found[there:])

    forward = {half: passed(half) for half in Half}
    to_rows = {half: back(half, hidden.detach().requires_grad_()) for half in Half}
    with torch.no_grad(), _counted() as normed:
        block.norm(adapter.first_norm)(hidden)
    for site in block.sites:
        if site.half is Half.FEED_FORWARD and site.role is not Role.EXPERT:
            for name in site.members[0]:
                block.weight(name).requires_grad_()
    return LayerKernels(forward, to_rows, back(Half.FEED_FORWARD, hidden), tuple(normed))


@contextmanager
def _counted() -> Iterator[list[Kernel]]:
    counting = _Counting()
    with _AsOnCard(counting), counting:
        yield counting.found


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(FREE):
            return out
        ins = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        flops = 0.0
        if func.overloadpacket is aten.linear:
            flops = 2.0 * outs[0].numel() * ins[0].shape[-1]
        elif func.overloadpacket in flop_registry:
            flops = float(flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out))
        unit = FP32 if ins and ins[0].dtype == torch.float32 else BF16
        self.found.append(Kernel(sum(map(_held, ins)) + sum(map(_held, outs)), flops, unit))
        return out


class _AsOnCard(TorchFunctionMode):
    """Attention as one kernel, with its way back as another; and norms (models/norms.py), which torch takes apart on
    other devices: on a card they are the kernel of layer_norm."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return aten.native_layer_norm(*args[:2], None, None, kwargs["eps"])[0]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _Sdpa.apply(self.counting, *args[:3])


class _Sdpa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counting: _Counting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.counting, ctx.shapes = counting, (q.shape, k.shape, v.shape)
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        # Two products of queries with keys, and of weights with values.
        flops = 2.0 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        counting.found.append(Kernel(sum(map(_held, (q, k, v, out))), flops))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        # The scores again, and two products for each of the two of the way there.
        flops = 2.5 * 2.0 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        ctx.counting.found.append(Kernel(2 * sum(map(_held, (q, k, v, gradients[0]))), flops))
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _held(tensor: torch.Tensor) -> int:
    """Bytes that a kernel touches: an expanded axis counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
