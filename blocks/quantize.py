"""One block's way through: statistics on the quantized stream, codes, packed tensors, and the next block's inputs.

    for each stage of the block (q/k/v, o, gate and up, down):
        quantized stream h' -> target block    -> second moments of what its sites read
        reference stream h  -> original block  -> what the quantized stream misses of it
        codes, scales       -> packed into shards, and written into the target block as a reader will see them
    reference stream h  -> original block -> h of the next block
    quantized stream h' -> target block   -> h' of the next block

Round-to-nearest, and formats that quantize by themselves, need no statistics: then no block is loaded and weights are
read expert by expert.
Shape legend: B experts, O outputs, I inputs.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.moments import SiteMoments
from ..calibration.sensitivity import RESIDUAL
from ..checkpoint.emit import ShardWriter
from ..checkpoint.formats.shard_formats import ShardFormat, shard_format
from ..checkpoint.plan import Plan
from ..core.errors import InputError
from ..core.method import Method
from ..core.rows import RowStore, Step
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, Half, Role, Site, read, stored_dtype
from ..models.walk import Calls, load_block, weight_view
from ..quantize.correction import corrected
from ..quantize.metric import swiglu_metric
from ..quantize.site import cuts, quantize_batch, relative_output_error
from ..recipe import Recipe, matches
from .streams import HalfJob, HalfStatistics, by_module, stacked
from .tuning import tune


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
    metrics: dict[str, torch.Tensor]  # by site key or RESIDUAL; empty: every output counts alike
    token_weights: dict[str, list[torch.Tensor]]  # likewise, fp32 [tokens] a batch; empty: not by gradients

    @property
    def format(self) -> ShardFormat:
        return shard_format(self.recipe.format)

    def quantized_sites(self) -> list[Site]:
        return [site for site in self.adapter.sites(self.index) if site.members[0][0] in self.plan.schemes]

    def sites(self) -> list[Site]:
        """What the statistics are for: what is quantized, and what is aimed at the reference stream as it stays."""
        if not (self.recipe.quantizer.reference_correction and self.recipe.quantizer.aim_kept):
            return self.quantized_sites()
        kept = [site for site in self.adapter.sites(self.index) if site.role is Role.ATTENTION]
        router = self.adapter.router_site(self.index)
        aimed = [*kept, *([router] if router is not None else [])]
        return self.quantized_sites() + [site for site in aimed if not any(map(self._stays, site.members[0]))]

    def _stays(self, module: str) -> bool:
        """Whether a module is quantized, or is to stay as it is by the recipe."""
        return module in self.plan.schemes or any(
            matches(pattern, module) for pattern in self.recipe.widths.keep_modules
        )


def quantize_block(job: BlockJob, step: Step) -> dict[str, Any]:
    """Do the block and return what the record says of it. All its shards are on disk afterwards."""
    facts: dict[str, Any] = {
        "block": job.index,
        "damping_raised": 0,
        "diagonal_fallbacks": 0,
        "output_error": {},
        "aimed": [],
        "tuning": [],
    }
    writer = ShardWriter([s for s in job.plan.shards if s.part == job.index], job.shard_folder)
    if job.method.needs_statistics:
        _with_statistics(job, writer, facts, step)
    else:
        step.begin("quantize", job.index)
        for site in job.quantized_sites():
            if job.format.quantize is not None:
                _hand_over(job, site, writer, facts)
            else:
                _quantize_site(job, site, None, None, writer, facts)
            step.advance(0)
    for name in writer.names():
        if not writer.has(name):
            writer.put(name, read(job.adapter, job.source, name))
    writer.check_complete()
    return facts


def _with_statistics(job: BlockJob, writer: ShardWriter, facts: dict[str, Any], step: Step) -> None:
    """Half by half, and stage by stage: what a later stage reads is what the quantized earlier ones leave."""
    original = load_block(job.adapter, job.source, job.index, job.device, job.dtype)
    target = copy.deepcopy(original)
    facts["expert_rows"] = []
    last = job.index + 1 == job.adapter.n_blocks
    for half in Half:
        sites = [site for site in job.sites() if site.half is half]
        walk = HalfJob(
            job.adapter,
            job.index,
            half,
            job.groups,
            job.store,
            job.calls,
            job.device,
            job.method.reference_correction,
            job.method.token_weighting,
            job.token_weights,
            bool(job.metrics),
        )
        statistics = HalfStatistics(walk, original, target, step)
        for present in _stages(sites, job.method.sequential == "sites"):
            tuned = _to_tune(job, present, sites)
            if tuned:
                step.begin("tune", job.index)
                statistics.reference_rows()
                losses = tune(walk, target, tuned, job.metrics.get(RESIDUAL), job.method.tune_epochs, step)
                facts["tuning"].append({"sites": [site.key for site in tuned], "losses": losses})
            step.begin("statistics", job.index)
            moments = statistics.of(present)
            step.begin("quantize", job.index)
            for site in present:
                if site.role is Role.EXPERT:
                    facts["expert_rows"] = moments[site.key].rows
                if site.members[0][0] in job.plan.schemes:
                    aimed = site.adds_to_residual or not tuned
                    _quantize_site(job, site, target, moments.pop(site.key), writer, facts, aimed)
                else:
                    _aim_site(job, site, target, moments.pop(site.key), writer, facts)
                step.advance(0)
        if not (last and half is Half.FEED_FORWARD):
            step.begin("propagate", job.index)
            statistics.propagate()
    if last:
        job.store.drop(job.index + 1)


def _to_tune(job: BlockJob, present: list[Site], sites: list[Site]) -> list[Site]:
    """What is tuned before the sites that are `present` are quantized: all that is still to be quantized of the
    feed-forward half. Not before matrices that write to the residual stream: they are solved for what the block misses.
    """
    left = [site for site in sites if site.half is Half.FEED_FORWARD and site.members[0][0] in job.plan.schemes]
    if not job.method.tune_epochs or all(site.adds_to_residual for site in present if site in left):
        return []
    return [site for site in left if site.stage >= min(other.stage for other in present)]


def _stages(sites: list[Site], one_by_one: bool) -> list[list[Site]]:
    """Sites whose statistics are taken together, in order; of a half without sites none. In the attention half one
    after the other costs little: what reads a norm needs no run, and o's run is the last that there is."""
    if not (one_by_one or all(site.half is Half.ATTENTION for site in sites)):
        return [sites]
    return [[site for site in sites if site.stage == number] for number in sorted({site.stage for site in sites})]


def _aim_site(
    job: BlockJob, site: Site, block: nn.Module, moments: SiteMoments, writer: ShardWriter, facts: dict[str, Any]
) -> None:
    """A site that stays in the source's dtype: aimed at the reference stream, rounded to that dtype, and no more."""
    (member,) = site.members
    whole = slice(None)
    w_BOI = torch.stack([_stacked(job, block, member)]).to(job.device)
    w_OI = _corrected(job, site, w_BOI, moments.shrunk(job.method.shrinkage, whole), moments, whole)[0]
    start = 0
    for name, out in zip(member, site.out_features, strict=True):
        stored = stored_dtype(job.adapter, job.source, f"{name}.weight")
        weight = w_OI[start : start + out].to(stored)
        start += out
        held = weight_view(job.adapter, block, job.index, name)
        if not torch.equal(held.to(stored), weight):  # nothing has been missed before the first quantized weight
            facts["aimed"].append(name)
        held.copy_(weight)
        writer.put(f"{name}.weight", weight.cpu().contiguous())


def _corrected(
    job: BlockJob, site: Site, w_BOI: torch.Tensor, moment_BII: torch.Tensor, moments: SiteMoments, cut: slice
) -> torch.Tensor:
    """The weights aimed at the reference stream, if the recipe says so."""
    miss = moments.miss(job.method.shrinkage, cut)
    if miss is None:
        return w_BOI
    rows = torch.tensor(moments.rows[cut], device=job.device).clamp_min(1)
    ridge = job.method.correction_strength * site.in_features / rows
    return corrected(w_BOI, moment_BII, miss if site.adds_to_residual else w_BOI @ miss, ridge)


def _stacked(job: BlockJob, block: nn.Module | None, member: tuple[str, ...]) -> torch.Tensor:
    """The weights of one entry of a site, stacked along the outputs, as the block holds them, or where no block is
    loaded as the source does; fp32 [O, I]."""
    if block is None:
        return torch.cat([read(job.adapter, job.source, f"{name}.weight").float() for name in member])
    return stacked(job.adapter, block, job.index, member)


def _output_metric(
    job: BlockJob, site: Site, block: nn.Module, moments: SiteMoments, cut: slice
) -> torch.Tensor | None:
    """[B, O, O] of the experts in `cut`: the site's own, or that of the residual stream which its outputs reach."""
    if not job.metrics:
        return None
    residual_HH = job.metrics[RESIDUAL]
    if site.key in job.metrics:
        return job.metrics[site.key].expand(len(site.members[cut]), -1, -1)
    if site.feeds:
        down = torch.stack([_stacked(job, block, (name,)) for name in site.feeds[cut]])
        return swiglu_metric(moments.slopes(job.method.shrinkage, cut), down, residual_HH)
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
    aimed: bool = True,
) -> None:
    """All experts of one site, cut to the memory budget. `aimed`: at the reference stream, if the recipe says so."""
    assert job.format.pack is not None
    scheme = job.plan.schemes[site.members[0][0]]
    stored = stored_dtype(job.adapter, job.source, f"{site.members[0][0]}.weight")
    outputs = sum(site.out_features)
    measured = bool(job.metrics) and moments is not None
    for cut in cuts(len(site.members), outputs, site.in_features, job.budget_bytes, job.method, measured):
        members = site.members[cut]
        # A block computed with in bf16 has rounded what was stored wider.
        exact = block if job.dtype == torch.float32 or stored == torch.bfloat16 else None
        w_BOI = torch.stack([_stacked(job, exact, member) for member in members]).to(job.device)
        moment = metric = None
        if moments is not None and block is not None:
            metric = _output_metric(job, site, block, moments, cut)
            moment = moments.shrunk(job.method.shrinkage, cut)
            if aimed:
                w_BOI = _corrected(job, site, w_BOI, moment, moments, cut)
        result = quantize_batch(w_BOI, moment, scheme, job.method, stored, metric)
        facts["damping_raised"] += result.damping_raised
        facts["diagonal_fallbacks"] += result.diagonal_fallbacks
        facts["output_error"].setdefault(site.key, []).extend(result.output_error)
        for i, member in enumerate(members):
            for name, weight in by_module(result.weight, i, member, site):
                assert torch.isfinite(weight.scales).all(), f"{name} got a scale that is no number"
                for suffix, tensor in job.format.pack(weight).items():
                    writer.put(f"{name}.{suffix}", tensor)
                if block is not None:
                    # What a reader will see: the product rounded to the model's dtype.
                    weight_view(job.adapter, block, job.index, name).copy_(weight.dequantize(stored))


def _hand_over(job: BlockJob, site: Site, writer: ShardWriter, facts: dict[str, Any]) -> None:
    """A site whose format is the quantizer: weight after weight goes in as the source stores it."""
    assert job.format.quantize is not None
    for member in site.members:
        before, after = [], []
        for name in member:
            weight = read(job.adapter, job.source, f"{name}.weight")
            parts, stored = job.format.quantize(weight, job.plan.schemes[name])
            if not torch.isfinite(stored).all():  # bitsandbytes rounds to fp16 before it quantizes to int8
                raise InputError(
                    f"{name} holds weights that {job.method.method} cannot hold: keep it as it is (keep_modules), or "
                    "choose another method"
                )
            for suffix, tensor in parts.items():
                writer.put(f"{name}.{suffix}", tensor)
            before.append(weight.float())
            after.append(stored.float())
        errors = relative_output_error(torch.cat(before)[None], torch.cat(after)[None], None)
        facts["output_error"].setdefault(site.key, []).extend(errors)
