"""What an error at each place of the model costs at its end: Fisher metrics and the tokens' own weights, by one walk
forward and one back.

For labels y drawn from the model's own prediction p, and g_t the gradient of sum log p(y) at an output of token t,
E[g g^T] is the Gauss-Newton matrix of KL(p || p') there: an error e of that output costs e^T E[g g^T] e / 2 nats, all
layers, routers and the head that come after included. (The output side of the two-sided objective of Tseng et al.,
Model-Preserving Adaptive Rounding, arXiv 2505.22988, here taken block by block.)

A gradient knows nothing of a token that is sent to another expert, the worst error of all. So routers have a part of
their own, of equal weight: with a and b the last expert that token t takes and the first that it does not, d_t the
difference of their router rows (each times the slope of what it is ranked by: 1 for a logit), seen through the norm,
and phi_t falling with the margin between the two,

    D = sum phi_t d_t d_t^T  over the tokens of a router's block,  averaged over the routers that are still to come,

says which errors of the residual stream turn near ties over.

Gradients of one site differ from token to token by orders of magnitude: of the squares of a value projection's, the
largest hundredth of the tokens has a fifth to a half. The cost of an error is the sum over tokens of
(g_t . E x_t)^2, which is cut in two as

    sum_t w_t x_t x_t^T   (the statistics, in which a token counts w_t)   and   sum_t g_t g_t^T / w_t   (the metric)

so that the product of the two is each token's own cost, whatever the weights w. `token_weights` says which they are.

The original model goes over the calibration rows. Hidden rows are stored at every so-manieth block; on the way back
those between are computed again, and every block once more with gradients of its activations, none of its weights.
Memory: one block, one batch and its activations.

Shape legend: N rows, T tokens a row, H hidden size, V vocabulary, O outputs of a site, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.rows import Row, RowStore, Step, batches, spacing
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, Role, Site, read
from ..models.walk import Calls, embed, final_norm, load_block, run_block, weight_view

STREAM = "sensitivity"
# The metric of errors that a block adds to the residual stream on its way out.
RESIDUAL = "residual"
# Margins count by exp(-m^2 / 2 s^2) with s the margin that this share of a block's tokens is below: about twice the
# share that changes its route in four bits.
NEAR_SHARE = 0.15
# Logits of 1024 tokens at a time: 0.8 GB for a vocabulary of 202,048.
TOKENS_PER_SLICE = 1024

# Of near ties: margins [tokens], the two experts [tokens, 2], the slopes of their ranks [tokens, 2].
Ties = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# By site key or RESIDUAL: what errors of the outputs cost, fp32 [O, O], of trace O without the routers' part; and how
# much tokens count in the statistics, fp32 [tokens of all batches in a line].
Keep = Callable[[int, dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


def token_weights(g_TO: torch.Tensor | None, row_TH: torch.Tensor, weighting: str) -> torch.Tensor:
    """How much tokens count in the statistics, fp32 [T], by the gradients at a site's outputs and the rows that leave
    its half of the block. 'none': alike. 'residual': by 1 / mean square of the row, for whoever reads it normalises it.
    'gradient': by that to the power of 1/4, times the square of the gradient to the power of 3/4; with the square alone
    a few tokens would be all that is left of the statistics."""
    residual = 1.0 / row_TH.float().square().mean(-1).clamp_min(1e-12)
    match weighting:
        case "none":
            return torch.ones_like(residual)
        case "residual":
            return residual
        case "gradient":
            assert g_TO is not None
            return g_TO.float().square().sum(-1) ** 0.75 * residual**0.25
    raise AssertionError(weighting)


def sensitivities(
    adapter: Adapter,
    source: TensorSource,
    rows: list[Row],
    batch_tokens: int,
    store: RowStore,
    calls: Calls,
    keep: Keep,
    step: Step,
    weighting: str,
    seed: int = 0,
) -> None:
    """Metrics and weights of every block, last block first, each given to `keep`. Leaves the store empty."""
    groups = batches(rows, batch_tokens)
    apart = spacing(adapter.n_blocks)
    step.begin("sensitivity")
    embed(adapter, source, rows, groups, store, (STREAM,), calls.device, calls.dtype)

    def forward(index: int, forget: bool) -> None:
        """The rows that leave block `index`; what entered it is forgotten, or stays."""
        block = load_block(adapter, source, index, calls.device, calls.dtype)
        step.begin("sensitivity", index)
        for k, numbers in enumerate(groups):
            hidden = store.get(index, STREAM, k).to(calls.device)
            store.put(index + 1, STREAM, k, run_block(block, hidden, calls.of(hidden.shape[1])[index]))
            step.advance(len(numbers) * hidden.shape[1])
        if forget:
            store.drop(index)

    last = (adapter.n_blocks - 1) // apart * apart  # where the last stretch begins: of it nothing is computed twice
    for index in range(adapter.n_blocks):
        forward(index, forget=index < last and index % apart != 0)
    _from_head(adapter, source, len(groups), store, calls, seed)
    later = _Routers()
    for begin in reversed(range(0, adapter.n_blocks, apart)):
        if begin < last:
            for index in range(begin, begin + apart - 1):
                forward(index, forget=False)
        for index in reversed(range(begin, min(begin + apart, adapter.n_blocks))):
            block = load_block(adapter, source, index, calls.device, calls.dtype)
            step.begin("sensitivity", index)
            found = _Found(weighting)
            ties: list[Ties] = []
            for k, numbers in enumerate(groups):
                hidden = store.get(index, STREAM, k).to(calls.device)
                gradient = store.get(index + 1, STREAM, k).to(calls.device)
                below, middle = _back(adapter, block, index, hidden, gradient, calls, found)
                ties += near_ties(adapter, block, index, middle)
                store.put(index, STREAM, k, below)  # the rows have done their work: their gradient takes their place
                step.advance(len(numbers) * hidden.shape[1])
            store.drop(index + 1)
            metrics = found.metrics()
            metrics[RESIDUAL] += later.mean(metrics[RESIDUAL])
            if ties:
                later.add(tie_metric(adapter, block, index, ties))
            writes = next(
                site.key for site in adapter.sites(index) if site.role is Role.ATTENTION and site.reaches_residual
            )
            metrics[writes] += later.mean(metrics[writes])
            keep(index, metrics, found.token_weights())
    store.drop(0)


class _Found:
    """Of one block, batch by batch: outer products of gradients, and the tokens' weights."""

    def __init__(self, weighting: str) -> None:
        self.weighting = weighting
        self.totals: dict[str, torch.Tensor] = {}
        self.weights: dict[str, list[torch.Tensor]] = {}

    def add(self, key: str, g_TO: torch.Tensor, row_TH: torch.Tensor) -> None:
        weight = token_weights(g_TO, row_TH, self.weighting)
        self.weights.setdefault(key, []).append(weight)
        # A token without gradient costs nothing and counts for nothing.
        scaled = g_TO.float() * weight.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()[:, None]
        known = self.totals.get(key)
        self.totals[key] = scaled.T @ scaled if known is None else known.addmm_(scaled.T, scaled)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Where nothing has a gradient every output counts alike."""
        traces = {key: float(total.trace()) for key, total in self.totals.items()}
        return {
            key: total * (len(total) / traces[key]) if traces[key] else torch.eye(len(total), device=total.device)
            for key, total in self.totals.items()
        }

    def token_weights(self) -> dict[str, torch.Tensor]:
        return {key: torch.cat(parts) for key, parts in self.weights.items()}


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
    found: _Found,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of what entered the block, and the rows between its halves; adds the batch to `found`."""
    outputs: dict[str, list[torch.Tensor]] = {}
    middle: list[torch.Tensor] = []
    norm = block.get_submodule(adapter.middle_norm)
    handles = [norm.register_forward_pre_hook(lambda _module, args: middle.append(args[0]))]
    for site in adapter.sites(index):
        if site.role is not Role.ATTENTION:
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
    found.add(RESIDUAL, gradient_NTH.flatten(0, 1), out.detach().flatten(0, 1))
    middle_TH = middle[0].detach().flatten(0, 1)
    remaining = iter(gradients)
    for key, parts in outputs.items():
        found.add(key, torch.cat([next(remaining).flatten(0, -2) for _ in parts], dim=-1), middle_TH)
    return below.detach(), middle[0].detach()


class _Routers:
    """Metrics of the routers that read the residual stream after a place, walking from the last block to the first."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, metric_HH: torch.Tensor) -> None:
        self.total = metric_HH if self.total is None else self.total + metric_HH
        self.count += 1

    def mean(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like) if self.total is None else self.total / self.count


def near_ties(adapter: Adapter, block: nn.Module, index: int, middle_NTH: torch.Tensor) -> list[Ties]:
    """Of a block with experts: [(margins fp32 [tokens] in what the router ranks by, the two experts of each int64
    [tokens, 2], how much what they are ranked by grows with their logits, fp32 [tokens, 2])]; else nothing. Of experts
    in groups, those of the chosen groups; that the groups themselves may change is not counted."""
    router = adapter.router_site(index)
    if router is None or adapter.top_k >= adapter.n_experts:
        return []
    weight_EH = weight_view(adapter, block, index, router.members[0][0]).float()
    with torch.no_grad():
        rows = block.get_submodule(adapter.middle_norm)(middle_NTH).flatten(0, 1).float()
        logits_TE = rows @ weight_EH.T
    with torch.enable_grad():
        rank_TE = adapter.ranking(block, logits_TE.requires_grad_())
    (slope_TE,) = torch.autograd.grad(rank_TE.sum(), logits_TE)
    top = rank_TE.detach().topk(adapter.top_k + 1, dim=-1)
    last, first = adapter.top_k - 1, adapter.top_k
    pair_T2 = top.indices[:, last : first + 1]
    margin_T = top.values[:, last] - top.values[:, first]
    if torch.isinf(margin_T).all():  # the chosen groups hold no more experts than a token takes
        return []
    return [(margin_T, pair_T2, slope_TE.gather(1, pair_T2))]


def tie_metric(adapter: Adapter, block: nn.Module, index: int, ties: list[Ties]) -> torch.Tensor:
    """D [H, H] of trace H: W^T L W with L the sum over ties of phi u u^T, u the slopes of the two experts, one of them
    negative. Where slopes are 1 that is the Laplacian of the graph of experts whose edges are the weighted ties."""
    router = adapter.router_site(index)
    assert router is not None
    norm = block.get_submodule(adapter.middle_norm)
    gain_H = norm.weight
    assert isinstance(gain_H, torch.Tensor)
    weight_EH = weight_view(adapter, block, index, router.members[0][0]).float() * gain_H.float()
    margin_T, pair_T2, slope_T2 = (torch.cat(parts) for parts in zip(*ties, strict=True))
    near = margin_T.kthvalue(max(1, int(NEAR_SHARE * len(margin_T)))).values.clamp_min(1e-12)
    experts = len(weight_EH)
    phi_T = torch.exp(-0.5 * (margin_T / near) ** 2)
    product_T = slope_T2.prod(-1)
    edges = torch.zeros(experts * experts, device=margin_T.device)
    edges.index_add_(0, pair_T2[:, 0] * experts + pair_T2[:, 1], phi_T * product_T)
    edges_EE = edges.view(experts, experts) + edges.view(experts, experts).T
    # What the squares of the slopes are more than their product: nothing where both are alike.
    more_E = torch.zeros(experts, device=margin_T.device)
    more_E.index_add_(0, pair_T2.flatten(), (phi_T[:, None] * (slope_T2.square() - product_T[:, None])).flatten())
    metric = weight_EH.T @ (torch.diag(edges_EE.sum(1) + more_E) - edges_EE) @ weight_EH
    return metric * (len(metric) / metric.trace().clamp_min(torch.finfo(metric.dtype).tiny))


def _keeper(outputs: dict[str, list[torch.Tensor]], site: Site) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def keep(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        outputs.setdefault(site.key, []).append(out)

    return keep
