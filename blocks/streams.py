"""The two streams through one half of a block: the inputs of each site, and the misses of the quantized stream.

A miss is the reference stream minus the quantized stream, for the same token.

A block is walked in its halves. The output of the attention half does not change while the feed-forward half is
quantized turn by turn, so only the latter is run again. What leaves the attention half lies in the store under the
block's own number, with MIDDLE after the stream's name.

`take_statistics` and `pass_reference` return a `Known`, the results of all passes through the half so far. The caller
hands it to the next of them, and to `propagate`.

Shape legend: N rows, T tokens in a batch, H hidden size, K top-k, R rows of one expert, I inputs of a site.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..calibration.moments import SiteMoments
from ..calibration.sensitivity import RESIDUAL, token_weights
from ..core.finite import all_true, nonfinite_error, row_flags
from ..core.quantized_weight import QuantizedWeight
from ..models.adapter import Half, Role, Site
from ..models.block import Block
from ..models.walk import HiddenRows
from .sums import Beside, Read, SiteRows, add_batch

REFERENCE, QUANTIZED = "reference", "quantized"
MIDDLE = "-middle"
# The stream of the rows that o reads in the quantized stream.
BEFORE_O = "quantized-before-o"


@dataclass(frozen=True)
class HalfJob:
    """One half of one block: its rows, the block as it was and as it becomes, and which statistics are wanted."""

    hidden: HiddenRows
    original: Block
    target: Block
    half: Half
    # How tokens are weighted: the recipe's `token_weighting`.
    weighting: str
    # For 'gradient': by site key or RESIDUAL, fp32 [tokens] for each batch.
    token_weights: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    # Whether the reference stream runs beside the quantized one, so that misses are known.
    correct: bool = False
    # Whether the slopes of gates and ups are wanted.
    slopes: bool = False

    @property
    def index(self) -> int:
        return self.target.index

    def rows_in(self, stream: str, batch: int) -> torch.Tensor:
        """What enters the half, [N, T, H]."""
        suffix = MIDDLE if self.half is Half.FEED_FORWARD else ""
        return self.hidden.get(self.index, stream + suffix, batch)

    def rows_out(self, stream: str, batch: int) -> torch.Tensor:
        """What left the half, [N, T, H]."""
        block, name = self._place(stream)
        return self.hidden.get(block, name, batch)

    def put(self, stream: str, batch: int, hidden: torch.Tensor) -> None:
        """Store what leaves the half."""
        block, name = self._place(stream)
        self.hidden.store.put(block, name, batch, hidden)

    def let_go(self) -> None:
        """Both streams have left the half: what entered it is not read again, but by a resumed run."""
        suffix = MIDDLE if self.half is Half.FEED_FORWARD else ""
        for stream in (REFERENCE + suffix, QUANTIZED + suffix, BEFORE_O):
            self.hidden.store.release(self.index, stream)

    def _place(self, stream: str) -> tuple[int, str]:
        return (self.index, stream + MIDDLE) if self.half is Half.ATTENTION else (self.index + 1, stream)

    def weight(self, key: str, batch: int, out_TH: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """How much each token counts in a site's statistics, fp32 [T]; `out_TH` leaves the half. A site without
        gradients of its own takes those of the residual stream, which it reaches. `rows`: of these rows of the batch
        alone, as `out_TH` is."""
        if self.weighting == "gradient":
            weights = self.token_weights.get(key, self.token_weights[RESIDUAL])[batch]
            weights = weights.view(len(self.hidden.groups[batch]), -1)[rows].flatten()
            return weights.to(self.hidden.walk.device)
        return token_weights(None, out_TH, self.weighting)


@dataclass(frozen=True)
class Known:
    """The results of earlier passes through a half that later ones need."""

    # The reference stream's routes, [T, K] for each batch, once its rows lie in the store where the half ends.
    routes: tuple[torch.Tensor, ...] | None = None
    # The site o, once its inputs lie in the store.
    before_o: Site | None = None


@dataclass(frozen=True)
class Seen:
    """One batch of one stream in a half: the inputs of the chosen sites, each token's route, and the output."""

    tokens: int
    rows: SiteRows
    routes: torch.Tensor
    hidden: torch.Tensor | None  # None where the half was not run

    @property
    def out(self) -> torch.Tensor:
        """What leaves the half, fp32 [T, H]."""
        assert self.hidden is not None
        return self.hidden.reshape(self.tokens, -1).float()


def _pass(job: HalfJob, stream: str, batch: int, sites: Collection[Site], run: bool = True) -> Seen:
    """One batch of the reference stream through the original half, or of the quantized stream through the target.

    Sites that read a norm's output need only that norm. Where all of `sites` do, and `run` is False, the half is not
    run, and the result has no `hidden` and no true routes.
    """
    block = job.original if stream == REFERENCE else job.target
    hidden = job.rows_in(stream, batch)
    tokens = hidden.shape[0] * hidden.shape[1]
    everywhere = torch.arange(tokens, device=hidden.device)
    rows: dict[tuple[str, int], Read] = {}
    normed: dict[str, torch.Tensor] = {}
    for site in sites:
        if site.reads_norm is not None:
            if site.reads_norm not in normed:
                with torch.inference_mode():
                    normed[site.reads_norm] = block.norm(site.reads_norm)(hidden).reshape(tokens, -1)
            rows[site.key, 0] = Read(everywhere, normed[site.reads_norm])
    inner = {site.key for site in sites if site.reads_norm is None}
    # Without experts all tokens take the same route.
    alike = torch.zeros(tokens, 1, device=hidden.device)
    if not (inner or run):
        return Seen(tokens=tokens, rows=rows, routes=alike, hidden=None)

    def observe(
        site: Site, expert: int, of_tokens: torch.Tensor, read: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        if site.key in inner:
            rows[site.key, expert] = Read.by(site, of_tokens, read, scale)

    with block.observed(observe):
        passed = block.routed(hidden, job.half)
    routes = alike if passed.routes_TK is None else passed.routes_TK
    return Seen(tokens=tokens, rows=rows, routes=routes, hidden=passed.hidden)


def _pass_reference(job: HalfJob, batch: int, sites: Collection[Site], known: Known) -> tuple[SiteRows, torch.Tensor]:
    """One batch of the reference stream: the inputs of `sites`, and the routes [T, K]. The first pass runs the half and
    stores the output; later ones run it only for sites that need it."""
    if known.routes is not None and not sites:
        return {}, known.routes[batch]
    seen = _pass(job, REFERENCE, batch, sites, run=known.routes is None)
    job.hidden.walk.step.advance(seen.tokens)
    if known.routes is not None:
        return seen.rows, known.routes[batch]
    assert seen.hidden is not None
    job.put(REFERENCE, batch, seen.hidden)
    return seen.rows, seen.routes


def pass_reference(job: HalfJob, known: Known) -> Known:
    """The reference stream to where the half ends, if it is not there yet."""
    if known.routes is not None:
        return known
    batches = range(len(job.hidden.groups))
    return replace(known, routes=tuple(_pass_reference(job, k, [], known)[1] for k in batches))


def take_statistics(job: HalfJob, sites: Sequence[Site], known: Known) -> tuple[dict[str, SiteMoments], Known]:
    """By site key, the second moments of the sites' inputs in the quantized stream, in the half-quantized block. With
    `correct` also the misses: at the inputs or, for sites that add to the residual stream, where the half ends."""
    shared = _shared(job, sites)
    own = [site for site in sites if shared[site.key] == site.key]
    moments = {site.key: _empty(job, site) for site in own}
    inner = [site for site in own if not site.adds_to_residual]
    # With `correct` and only inner sites, all that misses and weights need lies in the store, and no run is needed.
    run = not job.correct or len(inner) < len(own)
    # Once o is quantized, attention is not computed again: o's inputs are kept, and only o differs.
    last = next((site for site in own if site.half is Half.ATTENTION and site.adds_to_residual), None)
    keep = last if last is not None and all(site.turn >= last.turn for site in own) else None
    routes = []
    for k in range(len(job.hidden.groups)):
        theirs: SiteRows = {}
        if job.correct:
            theirs, routes_TK = _pass_reference(job, k, inner, known)
            routes.append(routes_TK)
        seen = _pass(job, QUANTIZED, k, own, run)
        job.hidden.walk.step.advance(seen.tokens)
        if keep is not None:
            job.hidden.store.put(job.index, BEFORE_O, k, seen.rows[keep.key, 0].rows)
        against = job.rows_out(REFERENCE, k).flatten(0, 1).float() if job.correct else seen.out
        weights = {key: job.weight(key, k, against) for key in moments}
        beside = None
        if job.correct:
            missed = against - seen.out if len(inner) < len(own) else None
            beside = Beside((seen.routes == routes[k]).all(-1), theirs, missed)
        add_batch(job.target, own, moments, seen.rows, weights, beside)
    for site in own:
        where = f"block {job.index}, {job.half.said}, {site.key}"
        moments[site.key].refuse_nonfinite(job.target.original, where, site.role is Role.EXPERT)
    found = {key: moments[source] for key, source in shared.items()}
    return found, Known(routes=tuple(routes) if job.correct else None, before_o=keep or known.before_o)


def _shared(job: HalfJob, sites: Sequence[Site]) -> dict[str, str]:
    """Site key -> the key of the site whose statistics it takes. Sites that read one norm share them, unless each
    site's gradients weight the tokens."""
    if job.token_weights:
        return {site.key: site.key for site in sites}
    reading = {site.reads_norm: site.key for site in reversed(sites)}
    return {site.key: reading[site.reads_norm] if site.reads_norm else site.key for site in sites}


def _empty(job: HalfJob, site: Site) -> SiteMoments:
    outputs = sum(site.out_features)
    miss_rows = outputs if site.adds_to_residual else site.in_features
    return SiteMoments(
        experts=len(site.members),
        inputs=site.in_features,
        device=job.hidden.walk.device,
        miss_rows=miss_rows if job.correct else 0,
        slopes=outputs if site.feeds and job.slopes else 0,
    )


def propagate(job: HalfJob, known: Known) -> None:
    """Both streams to where the half ends; the reference stream only with `correct`."""
    if job.correct:
        pass_reference(job, known)
    for k, numbers in enumerate(job.hidden.groups):
        hidden = job.rows_in(QUANTIZED, k)
        if known.before_o is not None:
            rows = job.hidden.get(job.index, BEFORE_O, k).view(*hidden.shape[:2], -1)
            with torch.inference_mode():
                out = hidden + F.linear(rows, job.target.weight(known.before_o.first_module))
            if not all_true(row_flags(out)):
                raise nonfinite_error(job.target.original, f"block {job.index}, {job.half.said}")
        else:
            out = job.target.forward(hidden, job.half)
        job.put(QUANTIZED, k, out)
        job.hidden.walk.step.advance(len(numbers) * hidden.shape[1])


def by_module(
    weight: QuantizedWeight, index: int, member: tuple[str, ...], site: Site
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Entry `index` of a site's quantized batch, module by module: the inverse of Block.stacked."""
    start = 0
    for name, out in zip(member, site.out_features, strict=True):
        yield name, weight.item(index, slice(start, start + out))
        start += out
