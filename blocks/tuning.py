"""Tuning before rounding: the unquantized matrices of a half learn to correct the errors of the quantized ones.

The reference correction (quantize/correction.py) solves one matrix at a time, and solves gates and ups only for their
own outputs. Here all matrices of a half that are still to be quantized learn together. Gradients bring the half's
output, for the rows of the quantized stream, towards that of the reference:

    argmin E w_t e_t^T M e_t,      e = half'(x) - h_ref,      M the metric of the residual stream, w the token's weight

The tuned matrices are then quantized. (QuIP#, Tseng et al., arXiv 2402.04396, section 5, also tunes the unquantized
rest of a block after each quantized layer, on the plain squared error.) Tuning, like the correction, can overfit few
rows: so an expert keeps the fraction n / (n + FEW * inputs) of its change, n its rows.

Shape legend: T tokens, H hidden size.
"""

from math import isfinite

import torch
from torch import nn

from ..calibration.sensitivity import RESIDUAL
from ..core.finite import nonfinite_error
from ..models.adapter import Role, Site
from ..models.block import Block
from ..quantize.metric import METRIC_DAMPING
from .streams import QUANTIZED, REFERENCE, HalfJob

# The learning rate as a fraction of the matrix's root mean square. (A step of the int4 grid is about a third of that
# root mean square.)
RATE = 0.002
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 10
FEW = 4.0


class _Leaf:
    """A parameter of a loaded block and its fp32 master: a dense matrix, or the stack of all experts' matrices."""

    def __init__(self, held: nn.Parameter, per_expert: bool) -> None:
        self.held, self.per_expert = held, per_expert
        self.before = held.detach().clone()
        self.master = nn.Parameter(held.detach().float().clone())
        self.rows = torch.zeros((len(held), 1, 1) if per_expert else (), device=held.device)

    def count(self, routes_TK: torch.Tensor | None, tokens: int) -> None:
        if self.per_expert:
            assert routes_TK is not None
            self.rows += torch.bincount(routes_TK.flatten(), minlength=len(self.rows))[:, None, None]
        else:
            self.rows += tokens

    def write(self) -> None:
        with torch.no_grad():
            self.held.copy_(self.master)

    def finish(self) -> None:
        """Takes back the part of the change that too few rows support, and freezes the parameter."""
        with torch.no_grad():
            kept = self.rows / (self.rows + FEW * self.held.shape[-1])
            before = self.before.float()
            self.master.copy_(before + kept * (self.master - before))
        self.write()
        self.held.requires_grad_(False)


def _leaves(block: Block, sites: list[Site]) -> list[_Leaf]:
    found = []
    for site in sites:
        if site.role is Role.EXPERT:
            experts = block.experts
            assert experts is not None
            found.append(_Leaf(experts.down if site.reaches_residual else experts.gate_up, True))
        else:
            for name in site.members[0]:
                weight = block.weight(name)
                assert isinstance(weight, nn.Parameter)
                found.append(_Leaf(weight, False))
    return found


class _Optimizer:
    """Adam over the leaves' masters, each with a rate of its own size, warmed up and then falling to zero."""

    def __init__(self, leaves: list[_Leaf], steps: int) -> None:
        self.leaves = leaves
        scales = [float(leaf.master.detach().square().mean().sqrt()) for leaf in leaves]
        groups = [{"params": [leaf.master], "lr": RATE * scale} for leaf, scale in zip(leaves, scales, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=BETAS)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda done: min(1.0, (done + 1) / WARM_UP_STEPS) * (1 - done / steps)
        )

    def step(self, loss: torch.Tensor) -> None:
        gradients = torch.autograd.grad(loss, [leaf.held for leaf in self.leaves])
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.master.grad = gradient.float()
        self.adam.step()
        self.schedule.step()
        for leaf in self.leaves:
            leaf.write()


def tune(job: HalfJob, sites: list[Site], metric_HH: torch.Tensor | None, epochs: int) -> list[float]:
    """Tune the matrices of `sites` in the target block, in place and in their own dtype. The output of the original
    half must lie in the store. Returns the mean loss of each epoch, every batch measured before its step."""
    leaves = _leaves(job.target, sites)
    optimizer = _Optimizer(leaves, epochs * len(job.hidden.groups))
    if metric_HH is not None:
        metric_HH = metric_HH.clone()
        metric_HH.diagonal().add_(METRIC_DAMPING * metric_HH.diagonal().mean())
    order = torch.Generator().manual_seed(job.index)
    for leaf in leaves:
        leaf.held.requires_grad_(True)
    losses = []
    for epoch in range(epochs):
        cost = tokens = 0.0
        for k in torch.randperm(len(job.hidden.groups), generator=order).tolist():
            hidden = job.rows_in(QUANTIZED, k)
            wanted_TH = job.rows_out(REFERENCE, k).flatten(0, 1).float()
            passed = job.target.differentiable(hidden, job.half)
            with torch.enable_grad():
                error_TH = passed.hidden.flatten(0, 1).float() - wanted_TH
                cost_T = ((error_TH if metric_HH is None else error_TH @ metric_HH) * error_TH).sum(-1)
                total = (cost_T * job.weight(RESIDUAL, k, wanted_TH)).sum()
                loss = total / len(wanted_TH)
            if epoch == 0:
                for leaf in leaves:
                    leaf.count(passed.routes_TK, len(wanted_TH))
            optimizer.step(loss)
            cost, tokens = cost + float(total.detach()), tokens + len(wanted_TH)
            job.hidden.walk.step.advance(len(wanted_TH))
        if not isfinite(cost):
            where = f"block {job.index}, {job.half.said}, the loss of tuning {', '.join(site.key for site in sites)}"
            raise nonfinite_error(False, where)
        losses.append(cost / tokens)
        if cost == 0.0:  # nothing is missed before the first quantized weight
            break
    for leaf in leaves:
        leaf.finish()
    return losses
