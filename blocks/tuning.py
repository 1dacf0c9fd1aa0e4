"""Tuning before rounding: what of a half is not quantized yet learns to make good what the block misses so far.

The reference correction (quantize/correction.py) solves one matrix at a time, and gates and ups only for their own
outputs. Here all matrices of a half that are still to be quantized learn together, by gradients, what the whole half is
to give for the rows that the quantized stream brings:

    argmin E w_t e_t^T M e_t,      e = half'(x) - h_ref,      M the metric of the residual stream, w the token's weight

and are then quantized from where they stand. (QuIP#, Tseng et al., arXiv 2402.04396, section 5, tunes inside a block
what is not yet quantized after each layer that is; there on the plain squared error.) Like the correction it can fit
what few rows happen to hold: what an expert has moved is shrunk by n / (n + FEW * inputs), n its rows.

Shape legend: T tokens, H hidden size.
"""

import torch
from torch import nn

from ..calibration.sensitivity import RESIDUAL
from ..core.rows import Step
from ..models.adapter import Role, Site
from ..models.walk import expert_stacks, only, weight_view
from ..quantize.metric import METRIC_DAMPING
from .streams import QUANTIZED, REFERENCE, HalfJob

# A step's size as a part of the matrix's root mean square; a step of the int4 grid is about a third of that.
RATE = 0.002
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 10
FEW = 4.0


class _Leaf:
    """A parameter of a loaded block, with its fp32 master: a dense matrix, or the stack of all experts' matrices."""

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
        """What few rows have moved is moved back."""
        with torch.no_grad():
            kept = self.rows / (self.rows + FEW * self.held.shape[-1])
            before = self.before.float()
            self.master.copy_(before + kept * (self.master - before))
        self.write()
        self.held.requires_grad_(False)


def _leaves(job: HalfJob, block: nn.Module, sites: list[Site]) -> list[_Leaf]:
    found = []
    for site in sites:
        if site.role is Role.EXPERT:
            stacks = expert_stacks(block)
            assert stacks is not None
            found.append(_Leaf(stacks.down if site.reaches_residual else stacks.gate_up, True))
        else:
            for name in site.members[0]:
                weight = weight_view(job.adapter, block, job.index, name)
                assert isinstance(weight, nn.Parameter)
                found.append(_Leaf(weight, False))
    return found


def tune(
    job: HalfJob, target: nn.Module, sites: list[Site], metric_HH: torch.Tensor | None, epochs: int, step: Step
) -> list[float]:
    """Tune the matrices of `sites` in place, in the dtype in which the block holds them. What leaves the original half
    lies in the store. Returns each epoch's mean loss, every batch's before its step."""
    leaves = _leaves(job, target, sites)
    scales = [float(leaf.master.detach().square().mean().sqrt()) for leaf in leaves]
    optimizer = torch.optim.Adam(
        [{"params": [leaf.master], "lr": RATE * scale} for leaf, scale in zip(leaves, scales, strict=True)], betas=BETAS
    )
    steps = epochs * len(job.groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / WARM_UP_STEPS) * (1 - done / steps)
    )
    if metric_HH is not None:
        metric_HH = metric_HH.clone()
        metric_HH.diagonal().add_(METRIC_DAMPING * metric_HH.diagonal().mean())
    order = torch.Generator().manual_seed(job.index)
    stacks = expert_stacks(target)
    for leaf in leaves:
        leaf.held.requires_grad_(True)
    losses = []
    for epoch in range(epochs):
        cost = tokens = 0.0
        for k in torch.randperm(len(job.groups), generator=order).tolist():
            hidden = job.rows_in(QUANTIZED, k)
            wanted_TH = job.rows_out(REFERENCE, k).flatten(0, 1).float()
            with torch.enable_grad(), only(job.adapter, target, job.half):
                out = target(hidden, **job.calls.of(hidden.shape[1])[job.index])
                out = out[0] if isinstance(out, tuple) else out
                error_TH = out.flatten(0, 1).float() - wanted_TH
                cost_T = ((error_TH if metric_HH is None else error_TH @ metric_HH) * error_TH).sum(-1)
                total = (cost_T * job.weight(RESIDUAL, k, wanted_TH)).sum()
            gradients = torch.autograd.grad(total / len(wanted_TH), [leaf.held for leaf in leaves])
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.master.grad = gradient.float()
                if epoch == 0:
                    leaf.count(stacks.routes_TK if stacks is not None else None, len(wanted_TH))
            optimizer.step()
            schedule.step()
            for leaf in leaves:
                leaf.write()
            cost, tokens = cost + float(total.detach()), tokens + len(wanted_TH)
            step.advance(len(wanted_TH))
        losses.append(cost / tokens)
        if cost == 0.0:  # nothing is missed before the first quantized weight
            break
    for leaf in leaves:
        leaf.finish()
    return losses
