"""What an error at each place of the model costs at its end: Fisher metrics, by one walk forward and one back.

For labels y drawn from the model's own prediction p, and g_t the gradient of sum log p(y) at an output of token t,
E[g g^T] is the Gauss-Newton matrix of KL(p || p') there: an error e of that output costs e^T E[g g^T] e / 2 nats, all
layers, routers and the head that come after included. (The output side of the two-sided objective of Tseng et al.,
Model-Preserving Adaptive Rounding, arXiv 2505.22988, here taken block by block.)

The original model goes over a part of the calibration rows; the hidden rows that enter each block are stored, and on
the way back every block is run again with gradients of its activations, none of its weights. Memory: one block, one
batch and its activations. Tokens are scaled by the mean square of the row that leaves the site's half of the block, for
the statistics weight them by its inverse (`token_weighting: residual`) and the product is to be each token's own cost.

Shape legend: N rows, T tokens a row, H hidden size, V vocabulary, O outputs of a site.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.rows import Row, RowStore, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, Half, Site, read
from ..models.walk import Calls, Embedder, final_norm, load_block, run_block

STREAM = "sensitivity"
# The metric of errors that a block adds to the residual stream on its way out.
RESIDUAL = "residual"
# Logits of 1024 tokens at a time: 0.8 GB for a vocabulary of 202,048.
TOKENS_PER_SLICE = 1024

# (block, metrics by site key or RESIDUAL, fp32 [O, O] of trace O) -> None
Keep = Callable[[int, dict[str, torch.Tensor]], None]


def sensitivities(
    adapter: Adapter,
    source: TensorSource,
    rows: list[Row],
    batch_tokens: int,
    store: RowStore,
    calls: Calls,
    keep: Keep,
    step: Step,
    seed: int = 0,
) -> None:
    """Metrics of every block, last block first, each given to `keep`. Leaves the store empty."""
    groups = batches(rows, batch_tokens)
    step.begin("sensitivity")
    embedder = Embedder(adapter, source, rows, calls.device, calls.dtype)
    for k, numbers in enumerate(groups):
        store.put(0, STREAM, k, embedder.batch(numbers))
    del embedder
    for index in range(adapter.n_blocks):
        block = load_block(adapter, source, index, calls.device, calls.dtype)
        step.begin("sensitivity", index)
        for k, numbers in enumerate(groups):
            hidden = store.get(index, STREAM, k).to(calls.device)
            store.put(index + 1, STREAM, k, run_block(block, hidden, calls.of(hidden.shape[1])[index]))
            step.advance(len(numbers) * hidden.shape[1])
        del block
    _from_head(adapter, source, len(groups), store, calls, seed)
    for index in reversed(range(adapter.n_blocks)):
        block = load_block(adapter, source, index, calls.device, calls.dtype)
        step.begin("sensitivity", index)
        totals: dict[str, torch.Tensor] = {}
        for k, numbers in enumerate(groups):
            hidden = store.get(index, STREAM, k).to(calls.device)
            gradient = store.get(index + 1, STREAM, k).to(calls.device)
            below = _back(adapter, block, index, hidden, gradient, calls, totals)
            store.put(index, STREAM, k, below)  # the rows have done their work: their gradient takes their place
            step.advance(len(numbers) * hidden.shape[1])
        store.drop(index + 1)
        keep(index, {key: total * (len(total) / total.trace()) for key, total in totals.items()})
    store.drop(0)


def _from_head(
    adapter: Adapter, source: TensorSource, n_batches: int, store: RowStore, calls: Calls, seed: int
) -> None:
    """Turns what leaves the last block into its gradient of sum log p(y), y drawn from p."""
    norm = final_norm(adapter, source, calls.device, calls.dtype)
    head_VH = read(adapter, source, adapter.head_name).to(calls.device)
    generator = torch.Generator(device=calls.device).manual_seed(seed)
    last = adapter.n_blocks
    for k in range(n_batches):
        hidden = store.get(last, STREAM, k).to(calls.device).requires_grad_()
        with torch.enable_grad():
            normed = norm(hidden)
        flat = normed.detach().flatten(0, 1)
        gradient = torch.empty_like(flat)
        for part in range(0, len(flat), TOKENS_PER_SLICE):
            rows = slice(part, part + TOKENS_PER_SLICE)
            p_TV = torch.softmax(flat[rows].float() @ head_VH.float().T, dim=-1)
            drawn_T = torch.multinomial(p_TV, 1, generator=generator)
            p_TV.scatter_add_(1, drawn_T, torch.full_like(drawn_T, -1, dtype=p_TV.dtype))
            gradient[rows] = -(p_TV @ head_VH.float()).to(gradient.dtype)
        normed.backward(gradient.view_as(normed))
        assert hidden.grad is not None
        store.put(last, STREAM, k, hidden.grad)


def _back(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    hidden_NTH: torch.Tensor,
    gradient_NTH: torch.Tensor,
    calls: Calls,
    totals: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The gradient of what entered the block; adds the batch's outer products to `totals`."""
    outputs: dict[str, list[torch.Tensor]] = {}
    middle: list[torch.Tensor] = []
    norm = block.get_submodule(adapter.middle_norm)
    handles = [norm.register_forward_pre_hook(lambda _module, args: middle.append(args[0]))]
    for site in adapter.sites(index):
        if ".experts." in site.key or site.feeds:
            continue  # their metrics come of RESIDUAL, through the down projection where there is one
        for name in site.members[0]:
            module = block.get_submodule(name.removeprefix(adapter.block_prefix(index)))
            handles.append(module.register_forward_hook(_keeper(outputs, site)))
    try:
        with torch.enable_grad():
            hidden_NTH.requires_grad_()
            out = block(hidden_NTH, **calls.of(hidden_NTH.shape[1])[index])
            out = out[0] if isinstance(out, tuple) else out
        wanted = [hidden_NTH, *(y for parts in outputs.values() for y in parts)]
        below, *gradients = torch.autograd.grad(out, wanted, gradient_NTH)
    finally:
        for handle in handles:
            handle.remove()
    scales = {
        half: row.detach().flatten(0, 1).float().square().mean(-1).sqrt()[:, None]
        for half, row in ((Half.ATTENTION, middle[0]), (Half.FEED_FORWARD, out))
    }

    def add(key: str, g_TO: torch.Tensor, half: Half = Half.FEED_FORWARD) -> None:
        scaled = g_TO.flatten(0, -2).float() * scales[half]
        totals[key] = totals[key].addmm_(scaled.T, scaled) if key in totals else scaled.T @ scaled

    add(RESIDUAL, gradient_NTH)
    remaining = iter(gradients)
    halves = {site.key: site.half for site in adapter.sites(index)}
    for key, parts in outputs.items():
        add(key, torch.cat([next(remaining).flatten(0, -2) for _ in parts], dim=-1), halves[key])
    return below.detach()


def _keeper(outputs: dict[str, list[torch.Tensor]], site: Site) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def keep(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        outputs.setdefault(site.key, []).append(out)

    return keep
