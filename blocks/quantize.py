"""One block's way through: statistics on the quantized stream, codes, packed tensors, and the next block's inputs.

    for each turn of the block (q, k and v; o; gates and ups; downs):
        quantized stream h' -> target block    -> second moments of the sites' inputs
        reference stream h  -> original block  -> misses: reference minus quantized stream
        codes, scales       -> packed into shards, and written into the target block as a reader will see them
    reference stream h  -> original block -> h of the next block
    quantized stream h' -> target block   -> h' of the next block

Round-to-nearest, and formats that quantize by themselves, need no statistics. Where nobody wants the block afterwards,
it is not loaded then, and weights are read expert by expert.

Shape legend: B experts, O outputs, I inputs.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ..calibration.moments import SiteMoments
from ..calibration.sensitivity import RESIDUAL, Sensitivity
from ..checkpoint.emit import ShardWriter
from ..checkpoint.formats.shard_formats import ShardFormat, shard_format
from ..checkpoint.plan import Plan
from ..core.device import site_budget
from ..core.errors import InputError
from ..core.finite import first_nonfinite, nonfinite_error
from ..core.method import Method
from ..models.adapter import Half, Role, Site
from ..models.block import Block
from ..models.walk import HiddenRows, Walk
from ..quantize.correction import corrected, corrected_for_inputs
from ..quantize.metric import swiglu_metric
from ..quantize.site import SiteResult, batch_slices, quantize_batch, relative_output_error
from ..recipe import Recipe, matches
from .streams import REFERENCE, HalfJob, Known, by_module, pass_reference, propagate, take_statistics
from .tuning import tune


@dataclass(frozen=True)
class BlockJob:
    """All that one block needs to know."""

    hidden: HiddenRows
    index: int
    plan: Plan
    recipe: Recipe
    shard_folder: Path
    sensitivity: Sensitivity
    # Whether the block is wanted afterwards, although the method needs no more of it than its weights.
    loads_block: bool = False
    # Whose thread writes the shards; None: they are written at once.
    pool: Executor | None = None

    @property
    def walk(self) -> Walk:
        return self.hidden.walk

    @property
    def method(self) -> Method:
        return self.recipe.quantizer

    @property
    def format(self) -> ShardFormat:
        return shard_format(self.recipe.format)

    def quantized_sites(self) -> list[Site]:
        return [site for site in self.walk.adapter.sites(self.index) if site.first_module in self.plan.schemes]

    def sites(self) -> list[Site]:
        """The sites that need statistics: those to be quantized, and those that are only aimed at the reference."""
        if not (self.method.reference_correction and self.method.aim_kept):
            return self.quantized_sites()
        kept = [site for site in self.walk.adapter.sites(self.index) if site.role is Role.ATTENTION]
        router = self.walk.adapter.router_site(self.index)
        aimed = [*kept, *([router] if router is not None else [])]
        return self.quantized_sites() + [site for site in aimed if not any(map(self._not_aimed, site.members[0]))]

    def _not_aimed(self, module: str) -> bool:
        """Whether a module is quantized, or the recipe keeps it as it is."""
        return module in self.plan.schemes or any(
            matches(pattern, module) for pattern in self.recipe.widths.keep_modules
        )


@dataclass(frozen=True)
class _Output:
    """What comes of a block: its tensors, and its entry in the record."""

    writer: ShardWriter
    facts: dict[str, Any] = field(
        default_factory=lambda: {
            "damping_raised": 0,
            "diagonal_fallbacks": 0,
            "output_error": {},
            "aimed": [],
            "tuning": [],
        }
    )

    def take_the_rest(self, job: BlockJob) -> None:
        """What is neither quantized nor aimed, as the source stores it. The shards are complete then: their thread
        writes them while the rows go on to the next block."""
        for name, tensor in job.walk.read_each([name for name in self.writer.names() if not self.writer.has(name)]):
            self.writer.put(name, tensor)

    def add_errors(self, site: Site, errors: list[float]) -> None:
        self.facts["output_error"].setdefault(site.key, []).extend(errors)


@dataclass(frozen=True)
class QuantizedBlock:
    """What quantizing a block gives."""

    # Its entry in the record.
    facts: dict[str, Any]
    # The original, as it was, where it was loaded.
    original: Block | None
    # Returns when all shards are on the disk. Raises ResourceError.
    wait: Callable[[], None]


def quantize_block(job: BlockJob) -> QuantizedBlock:
    """Quantize the block, and write its shards."""
    shards = [shard for shard in job.plan.pieces if shard.part == job.index]
    output, step = _Output(ShardWriter(shards, job.shard_folder, job.pool)), job.walk.step
    wanted = job.method.needs_statistics or job.loads_block
    job.walk.expect(job.index)
    original = job.walk.load(job.index) if wanted else None
    job.walk.expect(job.index + 1)
    marks = None if original is None else original.marks()
    if original is not None and job.method.needs_statistics:
        _with_statistics(job, original, output)
    else:
        step.begin("quantize", job.index)
        for site in job.quantized_sites():
            if job.format.quantize is not None:
                _hand_over(job, site, original, output)
            else:
                _quantize_site(job, site, original, None, output)
            step.advance(0)
        output.take_the_rest(job)
    # The verification walks through this block, too.
    assert original is None or original.marks() == marks, "the original block was written to"
    output.writer.check_complete()
    return QuantizedBlock({"block": job.index} | output.facts, original, output.writer.wait)


def _with_statistics(job: BlockJob, original: Block, output: _Output) -> None:
    """Half by half, and turn by turn: later turns read the outputs of the quantized earlier ones."""
    target = original.copy()
    output.facts["expert_rows"] = []
    last = job.index + 1 == job.walk.adapter.n_blocks
    for half in Half:
        sites = [site for site in job.sites() if site.half is half]
        half_job = HalfJob(
            hidden=job.hidden,
            original=original,
            target=target,
            half=half,
            weighting=job.method.token_weighting,
            token_weights=job.sensitivity.token_weights,
            correct=job.method.reference_correction,
            slopes=bool(job.sensitivity.metrics),
        )
        known = Known()
        for present in _turns(sites, job.method.sequential == "sites"):
            known = _quantize_turn(job, half_job, present, sites, known, output)
        if half is Half.FEED_FORWARD:
            output.take_the_rest(job)
        if last and half is Half.FEED_FORWARD:
            job.hidden.store.drop(job.index + 1, REFERENCE)
        else:
            job.walk.step.begin("propagate", job.index)
            propagate(half_job, known)
        half_job.let_go()


def _quantize_turn(
    job: BlockJob, half_job: HalfJob, present: list[Site], sites: list[Site], known: Known, output: _Output
) -> Known:
    """Tunes what is left of the half, then takes the statistics of the sites `present` and quantizes them. `sites`: all
    of the half."""
    step, target = job.walk.step, half_job.target
    tuned = _to_tune(job, present, sites)
    if tuned:
        step.begin("tune", job.index)
        known = pass_reference(half_job, known)
        parts = job.method.tuned_parts(len(job.hidden.groups))
        losses = tune(half_job, tuned, job.sensitivity.metrics.get(RESIDUAL), job.method.tune_epochs, parts)
        output.facts["tuning"].append({"sites": [site.key for site in tuned], "losses": losses})
    step.begin("statistics", job.index)
    moments, known = take_statistics(half_job, present, known)
    step.begin("quantize", job.index)
    for site in present:
        if site.role is Role.EXPERT:
            output.facts["expert_rows"] = moments[site.key].rows
        if site.first_module in job.plan.schemes:
            aimed = site.adds_to_residual or not tuned
            _quantize_site(job, site, target, moments.pop(site.key), output, aimed)
        else:
            _aim_site(job, site, target, moments.pop(site.key), output)
        step.advance(0)
    return known


def _to_tune(job: BlockJob, present: list[Site], sites: list[Site]) -> list[Site]:
    """The sites to tune before those that are `present` are quantized: all unquantized ones of the feed-forward half.
    None before sites that add to the residual stream: those are solved for the miss of the whole block."""
    left = [site for site in sites if site.half is Half.FEED_FORWARD and site.first_module in job.plan.schemes]
    if not job.method.tune_epochs or all(site.adds_to_residual for site in present if site in left):
        return []
    return [site for site in left if site.turn >= min(other.turn for other in present)]


def _turns(sites: list[Site], one_by_one: bool) -> list[list[Site]]:
    """Sites whose statistics are taken together, in order. The attention half always goes turn by turn, for little:
    sites that read a norm need no run, and o needs the only one."""
    if not (one_by_one or all(site.half is Half.ATTENTION for site in sites)):
        return [sites]
    return [[site for site in sites if site.turn == turn] for turn in sorted({site.turn for site in sites})]


def _aim_site(job: BlockJob, site: Site, block: Block, moments: SiteMoments, output: _Output) -> None:
    """A site that is not quantized: aimed at the reference stream, and rounded to the source's dtype."""
    (member,) = site.members
    w_BOI = block.stacked(member)[None].to(job.walk.device)
    only = slice(0, 1)
    _aim(job, site, w_BOI, moments.shrunk(job.method.shrinkage, only), moments, only)
    w_OI, start = w_BOI[0], 0
    for name, out in zip(member, site.out_features, strict=True):
        stored = job.walk.stored_dtype(f"{name}.weight")
        weight = w_OI[start : start + out].to(stored)
        start += out
        held = block.weight(name)
        if not torch.equal(held.to(stored), weight):  # nothing is missed before the first quantized weight
            output.facts["aimed"].append(name)
        held.copy_(weight)
        output.writer.put(f"{name}.weight", weight.cpu().contiguous())


def _aim(
    job: BlockJob, site: Site, w_BOI: torch.Tensor, moment_BII: torch.Tensor, moments: SiteMoments, cut: slice
) -> None:
    """Aims the weights at the reference stream, in place, or leaves them where the misses were not taken. One matrix at
    a time: the solve holds several copies."""
    for i in range(len(w_BOI)):
        expert, one = cut.start + i, slice(i, i + 1)
        miss = moments.miss(job.method.shrinkage, slice(expert, expert + 1))
        if miss is None:
            return
        ridge = job.method.correction_strength * site.in_features / max(1, moments.rows[expert])
        ridge_B = torch.full((1,), ridge, device=w_BOI.device)
        if site.adds_to_residual:
            w_BOI[one] = corrected(w_BOI[one], moment_BII[one], miss, ridge_B, site.entries_per_token)
        else:
            w_BOI[one] = corrected_for_inputs(w_BOI[one], moment_BII[one], miss, ridge_B)


def _exact(job: BlockJob, site: Site, block: Block | None) -> Block | None:
    """The block, if it holds a site's weights as they are stored: one that is held in bf16 has rounded the others."""
    as_stored = job.walk.compute.dtype == torch.float32 or job.walk.site_dtypes(site) == {torch.bfloat16}
    return block if as_stored else None


def _stacked(job: BlockJob, block: Block | None, member: tuple[str, ...]) -> torch.Tensor:
    """The weights of one entry of a site, stacked along the outputs; fp32 [O, I] on the device. From the source without
    a block."""
    if block is not None:
        return block.stacked(member)
    found = dict(job.walk.read_each([f"{name}.weight" for name in member], job.walk.device))
    return torch.cat([found[f"{name}.weight"].float() for name in member])


def _output_metric(job: BlockJob, site: Site, block: Block, moments: SiteMoments, cut: slice) -> torch.Tensor | None:
    """[B, O, O] for the experts in `cut`: the site's own metric, or the residual stream's carried back to its outputs.
    None where every output counts alike."""
    metrics = job.sensitivity.metrics
    if not metrics:
        return None
    residual_HH = metrics[RESIDUAL]
    if site.key in metrics:
        return metrics[site.key].expand(len(site.members[cut]), -1, -1)
    if site.feeds:
        found = moments.slopes(job.method.shrinkage, cut)
        for slopes, name in zip(found.split(1), site.feeds[cut], strict=True):
            swiglu_metric(slopes, block.joined((name,))[None], residual_HH)
        return found
    if site.adds_to_residual:
        return residual_HH.expand(len(site.members[cut]), -1, -1)
    return None


def _quantize_site(
    job: BlockJob,
    site: Site,
    block: Block | None,
    moments: SiteMoments | None,
    output: _Output,
    aimed: bool = True,
) -> None:
    """All experts of one site, cut to the memory budget. With `moments` the block is the target, which gets the weights
    as a reader will see them; without, it is the original, or None. `aimed`: at the reference stream, if misses were
    taken."""
    assert job.format.pack is not None
    scheme = job.plan.schemes[site.first_module]
    stored = job.walk.scale_dtype(site)
    outputs, budget_bytes = sum(site.out_features), site_budget(job.walk.device)
    measured = bool(job.sensitivity.metrics) and moments is not None
    for cut in batch_slices(len(site.members), outputs, site.in_features, budget_bytes, job.method, measured):
        members = site.members[cut]
        exact = _exact(job, site, block)
        w_BOI = torch.empty(len(members), outputs, site.in_features, device=job.walk.device)
        for w_OI, member in zip(w_BOI, members, strict=True):
            w_OI.copy_(_stacked(job, exact, member))
        moment = metric = None
        if moments is not None and block is not None:
            metric = _output_metric(job, site, block, moments, cut)
            moment = moments.shrunk(job.method.shrinkage, cut)
            if aimed:
                _aim(job, site, w_BOI, moment, moments, cut)
        result = quantize_batch(w_BOI, moment, scheme, job.method, stored, metric)
        output.facts["damping_raised"] += result.damping_raised
        output.facts["diagonal_fallbacks"] += result.diagonal_fallbacks
        _refuse_nonfinite(job, site, result, cut.start)
        output.add_errors(site, result.output_error)
        for i, member in enumerate(members):
            for name, weight in by_module(result.weight, i, member, site):
                for suffix, tensor in job.format.pack(weight).items():
                    output.writer.put(f"{name}.{suffix}", tensor)
                if block is not None and moments is not None:
                    # As a reader will see it: the product rounded to the model's dtype.
                    block.weight(name).copy_(weight.dequantize(stored))


def _refuse_nonfinite(job: BlockJob, site: Site, result: SiteResult, first: int) -> None:
    """Raises NonfiniteError for a scale or an output error that is not finite; `first`: the first of these entries."""
    bad = first_nonfinite(result.weight.scales)
    errors = [n for n, error in enumerate(result.output_error) if not isfinite(error)]
    if bad is None and not errors:
        return
    expert = f", expert {first + (errors[0] if bad is None else bad)}" if site.role is Role.EXPERT else ""
    what = "the error of its output" if bad is None else "its scales"
    raise nonfinite_error(False, f"block {job.index}, {site.half.said}, {site.key}{expert}: {what}")


def _hand_over(job: BlockJob, site: Site, block: Block | None, output: _Output) -> None:
    """A site in a format that quantizes by itself: it gets each weight as the source stores it, but in one dtype."""
    assert job.format.quantize is not None
    dtype, exact = job.walk.scale_dtype(site), _exact(job, site, block)
    for member in site.members:
        before, after = [], []
        if exact is None:
            found = dict(job.walk.read_each([f"{name}.weight" for name in member]))
        else:
            found = {f"{name}.weight": exact.weight(name) for name in member}
        for name in member:
            weight = found[f"{name}.weight"]
            parts, stored = job.format.quantize(weight.cpu().to(dtype), job.plan.schemes[name])
            if not torch.isfinite(stored).all():  # bitsandbytes rounds to fp16 before it quantizes to int8
                raise InputError(
                    f"{name} holds weights that {job.method.method} cannot hold: keep it as it is (keep_modules), or "
                    "choose another method"
                )
            for suffix, tensor in parts.items():
                output.writer.put(f"{name}.{suffix}", tensor)
            before.append(weight.float())
            after.append(stored.float())
        output.add_errors(site, relative_output_error(torch.cat(before)[None], torch.cat(after)[None], None))
