"""One block's way through: statistics on the quantized stream, codes, packed tensors, and the next block's inputs.

    for each stage of the block (q/k/v, o, gate and up, down):
        quantized stream h' -> target block    -> second moments of what its sites read
        reference stream h  -> original block  -> what the quantized stream misses of it
        codes, scales       -> packed into shards, and written into the target block as a reader will see them
    reference stream h  -> original block -> h of the next block
    quantized stream h' -> target block   -> h' of the next block

Round-to-nearest needs no statistics: then no block is loaded and weights are read expert by expert.
Shape legend: B experts, O outputs, I inputs.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.moments import SiteMoments
from .calibration.readers import Readers
from .checkpoint.emit import ShardWriter
from .checkpoint.formats import compressed_tensors as ct
from .core.rows import RowStore, Step
from .core.tensors import TORCH_DTYPES, TensorSource
from .models.adapter import Adapter, Role, Site, read
from .models.walk import Calls, expert_stacks, load_block, observed, run_block, weight_view
from .planner.plan import Plan
from .quantize.correction import corrected
from .quantize.metric import swiglu_metric, swiglu_slopes
from .quantize.site import Method, cuts, quantize_batch
from .recipe import Recipe


@dataclass(frozen=True)
class BlockJob:
    """All that one block needs to know."""

    adapter: Adapter
    source: TensorSource
    plan: Plan
    recipe: Recipe
    method: Method
    index: int
    groups: list[list[int]]
    store: RowStore
    calls: Calls
    device: torch.device
    dtype: torch.dtype
    budget_bytes: int
    shard_folder: Path
    readers: Readers | None  # None: every output counts alike

    def quantized_sites(self) -> list[Site]:
        return [site for site in self.adapter.sites(self.index) if site.members[0][0] in self.plan.schemes]


def quantize_block(job: BlockJob, step: Step) -> dict[str, Any]:
    """Do the block and return what the record says of it. All its shards are on disk afterwards."""
    facts: dict[str, Any] = {"block": job.index, "damping_raised": 0, "diagonal_fallbacks": 0, "output_error": {}}
    writer = ShardWriter([s for s in job.plan.shards if s.stage == job.index], job.shard_folder)
    if job.method.needs_statistics:
        _with_statistics(job, writer, facts, step)
    else:
        step.begin("quantize", job.index)
        for site in job.quantized_sites():
            _quantize_site(job, site, None, None, writer, facts)
            step.advance(0)
    for name in writer.names():
        if not writer.has(name):
            writer.put(name, read(job.adapter, job.source, name))
    writer.check_complete()
    return facts


def _with_statistics(job: BlockJob, writer: ShardWriter, facts: dict[str, Any], step: Step) -> None:
    """Stage by stage: what a later stage reads is what the quantized earlier ones leave."""
    original = load_block(job.adapter, job.source, job.index, job.device, job.dtype)
    target = copy.deepcopy(original)
    sites = job.quantized_sites()
    facts["expert_rows"] = []
    routes: dict[int, torch.Tensor] = {}
    for number in sorted({site.stage for site in sites}):
        step.begin("statistics", job.index)
        present = [site for site in sites if site.stage == number]
        moments = _statistics(job, original, target, present, routes, step)
        step.begin("quantize", job.index)
        for site in present:
            if site.role is Role.EXPERT:
                facts["expert_rows"] = moments[site.key].rows
            _quantize_site(job, site, target, moments.pop(site.key), writer, facts)
            step.advance(0)
    if job.index + 1 == job.adapter.n_blocks:
        job.store.drop(job.index + 1)
        return
    step.begin("propagate", job.index)
    for stream, block in (("reference", original), ("quantized", target)):
        for k, numbers in enumerate(job.groups):
            if stream == "reference" and k in routes:
                continue  # the statistics have propagated it
            hidden = job.store.get(job.index, stream, k).to(job.device)
            out = run_block(block, hidden, job.calls.of(hidden.shape[1])[job.index])
            job.store.put(job.index + 1, stream, k, out)
            step.advance(len(numbers) * hidden.shape[1])


def _statistics(
    job: BlockJob,
    original: nn.Module,
    target: nn.Module,
    sites: list[Site],
    routes: dict[int, torch.Tensor],
    step: Step,
) -> dict[str, SiteMoments]:
    """Second moments of what the quantized stream brings to `sites` of the half-quantized block, and what it misses of
    the reference stream: at the sites' inputs, or for sites that write to the residual stream at the block's output.

    The original block does not change: its output is stored and its routes are kept in `routes`, by batch, when they
    are first seen, and it is walked again only for a site's inputs.
    """
    correct = job.recipe.reference_correction
    by_key = {site.key: site for site in sites}
    moments = {}
    for site in sites:
        outputs = sum(site.out_features)
        miss_rows = (outputs if site.adds_to_residual else site.in_features) if correct else 0
        slopes = outputs if site.feeds and job.readers is not None else 0
        moments[site.key] = SiteMoments(len(site.members), site.in_features, job.device, miss_rows, slopes)
    for k in range(len(job.groups)):
        seen = _Seen(job, target, "quantized", k, moments.keys())
        step.advance(seen.tokens)
        weight = seen.weights() if job.recipe.token_weighting == "residual" else torch.ones_like(seen.out[:, 0])
        for (key, expert), (tokens, rows) in seen.rows.items():
            moments[key].add(expert, rows, weight[tokens])
            if moments[key].slope_EPP is not None:
                gate_up = _stacked(job, target, by_key[key].members[expert])
                moments[key].add_slopes(expert, swiglu_slopes(rows.float(), gate_up), weight[tokens])
        if not correct:
            continue
        theirs: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        if k not in routes or not all(site.adds_to_residual for site in sites):
            reference = _Seen(job, original, "reference", k, moments.keys())
            step.advance(reference.tokens)
            if k not in routes:
                routes[k] = reference.routes
                job.store.put(job.index + 1, "reference", k, reference.hidden)
            theirs = reference.rows
        alike = (seen.routes == routes[k]).all(-1)
        if any(site.adds_to_residual for site in sites):
            residual = job.store.get(job.index + 1, "reference", k).to(job.device).reshape(seen.out.shape) - seen.out
        for (key, expert), (tokens, x) in seen.rows.items():
            kept = alike[tokens]
            if by_key[key].adds_to_residual:
                miss = residual[tokens[kept]]
            elif (key, expert) in theirs:
                their_tokens, their_x = theirs[key, expert]
                miss = their_x[alike[their_tokens]].float() - x[kept].float()
            else:
                continue
            moments[key].add_miss(expert, x[kept], miss, weight[tokens[kept]])
    return moments


class _Seen:
    """One batch of one stream through a block: what chosen sites read, where tokens went, what left the block."""

    def __init__(self, job: BlockJob, block: nn.Module, stream: str, batch: int, keys: Collection[str]) -> None:
        hidden = job.store.get(job.index, stream, batch).to(job.device)
        self.tokens = hidden.shape[0] * hidden.shape[1]
        self.rows: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

        def observe(site: Site, expert: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
            if site.key in keys:
                self.rows[site.key, expert] = (tokens, rows)

        with observed(job.adapter, block, job.index, observe):
            self.hidden = run_block(block, hidden, job.calls.of(hidden.shape[1])[job.index])
        self.out = self.hidden.reshape(self.tokens, -1).float()
        stacks = expert_stacks(block)
        self.routes = torch.zeros(self.tokens, 1) if stacks is None else stacks.routes_TK

    def weights(self) -> torch.Tensor:
        """1 / mean square of the rows that leave the block: what reads them next normalises them, so an error counts
        by its size relative to its row."""
        return 1.0 / self.out.square().mean(-1).clamp_min(1e-12)


def _stacked(job: BlockJob, block: nn.Module | None, member: tuple[str, ...]) -> torch.Tensor:
    """The weights of one entry of a site, stacked along the outputs, as the block holds them, or where no block is
    loaded as the source does; fp32 [O, I]."""
    if block is None:
        return torch.cat([read(job.adapter, job.source, f"{name}.weight").float() for name in member])
    return torch.cat([weight_view(job.adapter, block, job.index, name).float() for name in member])


def _output_metric(
    job: BlockJob, site: Site, block: nn.Module, moments: SiteMoments, cut: slice
) -> torch.Tensor | None:
    """[B, O, O] of the experts in `cut`, for sites whose outputs reach the residual stream."""
    if job.readers is None:
        return None
    residual_HH = job.readers.of(job.index)
    if site.feeds:
        down = torch.stack([_stacked(job, block, (name,)) for name in site.feeds[cut]])
        return swiglu_metric(moments.slopes(job.recipe.shrinkage, cut), down, residual_HH)
    if site.reaches_residual:
        return residual_HH.expand(len(site.members[cut]), -1, -1)
    return None


def _quantize_site(
    job: BlockJob,
    site: Site,
    block: nn.Module | None,
    moments: SiteMoments | None,
    writer: ShardWriter,
    facts: dict[str, Any],
) -> None:
    """All experts of one site, cut to the memory budget."""
    scheme = job.plan.schemes[site.members[0][0]]
    stored = job.source.info(job.adapter.locate(f"{site.members[0][0]}.weight", job.source.names).tensor).dtype
    outputs = sum(site.out_features)
    measured = job.readers is not None and moments is not None
    for cut in cuts(len(site.members), outputs, site.in_features, job.budget_bytes, measured):
        members = site.members[cut]
        # A block computed with in bf16 has rounded what was stored wider.
        exact = block if job.dtype == torch.float32 or stored == "BF16" else None
        w_BOI = torch.stack([_stacked(job, exact, member) for member in members]).to(job.device)
        moment = metric = None
        if moments is not None and block is not None:
            metric = _output_metric(job, site, block, moments, cut)
            moment = moments.shrunk(job.recipe.shrinkage, cut)
            miss = moments.miss(job.recipe.shrinkage, cut)
            if miss is not None:
                rows = torch.tensor(moments.rows[cut], device=job.device).clamp_min(1)
                ridge = job.recipe.correction_strength * site.in_features / rows
                w_BOI = corrected(w_BOI, moment, miss if site.adds_to_residual else w_BOI @ miss, ridge)
        result = quantize_batch(w_BOI, moment, scheme, job.method, TORCH_DTYPES[stored], metric)
        facts["damping_raised"] += result.damping_raised
        facts["diagonal_fallbacks"] += result.diagonal_fallbacks
        facts["output_error"].setdefault(site.key, []).extend(result.output_error)
        for i, member in enumerate(members):
            start = 0
            for name, out in zip(member, site.out_features, strict=True):
                weight = result.weight.item(i, slice(start, start + out))
                start += out
                assert torch.isfinite(weight.scales).all(), f"{name} got a scale that is no number"
                for suffix, tensor in ct.pack(weight).items():
                    writer.put(f"{name}.{suffix}", tensor)
                if block is not None:
                    # What a reader will see: the product rounded to the model's dtype.
                    weight_view(job.adapter, block, job.index, name).copy_(weight.dequantize(TORCH_DTYPES[stored]))
