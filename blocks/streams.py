"""The two streams through one half of a block, and what they tell: second moments, misses, slopes, routes.

A block is walked in its halves (models/walk.only): what attention adds does not change while the feed-forward half is
quantized stage by stage, so only that half is run again. What leaves the attention half lies in the store under the
block's own number with MIDDLE after the stream's name.

Shape legend: N rows, T tokens in a batch, H hidden size, R rows of one expert, I inputs of a site.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration.moments import SiteMoments
from ..calibration.sensitivity import RESIDUAL, token_weights
from ..core.quantized_weight import QuantizedWeight
from ..core.rows import RowStore, Step
from ..models.adapter import Adapter, Half, Site
from ..models.walk import Calls, expert_stacks, observed, only, run_block, weight_view
from ..quantize.metric import swiglu_slopes

REFERENCE, QUANTIZED = "reference", "quantized"
MIDDLE = "-middle"
# What the quantized stream's attention gives its output projection.
BEFORE_O = "quantized-before-o"


@dataclass(frozen=True)
class HalfJob:
    """One half of one block: where its rows come from and go to, and which statistics are wanted of it."""

    adapter: Adapter
    index: int
    half: Half
    groups: list[list[int]]
    store: RowStore
    calls: Calls
    device: torch.device
    correct: bool
    weighting: str  # the recipe's `token_weighting`
    token_weights: dict[str, list[torch.Tensor]]  # 'gradient': by site key or RESIDUAL, fp32 [tokens] a batch
    slopes: bool

    def rows_in(self, stream: str, batch: int) -> torch.Tensor:
        suffix = MIDDLE if self.half is Half.FEED_FORWARD else ""
        return self.store.get(self.index, stream + suffix, batch).to(self.device)

    def _place(self, stream: str) -> tuple[int, str]:
        return (self.index, stream + MIDDLE) if self.half is Half.ATTENTION else (self.index + 1, stream)

    def rows_out(self, stream: str, batch: int) -> torch.Tensor:
        block, name = self._place(stream)
        return self.store.get(block, name, batch).to(self.device)

    def weight(self, key: str, batch: int, out_TH: torch.Tensor) -> torch.Tensor:
        """How much a batch's tokens count in a site's statistics, fp32 [tokens]; `out_TH` is what leaves the half. Of a
        site whose gradients are not known it is those of the residual stream, which it reaches."""
        if self.weighting == "gradient":
            return self.token_weights.get(key, self.token_weights[RESIDUAL])[batch].to(self.device)
        return token_weights(None, out_TH, self.weighting)

    def put(self, stream: str, batch: int, hidden: torch.Tensor) -> None:
        block, name = self._place(stream)
        self.store.put(block, name, batch, hidden)


class Seen:
    """One batch of one stream through a half: what chosen sites read, where tokens went, what left the half.

    Sites that read a norm's output need no more than that norm: where all of `sites` do, and `run` does not ask for
    the rest, the half is not run, and there is no `hidden`.
    """

    def __init__(
        self, job: HalfJob, block: nn.Module, stream: str, batch: int, sites: Collection[Site], run: bool = True
    ) -> None:
        hidden = job.rows_in(stream, batch)
        self.tokens = hidden.shape[0] * hidden.shape[1]
        self.rows: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.hidden: torch.Tensor | None = None
        # Without experts all tokens go the same way.
        self.routes = torch.zeros(self.tokens, 1, device=job.device)
        everywhere = torch.arange(self.tokens, device=job.device)
        normed: dict[str, torch.Tensor] = {}
        for site in sites:
            if site.reads_norm is not None:
                if site.reads_norm not in normed:
                    with torch.inference_mode():
                        rows = block.get_submodule(site.reads_norm)(hidden).reshape(self.tokens, -1)
                    normed[site.reads_norm] = rows
                self.rows[site.key, 0] = (everywhere, normed[site.reads_norm])
        inner = {site.key for site in sites if site.reads_norm is None}
        if not (inner or run):
            return

        def observe(site: Site, expert: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
            if site.key in inner:
                self.rows[site.key, expert] = (tokens, rows)

        with observed(job.adapter, block, job.index, observe), only(job.adapter, block, job.half):
            self.hidden = run_block(block, hidden, job.calls.of(hidden.shape[1])[job.index])
        stacks = expert_stacks(block) if job.half is Half.FEED_FORWARD else None
        if stacks is not None:
            self.routes = stacks.routes_TK

    @property
    def out(self) -> torch.Tensor:
        """What left the half, fp32 [tokens, H]."""
        assert self.hidden is not None
        return self.hidden.reshape(self.tokens, -1).float()


class HalfStatistics:
    """Statistics of a half's sites, stage by stage, on the quantized stream; the reference stream passes as often as
    its inputs are wanted, and leaves its rows and its routes behind when it first does."""

    def __init__(self, job: HalfJob, original: nn.Module, target: nn.Module, step: Step) -> None:
        self.job, self.original, self.target, self.step = job, original, target, step
        self.routes: dict[int, torch.Tensor] = {}
        self.before_o: Site | None = None  # once what it reads lies in the store

    def of(self, sites: list[Site]) -> dict[str, SiteMoments]:
        """Second moments of what the quantized stream brings to `sites` of the half-quantized block, and what it
        misses of the reference stream: at the sites' inputs, or for sites that write to the residual stream there."""
        job = self.job
        # Where a site's gradients do not weight the tokens, those that read one norm have their statistics in common.
        first = {site.key: site.key for site in sites}
        if not job.token_weights:
            reading = {site.reads_norm: site.key for site in reversed(sites)}
            first = {site.key: reading[site.reads_norm] if site.reads_norm else site.key for site in sites}
        sites = [site for site in sites if first[site.key] == site.key]
        by_key = {site.key: site for site in sites}
        moments = {}
        for site in sites:
            outputs = sum(site.out_features)
            miss_rows = (outputs if site.adds_to_residual else site.in_features) if job.correct else 0
            slopes = outputs if site.feeds and job.slopes else 0
            moments[site.key] = SiteMoments(len(site.members), site.in_features, job.device, miss_rows, slopes)
        inner = [site for site in sites if not site.adds_to_residual]
        # What the misses are measured against is known before the half is run, and so are the weights.
        whole = not job.correct or len(inner) < len(sites)
        # Attention need not be computed again once o is quantized: its inputs are all that o adds to.
        last = next((site for site in sites if site.half is Half.ATTENTION and site.reaches_residual), None)
        for k in range(len(job.groups)):
            theirs: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
            if job.correct and (inner or k not in self.routes):
                theirs = self._reference(k, inner)
            seen = Seen(job, self.target, QUANTIZED, k, sites, whole)
            self.step.advance(seen.tokens)
            if last is not None and all(site.stage >= last.stage for site in sites):
                job.store.put(job.index, BEFORE_O, k, seen.rows[last.key, 0][1])
                self.before_o = last
            against = job.rows_out(REFERENCE, k).flatten(0, 1).float() if job.correct else seen.out
            weight = {key: job.weight(key, k, against) for key in moments}
            for (key, expert), (tokens, rows) in seen.rows.items():
                moments[key].add(expert, rows, weight[key][tokens])
                if moments[key].slope_EPP is not None:
                    gate_up = stacked(job.adapter, self.target, job.index, by_key[key].members[expert])
                    moments[key].add_slopes(expert, swiglu_slopes(rows.float(), gate_up), weight[key][tokens])
            if not job.correct:
                continue
            alike = (seen.routes == self.routes[k]).all(-1)
            # Once for all experts of the site.
            missed = against - seen.out if len(inner) < len(sites) else None
            for (key, expert), (tokens, x) in seen.rows.items():
                # The router decides the routes: it is shown all tokens, as is whatever comes before it.
                everywhere = by_key[key].reads_norm is not None
                kept = slice(None) if everywhere else alike[tokens]
                if by_key[key].adds_to_residual:
                    assert missed is not None
                    miss = missed[tokens[kept]]
                elif (key, expert) in theirs:
                    their_tokens, their_x = theirs[key, expert]
                    miss = their_x[slice(None) if everywhere else alike[their_tokens]].float() - x[kept].float()
                else:
                    continue
                moments[key].add_miss(expert, x[kept], miss, weight[key][tokens[kept]])
        return {key: moments[found] for key, found in first.items()}

    def _reference(self, batch: int, sites: list[Site]) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
        """One batch of the reference stream through the original half."""
        first = batch not in self.routes
        reference = Seen(self.job, self.original, REFERENCE, batch, sites, run=first)
        self.step.advance(reference.tokens)
        if first:
            assert reference.hidden is not None
            self.routes[batch] = reference.routes
            self.job.put(REFERENCE, batch, reference.hidden)
        return reference.rows

    def reference_rows(self) -> None:
        """The reference stream on to where the half ends."""
        for k in range(len(self.job.groups)):
            if k not in self.routes:
                self._reference(k, [])

    def propagate(self) -> None:
        """Both streams on to where the half ends."""
        job = self.job
        if job.correct:
            self.reference_rows()
        for k, numbers in enumerate(job.groups):
            hidden = job.rows_in(QUANTIZED, k)
            if self.before_o is not None:
                (name,) = self.before_o.members[0]
                rows = job.store.get(job.index, BEFORE_O, k).to(job.device).view(*hidden.shape[:2], -1)
                with torch.inference_mode():
                    out = hidden + F.linear(rows, weight_view(job.adapter, self.target, job.index, name))
            else:
                with only(job.adapter, self.target, job.half):
                    out = run_block(self.target, hidden, job.calls.of(hidden.shape[1])[job.index])
            job.put(QUANTIZED, k, out)
            self.step.advance(len(numbers) * hidden.shape[1])


def stacked(adapter: Adapter, block: nn.Module, index: int, member: tuple[str, ...]) -> torch.Tensor:
    """The weights of one entry of a site as the block holds them, stacked along the outputs; fp32 [O, I]."""
    return torch.cat([weight_view(adapter, block, index, name).float() for name in member])


def by_module(
    weight: QuantizedWeight, index: int, member: tuple[str, ...], site: Site
) -> Iterator[tuple[str, QuantizedWeight]]:
    """One entry of a site's quantized batch, module by module: the inverse of `stacked`."""
    start = 0
    for name, out in zip(member, site.out_features, strict=True):
        yield name, weight.item(index, slice(start, start + out))
        start += out
