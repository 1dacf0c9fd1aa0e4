"""One block's way through: statistics on the quantized stream, codes, packed tensors, and the next block's inputs.

    reference stream h  -> block as it was         -> h of the next block
    quantized stream h' -> block as it was          -> second moments of every site, per expert
    codes, scales       -> packed into shards, and written back into the block, dequantized
    quantized stream h' -> block as it will be read -> h' of the next block

Round-to-nearest needs no statistics: then no block is loaded and weights are read expert by expert.
Shape legend: B experts, O outputs, I inputs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.moments import SiteMoments
from .checkpoint.emit import ShardWriter
from .checkpoint.formats import compressed_tensors as ct
from .core.rows import RowStore, Step
from .core.tensors import TORCH_DTYPES, TensorSource
from .models.adapter import Adapter, Role, Site, read
from .models.walk import Calls, load_block, observed, run_block, weight_view
from .planner.plan import Plan
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

    def quantized_sites(self) -> list[Site]:
        return [site for site in self.adapter.sites(self.index) if site.members[0][0] in self.plan.schemes]


def quantize_block(job: BlockJob, step: Step) -> dict[str, Any]:
    """Do the block and return what the record says of it. All its shards are on disk afterwards."""
    facts: dict[str, Any] = {"block": job.index, "damping_raised": 0, "diagonal_fallbacks": 0, "output_error": {}}
    writer = ShardWriter([s for s in job.plan.shards if s.stage == job.index], job.shard_folder)
    block: nn.Module | None = None
    moments: dict[str, SiteMoments] = {}
    if job.method.needs_statistics:
        step.begin("statistics", job.index)
        block = load_block(job.adapter, job.source, job.index, job.device, job.dtype)
        moments = _statistics(job, block, step)
        facts["expert_rows"] = next((moments[s.key].rows for s in job.quantized_sites() if s.role is Role.EXPERT), [])
    step.begin("quantize", job.index)
    for site in job.quantized_sites():
        facts["output_error"][site.key] = []
        _quantize_site(job, site, block, moments.pop(site.key, None), writer, facts)
    for name in writer.names():
        if not writer.has(name):
            writer.put(name, read(job.adapter, job.source, name))
    writer.check_complete()
    if block is not None and job.index + 1 < job.adapter.n_blocks:
        step.begin("propagate", job.index)
        for k, numbers in enumerate(job.groups):
            hidden = job.store.get(job.index, "quantized", k).to(job.device)
            out = run_block(block, hidden, job.calls.of(hidden.shape[1])[job.index])
            job.store.put(job.index + 1, "quantized", k, out)
            step.advance(len(numbers) * hidden.shape[1])
    return facts


def _statistics(job: BlockJob, block: nn.Module, step: Step) -> dict[str, SiteMoments]:
    """Both streams through the block as it was; second moments of what the quantized stream brings to each site."""
    moments = {site.key: SiteMoments(len(site.members), site.in_features, job.device) for site in job.quantized_sites()}

    def observe(site: Site, expert: int, rows: torch.Tensor) -> None:
        if site.key in moments:
            moments[site.key].add(expert, rows)

    last = job.index + 1 == job.adapter.n_blocks
    for k, numbers in enumerate(job.groups):
        hidden = job.store.get(job.index, "reference", k).to(job.device)
        call = job.calls.of(hidden.shape[1])[job.index]
        if not last:
            job.store.put(job.index + 1, "reference", k, run_block(block, hidden, call))
        hidden = job.store.get(job.index, "quantized", k).to(job.device)
        with observed(job.adapter, block, job.index, observe):
            run_block(block, hidden, call)
        step.advance(2 * len(numbers) * hidden.shape[1])
    return moments


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
    for cut in cuts(len(site.members), outputs, site.in_features, job.budget_bytes):
        members = site.members[cut]
        w_BOI = torch.empty(len(members), outputs, site.in_features, device=job.device)
        for i, member in enumerate(members):
            start = 0
            for name, out in zip(member, site.out_features, strict=True):
                if block is None:
                    w_BOI[i, start : start + out] = read(job.adapter, job.source, f"{name}.weight").to(job.device)
                else:
                    w_BOI[i, start : start + out] = weight_view(job.adapter, block, job.index, name)
                start += out
        moment = None if moments is None else moments.shrunk(job.recipe.shrinkage, cut)
        result = quantize_batch(w_BOI, moment, scheme, job.method, TORCH_DTYPES[stored])
        facts["damping_raised"] += result.damping_raised
        facts["diagonal_fallbacks"] += result.diagonal_fallbacks
        facts["output_error"][site.key] += result.output_error
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
