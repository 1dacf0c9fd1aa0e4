"""How much an error at each place of a model costs at its head: Fisher metrics and token weights.

Both come from one walk forward and one back.

For labels y drawn from the model's own prediction p, and g_t the gradient of sum log p(y) at an output of token t,
E[g g^T] is the Gauss-Newton matrix of KL(p || p') there: an error e of that output costs e^T E[g g^T] e / 2 nats, with
all later layers, routers and the head taken into account. (The output side of the two-sided objective of Tseng et al.,
Model-Preserving Adaptive Rounding, arXiv 2505.22988, here taken block by block.)

A gradient does not see that a token is sent to another expert, and that is the worst error. So routers add a part of
their own, of equal weight. Let a and b be the last expert that token t takes and the first that it does not, d_t the
difference of their router rows, seen through the norm (each row times the slope of its rank: 1 for a logit), and phi_t
a factor that falls with the margin between the two. Then

    D = sum phi_t d_t d_t^T  over the tokens of a router's block,  averaged over the later routers,

measures which errors of the residual stream turn near ties over.

Gradients at one site differ between tokens by orders of magnitude: at a value projection, a hundredth of the tokens
holds a fifth to a half of their squares. The cost of an error is the sum over tokens of (g_t . E x_t)^2. It is split
into

    sum_t w_t x_t x_t^T   (the statistics, in which a token counts w_t)   and   sum_t g_t g_t^T / w_t   (the metric)

so that their product has each token's own cost, whatever the weights w. `token_weights` chooses them.

The calibration rows go through the original model. On the way forward, hidden rows are stored before every n-th block;
on the way back, those between are computed again, and each block once more with gradients of its activations (not of
its weights). Memory holds one block, one batch and its activations.

Shape legend: N rows, T tokens a row, H hidden size, V vocabulary, O outputs of a site, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.device import on_cuda
from ..core.finite import check_finite
from ..core.products import add_outer, product
from ..core.rows import spacing
from ..core.slices import TOKENS_PER_SLICE
from ..models.adapter import Role, Site
from ..models.block import Block
from ..models.walk import HiddenRows

STREAM, GRADIENT = "sensitivity", "gradient"
# The key of errors that a block adds to the residual stream where it ends.
RESIDUAL = "residual"
# Margins count by exp(-m^2 / 2 s^2); this share of a block's tokens has a margin below s. It is about twice the share
# that changes its route in four bits.
NEAR_SHARE = 0.15

# Near ties: margins [tokens], the two experts [tokens, 2], the slopes of their ranks [tokens, 2].
Ties = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Gets (block, metrics, token weights), both by site key or RESIDUAL. A metric is the cost of errors of the outputs,
# fp32 [O, O], of trace O without the routers' part. The weights are fp32 [tokens of all batches in order].
# A trace of this share of its parts is what rounding in fp32 leaves of equal ones.
ROUNDING = 1e-6
Keep = Callable[[int, dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


@dataclass(frozen=True)
class Sensitivity:
    """What one block's quantization uses of the walk back, by site key or RESIDUAL."""

    # fp32 [O, O]. Empty: every output counts alike.
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # fp32 [tokens] for each batch. Empty: tokens are not weighted by gradients.
    token_weights: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)


def token_weights(g_TO: torch.Tensor | None, row_TH: torch.Tensor, weighting: str) -> torch.Tensor:
    """How much each token counts in the statistics, fp32 [T]. `g_TO`: gradients at a site's outputs; `row_TH`: the rows
    that leave its half of the block.

    'none': all alike. 'residual': 1 / mean square of the row, since every reader normalises it. 'gradient': that to the
    power 1/4 times the squared gradient to the power 3/4; the squared gradient alone would leave few tokens that count.
    """
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


@dataclass(frozen=True)
class Stop:
    """A place where the walk back may be interrupted, and go on. The gradients of what enters block `begin` lie in the
    store, and so do the rows before each stretch below."""

    begin: int
    # The metrics of the routers from there on: their sum, fp32 [H, H], and how many. None without routers.
    routers_HH: torch.Tensor | None
    routers: int


def sensitivities(
    hidden: HiddenRows,
    keep: Keep,
    weighting: str,
    seed: int = 0,
    *,
    stop: Callable[[Stop], None] | None = None,
    resumed: Stop | None = None,
) -> None:
    """Metrics and token weights of every block, last block first; `keep` gets each. Leaves the store empty.

    `weighting`: the recipe's `token_weighting`; `seed`: of the labels that are drawn. `stop` is called wherever the
    walk can go on later: then it is given as `resumed`, with the same store. Files that the walk no longer needs are
    `stop`'s to remove, once the next stop rests on others."""
    walk, n_blocks = hidden.walk, hidden.walk.adapter.n_blocks
    apart = spacing(n_blocks)
    walk.step.begin("sensitivity")
    last = (n_blocks - 1) // apart * apart  # the last stretch begins here; nothing in it is computed twice
    if resumed is None:
        hidden.embed(STREAM)
        for index in range(n_blocks):
            _forward(hidden, index, then=min(index + 1, n_blocks - 1))
            if index < last and index % apart != 0:
                hidden.store.drop(index)
        _from_head(hidden, seed)
        resumed = Stop(n_blocks, None, 0)
        if stop is not None:
            stop(resumed)
    later = _Routers(resumed.routers_HH, resumed.routers)
    # What a stop rests on, or a thread still writes for one, stays on the disk.
    let_go = hidden.store.drop if stop is None else hidden.store.release
    for begin in reversed(range(0, resumed.begin, apart)):
        end = min(begin + apart, n_blocks)
        if begin < last:
            for index in range(begin, end - 1):
                _forward(hidden, index, then=index + 1)
        for index in reversed(range(begin, end)):
            block = _loaded(hidden, index, then=index - 1 if index > begin else begin - apart)
            keep(index, *_back_through(hidden, block, later, weighting))
            del block
            let_go(index + 1)
        if stop is not None:
            stop(Stop(begin, later.total, later.count))
        let_go(begin, STREAM)
    let_go(0)


def _loaded(hidden: HiddenRows, index: int, then: int) -> Block:
    """Block `index`; `then` is the one that is needed next."""
    block = hidden.walk.load(index)
    hidden.walk.expect(then)
    return block


def _forward(hidden: HiddenRows, index: int, then: int) -> None:
    """The rows through block `index`."""
    block = _loaded(hidden, index, then)
    hidden.walk.step.begin("sensitivity", index)
    hidden.forward(block, STREAM)


def _back_through(
    hidden: HiddenRows, block: Block, later: "_Routers", weighting: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients back through a block: its metrics and token weights. `later` gets its router's metric."""
    index, step = block.index, hidden.walk.step
    step.begin("sensitivity", index)
    found = _Found(weighting)
    ties: list[Ties] = []
    for k, numbers in enumerate(hidden.groups):
        rows, gradient = hidden.get(index, STREAM, k), hidden.get(index + 1, GRADIENT, k)
        below, middle = _back(block, rows, gradient, found)
        check_finite(block.original, f"block {index}, the gradient that enters it", below)
        ties += near_ties(block, middle)
        hidden.store.put(index, GRADIENT, k, below)
        step.advance(len(numbers) * rows.shape[1])
    metrics = found.metrics()
    metrics[RESIDUAL] += later.mean(metrics[RESIDUAL])
    if ties:
        later.add(tie_metric(block, ties))
    writes = next(site.key for site in block.sites if site.role is Role.ATTENTION and site.adds_to_residual)
    metrics[writes] += later.mean(metrics[writes])
    weights = found.token_weights()
    for site_key in metrics:
        where = f"block {index}, the sensitivity to errors of {site_key}"
        check_finite(block.original, where, metrics[site_key], weights[site_key])
    return metrics, weights


class _Found:
    """Sums over the batches of one block: outer products of gradients, and token weights."""

    def __init__(self, weighting: str) -> None:
        self.weighting = weighting
        self.totals: dict[str, torch.Tensor] = {}
        self.weights: dict[str, list[torch.Tensor]] = {}

    def add(self, key: str, g_TO: torch.Tensor, row_TH: torch.Tensor) -> None:
        weight = token_weights(g_TO, row_TH, self.weighting)
        self.weights.setdefault(key, []).append(weight)
        # A token with no gradient costs nothing and counts for nothing.
        scaled = g_TO.float() * weight.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()[:, None]
        if on_cuda(scaled):  # as the gradients are rounded, so that one product does
            scaled = scaled.to(g_TO.dtype)
        if key in self.totals:
            add_outer(self.totals[key], scaled, scaled)
        else:
            self.totals[key] = product(scaled.T, scaled)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Scaled to trace O. The identity where all gradients are zero: every output counts alike."""
        traces = {key: float(total.trace()) for key, total in self.totals.items()}
        return {
            key: total * (len(total) / traces[key]) if traces[key] else torch.eye(len(total), device=total.device)
            for key, total in self.totals.items()
        }

    def token_weights(self) -> dict[str, torch.Tensor]:
        return {key: torch.cat(parts) for key, parts in self.weights.items()}


def _from_head(hidden: HiddenRows, seed: int) -> None:
    """Replaces the output of the last block by the gradient of sum log p(y) there, y drawn from p."""
    walk = hidden.walk
    walk.step.begin("sensitivity")
    norm, head_VH = walk.final_norm(), walk.head()
    generator = torch.Generator(device=walk.device).manual_seed(seed)
    last = walk.adapter.n_blocks
    for k in range(len(hidden.groups)):
        rows = hidden.get(last, STREAM, k).requires_grad_()
        with torch.enable_grad():
            normed = norm(rows)
        flat = normed.detach().flatten(0, 1)
        gradient = torch.empty_like(flat)
        for start in range(0, len(flat), TOKENS_PER_SLICE):
            part = slice(start, start + TOKENS_PER_SLICE)
            logits_TV = product(flat[part], head_VH.T)
            check_finite(walk.original, "the logits", logits_TV)
            p_TV = torch.softmax(logits_TV, dim=-1)
            drawn_T = torch.multinomial(p_TV, 1, generator=generator)
            p_TV.scatter_(1, drawn_T, p_TV.gather(1, drawn_T) - 1)
            gradient[part] = -product(p_TV, head_VH).to(gradient.dtype)
        normed.backward(gradient.view_as(normed))
        assert rows.grad is not None
        hidden.store.put(last, GRADIENT, k, rows.grad)
        walk.step.advance(len(flat))
    hidden.store.drop(last, STREAM)


def _back(
    block: Block, hidden_NTH: torch.Tensor, gradient_NTH: torch.Tensor, found: _Found
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch back through a block: (the gradient at its input, the rows between its halves). Adds to `found`."""
    outputs: dict[str, list[torch.Tensor]] = {}
    middle: list[torch.Tensor] = []
    norm = block.norm(block.adapter.middle_norm)
    handles = [norm.register_forward_pre_hook(lambda _module, args: middle.append(args[0]))]
    for site in block.sites:
        # The metrics of the other half come of RESIDUAL, for gates and ups through the down projection.
        if site.role is Role.ATTENTION:
            for name in site.members[0]:
                handles.append(block.module(name).register_forward_hook(_keeper(outputs, site)))
    try:
        out = block.differentiable(hidden_NTH.requires_grad_()).hidden
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


def _keeper(outputs: dict[str, list[torch.Tensor]], site: Site) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def keep(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        outputs.setdefault(site.key, []).append(out)

    return keep


class _Routers:
    """The mean metric of the routers met so far, on the way from the last block to the first."""

    def __init__(self, total_HH: torch.Tensor | None, count: int) -> None:
        self.total, self.count = total_HH, count

    def add(self, metric_HH: torch.Tensor) -> None:
        self.total = metric_HH if self.total is None else self.total + metric_HH
        self.count += 1

    def mean(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like) if self.total is None else self.total / self.count


def near_ties(block: Block, middle_NTH: torch.Tensor) -> list[Ties]:
    """One entry for a block with experts, none for others: margins fp32 [tokens] between the ranks, the two
    experts int64 [tokens, 2], and the slopes of their ranks over their logits, fp32 [tokens, 2]. For experts in groups
    only the chosen groups count; a change of the groups themselves is not seen."""
    adapter = block.adapter
    router = adapter.router_site(block.index)
    if router is None or adapter.top_k >= adapter.n_experts:
        return []
    weight_EH = block.weight(router.first_module).float()
    with torch.no_grad():
        rows = block.norm(adapter.middle_norm)(middle_NTH).flatten(0, 1).float()
        logits_TE = rows @ weight_EH.T
    with torch.enable_grad():
        rank_TE = adapter.ranking(block.layer, logits_TE.requires_grad_())
    (slope_TE,) = torch.autograd.grad(rank_TE.sum(), logits_TE)
    top = rank_TE.detach().topk(adapter.top_k + 1, dim=-1)
    last, first = adapter.top_k - 1, adapter.top_k
    pair_T2 = top.indices[:, last : first + 1]
    margin_T = top.values[:, last] - top.values[:, first]
    # Where the chosen groups hold no more experts than a token takes, there is no second one to tie with.
    there = torch.isfinite(margin_T)
    if not there.any():
        return []
    return [(margin_T[there], pair_T2[there], slope_TE.gather(1, pair_T2)[there])]


def tie_metric(block: Block, ties: list[Ties]) -> torch.Tensor:
    """D [H, H] of trace H: W^T L W, with L the sum over ties of phi u u^T, and u the slopes of the two experts, one of
    them negated. For slopes of 1, L is the Laplacian of a graph of experts whose edges are the weighted ties. Zeros
    where the rows of tied experts are alike: no error moves a tie there."""
    router = block.adapter.router_site(block.index)
    assert router is not None
    gain_H = block.norm(block.adapter.middle_norm).weight
    assert isinstance(gain_H, torch.Tensor)
    weight_EH = block.weight(router.first_module).float() * gain_H.float()
    margin_T, pair_T2, slope_T2 = (torch.cat(parts) for parts in zip(*ties, strict=True))
    # Sorted, since kthvalue has no deterministic form on a GPU.
    near = margin_T.sort().values[max(1, int(NEAR_SHARE * len(margin_T))) - 1].clamp_min(1e-12)
    experts = len(weight_EH)
    phi_T = torch.exp(-0.5 * (margin_T / near) ** 2)
    product_T = slope_T2.prod(-1)
    edges = torch.zeros(experts * experts, device=margin_T.device)
    edges.index_add_(0, pair_T2[:, 0] * experts + pair_T2[:, 1], phi_T * product_T)
    edges_EE = edges.view(experts, experts) + edges.view(experts, experts).T
    # The squares of the slopes minus their product: zero where both slopes are alike.
    more_E = torch.zeros(experts, device=margin_T.device)
    more_E.index_add_(0, pair_T2.flatten(), (phi_T[:, None] * (slope_T2.square() - product_T[:, None])).flatten())
    laplacian_EE = torch.diag(edges_EE.sum(1) + more_E) - edges_EE
    metric = weight_EH.T @ laplacian_EE @ weight_EH
    trace = metric.trace()
    # What is left of equal rows is rounding, which must not be scaled up.
    whole = (laplacian_EE.diagonal() * weight_EH.square().sum(1)).sum()
    return metric * torch.where(trace > ROUNDING * whole, len(metric) / trace, 0.0)
