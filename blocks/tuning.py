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
from torch.optim import Adam

from ..calibration.sensitivity import RESIDUAL
from ..core.finite import nonfinite_error
from ..core.products import quadratic
from ..models.adapter import Role, Site
from ..quantize.metric import METRIC_DAMPING
from .streams import QUANTIZED, REFERENCE, HalfJob

# The learning rate as a fraction of the matrix's root mean square. (A step of the int4 grid is about a third of that
# root mean square.)
RATE = 0.002
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 10
FEW = 4.0


class _Leaf:
    """One matrix that is tuned, with its fp32 master and its own Adam, whose rate is `rate`. `rows`: of the matrix, a
    scalar that grows."""

    def __init__(self, held: torch.Tensor, original: torch.Tensor, rate: float, rows: torch.Tensor) -> None:
        # The original block holds what the matrix was before.
        self.held, self.before, self.rate, self.rows = held, original.detach(), rate, rows
        self.master = nn.Parameter(held.detach().to(torch.float32, copy=True))
        self.adam: Adam | None = Adam([self.master], betas=BETAS, fused=True if held.is_cuda else None)
        held.requires_grad_(True)

    def step(self, gradient: torch.Tensor, share: float) -> None:
        """One step at this share of the rate."""
        assert self.adam is not None
        self.adam.param_groups[0]["lr"] = self.rate * share
        self.master.grad = gradient.float()
        self.adam.step()
        self.master.grad = None
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            self.held.copy_(self.master)

    def finish(self) -> None:
        """Takes back the part of the change that too few rows support, and freezes the matrix."""
        with torch.no_grad():
            kept = self.rows / (self.rows + FEW * self.held.shape[-1])
            before = self.before.float()
            self.master.copy_(before + kept * (self.master - before))
        self._write()
        self.held.requires_grad_(False)


class _Leaves:
    """All matrices that are tuned together. An expert's is a leaf of its own, a view of the stack."""

    def __init__(self, job: HalfJob, sites: list[Site]) -> None:
        self.all: list[_Leaf] = []
        self.dense_rows = torch.zeros((), device=job.hidden.walk.device)
        self.expert_rows = torch.zeros(job.target.adapter.n_experts, device=job.hidden.walk.device)
        self.experts = job.target.experts
        for site in sites:
            if site.role is Role.EXPERT:
                self._add_experts(job, "down" if site.adds_to_residual else "gate_up")
            else:
                for name in site.members[0]:
                    held = job.target.weight(name)
                    self.all.append(_Leaf(held, job.original.weight(name), RATE * _size(held), self.dense_rows))

    def _add_experts(self, job: HalfJob, stack: str) -> None:
        assert self.experts is not None
        assert job.original.experts is not None
        held, original = getattr(self.experts, stack), getattr(job.original.experts, stack)
        rate, views = RATE * _size(held), [matrix.detach() for matrix in held]
        self.all += map(_Leaf, views, original, [rate] * len(views), self.expert_rows)
        self.experts.leaves[stack] = views

    def count(self, routes_TK: torch.Tensor | None, tokens: int) -> None:
        """Counts the rows of one batch."""
        self.dense_rows += tokens
        if routes_TK is not None:
            self.expert_rows += torch.bincount(routes_TK.flatten(), minlength=len(self.expert_rows))

    def step(self, loss: torch.Tensor, share: float) -> None:
        """One step of all. A matrix that no token met has a gradient of zeros."""
        held = [leaf.held for leaf in self.all]
        gradients = list(torch.autograd.grad(loss, held, allow_unused=True, materialize_grads=True))
        for leaf in reversed(self.all):
            leaf.step(gradients.pop(), share)

    def finish(self) -> None:
        for leaf in self.all:
            leaf.adam = None  # its moments are freed before the first matrix is finished
        while self.all:
            self.all.pop().finish()
        if self.experts is not None:
            self.experts.leaves.clear()


def _size(held: torch.Tensor) -> float:
    """The root mean square of a matrix, or of a stack."""
    return float(held.detach().float().square().mean().sqrt())


def _share(done: int, steps: int) -> float:
    """The share of the rate at a step: warmed up, and then falling to zero."""
    return min(1.0, (done + 1) / WARM_UP_STEPS) * (1 - done / steps)


def _steps(job: HalfJob, parts: int) -> list[tuple[int, slice]]:
    """(batch, rows of it) of each step of an epoch. `parts`: into how many a batch is cut, as far as it has rows."""
    found = []
    for k, numbers in enumerate(job.hidden.groups):
        rows = -(-len(numbers) // parts)
        found += [(k, slice(start, start + rows)) for start in range(0, len(numbers), rows)]
    return found


def tune(job: HalfJob, sites: list[Site], metric_HH: torch.Tensor | None, epochs: int, parts: int = 1) -> list[float]:
    """Tune the matrices of `sites` in the target block, in place and in their own dtype. The output of the original
    half must lie in the store. `parts`: steps for each batch. Returns the mean loss of each epoch, every step's
    measured before it."""
    leaves, steps = _Leaves(job, sites), _steps(job, parts)
    if metric_HH is not None:
        metric_HH = metric_HH.clone()
        metric_HH.diagonal().add_(METRIC_DAMPING * metric_HH.diagonal().mean())
    order = torch.Generator().manual_seed(job.index)
    losses = []
    for epoch in range(epochs):
        # Summed where the losses are: a look at one would make the host wait for every step.
        summed, tokens = torch.zeros((), dtype=torch.float64, device=job.hidden.walk.device), 0
        for done, number in enumerate(torch.randperm(len(steps), generator=order).tolist()):
            k, rows = steps[number]
            hidden = job.rows_in(QUANTIZED, k)[rows]
            wanted_TH = job.rows_out(REFERENCE, k)[rows].flatten(0, 1).float()
            passed = job.target.differentiable(hidden, job.half)
            with torch.enable_grad():
                error_TH = passed.hidden.flatten(0, 1).float() - wanted_TH
                cost_T = (error_TH * error_TH).sum(-1) if metric_HH is None else quadratic(error_TH, metric_HH)
                total = (cost_T * job.weight(RESIDUAL, k, wanted_TH, rows)).sum()
                loss = total / len(wanted_TH)
            if epoch == 0:
                leaves.count(passed.routes_TK, len(wanted_TH))
            leaves.step(loss, _share(epoch * len(steps) + done, epochs * len(steps)))
            summed, tokens = summed + total.detach(), tokens + len(wanted_TH)
            job.hidden.walk.step.advance(len(wanted_TH))
        cost = float(summed)
        if not isfinite(cost):
            where = f"block {job.index}, {job.half.said}, the loss of tuning {', '.join(site.key for site in sites)}"
            raise nonfinite_error(False, where)
        losses.append(cost / tokens)
        if cost == 0.0:  # nothing is missed before the first quantized weight
            break
    leaves.finish()
    return losses
