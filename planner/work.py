"""Counts the work of a run in operations and bytes, by stage and by kind. Nothing is measured here.

Operations per token at a site with O outputs and I inputs; an expert site counts top-k times:

    forward     2 O I
    statistics  4 I^2 for the two second moments. Slopes of gates and ups add 2 O^2, and 2 O I for one more forward
    quantize    quantize/site.matrix_flops for each matrix (per matrix, not per token)

Passes of the calibration rows through the halves of a block:

- The quantized stream passes attention once. It passes the feed-forward half once per turn of its sites, and once more.
- The reference stream passes each half once. It passes the feed-forward half once more for each later turn that reads
  inner inputs.
- Both streams pass attention once more for each turn that reads inside it (MLA's latents).
- An epoch of tuning goes forward and back through the feed-forward half, which costs three forward passes.
- The walk back for metrics or token weights goes through every block three times forward and once back.

Evaluation rows pass each block twice and the head twice.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial

from ..checkpoint.formats.shard_formats import SHARD_FORMATS
from ..checkpoint.plan import Plan
from ..core.method import Method
from ..core.rates import Rates
from ..core.rows import rows_at_once
from ..models.adapter import Adapter, Half, Site
from ..quantize.site import batch_slices, matrix_flops, working_bytes
from ..recipe import Recipe

# Verification's cost relative to its two forward walks. The excess is error attribution, intervals and files.
# docs/benchmarks.md measured 1.29.
VERIFICATION_SHARE = 1.3


@dataclass(frozen=True)
class MethodCosts:
    """The traits of a quantization method that cost time or memory. Round-to-nearest has none of them."""

    statistics: bool
    # Whether statistics are taken anew for each turn of a half's sites, rather than once for the half.
    by_turn: bool
    output_metric: bool
    # Maps the number of blocks to the number of places in the model whose rows are on disk at once during the walk
    # back. None if the method has no such walk.
    walk_back: Callable[[int], int] | None
    tune_epochs: int
    # Whether each site's own gradients weight the tokens; sites then share no statistics.
    token_gradients: bool
    # How many matrices are quantized together, from (site, whether it has an output metric, budget in bytes); then
    # bytes for so many and operations for one, from (number,) outputs, inputs and whether there is an output metric.
    cut: Callable[[Site, bool, int], int]
    batch_bytes: Callable[[int, int, int, bool], int]
    matrix_flops: Callable[[int, int, bool], float]
    # All of the recipe's choices, for what a GPU does.
    quantizer: Method
    # Whether the files exist only at the end, so that the verification walks through both models once more.
    verifies_at_the_end: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "MethodCosts":
        method = recipe.quantizer
        return cls(
            statistics=method.needs_statistics,
            by_turn=method.sequential == "sites",
            output_metric=method.output_metric,
            walk_back=rows_at_once if method.walks_back else None,
            tune_epochs=method.tune_epochs if method.needs_statistics else 0,
            token_gradients=method.token_weighting == "gradient",
            cut=partial(_cut, method=method),
            batch_bytes=partial(working_bytes, method=method),
            matrix_flops=partial(matrix_flops, method=method),
            quantizer=method,
            verifies_at_the_end=recipe.format not in SHARD_FORMATS,
        )


def _cut(site: Site, metric: bool, budget_bytes: int, *, method: Method) -> int:
    """How many matrices of a site are quantized together."""
    outputs, inputs = sum(site.out_features), site.in_features
    return next(batch_slices(len(site.members), outputs, inputs, budget_bytes, method, metric)).stop


@dataclass(frozen=True)
class Tokens:
    """Tokens of the rows that a run reads. Round-to-nearest reads none for calibration."""

    calibration: int
    evaluation: int
    # Of a row: what a token can attend to.
    row: int = 2048


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind. core/rates.Rates holds the speed of each kind."""

    forward_flops: float = 0.0
    product_flops: float = 0.0
    solve_flops: float = 0.0
    head_flops: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def flops(self) -> float:
        return self.forward_flops + self.product_flops + self.head_flops + self.solve_flops

    def seconds_by(self, rates: Rates) -> dict[str, float]:
        """Seconds by kind of work."""
        return {
            "forward": self.forward_flops / rates.forward_flops,
            "statistics": self.product_flops / rates.product_flops,
            "quantize": self.solve_flops / rates.solve_flops,
            "head": self.head_flops / rates.head_flops,
            "disk": self.read_bytes / rates.read_bytes + self.write_bytes / rates.write_bytes,
        }

    def seconds(self, rates: Rates) -> float:
        return sum(self.seconds_by(rates).values())


@dataclass(frozen=True)
class QuantizedSite:
    """Work at one quantized site. Statistics shared with an earlier site count as zero."""

    site: Site
    turn: int
    statistics_flops: float  # per calibration token
    moment_bytes: int
    solve_flops: float
    metric: bool
    method: MethodCosts

    @property
    def parameters(self) -> int:
        return _parameters(self.site)

    def site_bytes(self, budget_bytes: int) -> int:
        """Held while a part of the site is quantized."""
        cut = self.method.cut(self.site, self.metric, budget_bytes)
        return self.method.batch_bytes(cut, sum(self.site.out_features), self.site.in_features, self.metric)

    def cut_parameters(self, budget_bytes: int) -> int:
        """The weights of that part."""
        return self.parameters // len(self.site.members) * self.method.cut(self.site, self.metric, budget_bytes)

    @property
    def reads_inside_attention(self) -> bool:
        site = self.site
        return site.half is Half.ATTENTION and site.reads_norm is None and not site.adds_to_residual


@dataclass(frozen=True)
class BlockWork:
    """Work at one block."""

    parameters: int
    # By half, for one pass of one token.
    forward_flops: dict[Half, float]
    sites: tuple[QuantizedSite, ...]

    @property
    def pass_flops(self) -> float:
        """Operations of one pass of one token through the block."""
        return sum(self.forward_flops.values())

    @property
    def statistics_flops(self) -> float:
        return sum(site.statistics_flops for site in self.sites)

    def calibration_flops(self, tune_epochs: int) -> float:
        """Operations per token of all passes of the calibration rows."""
        attention = 2 + 2 * len({site.site.turn for site in self.sites if site.reads_inside_attention})
        later = [site for site in self.sites if site.site.half is Half.FEED_FORWARD]
        turns = {site.turn for site in later}
        inner_turns = {site.turn for site in later if not site.site.adds_to_residual}
        feed_forward = len(turns) + 1 + max(1, len(inner_turns))
        tuning = 3 * tune_epochs * len(inner_turns)
        flops = self.forward_flops
        return flops[Half.ATTENTION] * attention + flops[Half.FEED_FORWARD] * (feed_forward + tuning)

    def turn_bytes(self, site_budget_bytes: int) -> int:
        """Bytes of the second moments and of one part of a site, in the turn that holds the most."""
        turns: dict[tuple[Half, int], list[QuantizedSite]] = {}
        for site in self.sites:
            turns.setdefault((site.site.half, site.turn), []).append(site)
        sums = [
            sum(site.moment_bytes for site in turn) + max(site.site_bytes(site_budget_bytes) for site in turn)
            for turn in turns.values()
        ]
        return max(sums, default=0)

    @property
    def feed_forward_parameters(self) -> int:
        """The quantized parameters of the feed-forward half."""
        return sum(site.parameters for site in self.sites if site.site.half is Half.FEED_FORWARD)


def _parameters(site: Site) -> int:
    return sum(site.out_features) * site.in_features * len(site.members)


def pass_work(adapter: Adapter, block: int) -> BlockWork:
    """Work of a block's forward passes, without quantized sites."""
    forward = dict.fromkeys(Half, 0.0)
    for site in adapter.sites(block):
        forward[site.half] += 2.0 * sum(site.out_features) * site.in_features * site.entries_per_token
    return BlockWork(parameters=sum(map(_parameters, adapter.sites(block))), forward_flops=forward, sites=())


def count_block(adapter: Adapter, plan: Plan, method: MethodCosts, block: int) -> BlockWork:
    quantized: list[QuantizedSite] = []
    norms: set[str] = set()
    for site in adapter.sites(block):
        if site.first_module in plan.schemes:
            shares_moments = site.reads_norm in norms and not method.token_gradients
            quantized.append(_count_site(method, site, shares_moments))
            norms |= {site.reads_norm} if site.reads_norm else set()
    return replace(pass_work(adapter, block), sites=tuple(quantized))


def _count_site(method: MethodCosts, site: Site, shares_moments: bool) -> QuantizedSite:
    outputs, inputs, count = sum(site.out_features), site.in_features, len(site.members)
    metric = method.output_metric and (bool(site.feeds) or site.adds_to_residual)
    slopes = outputs if method.output_metric and site.feeds else 0
    miss = outputs if site.adds_to_residual else inputs  # width of the gap between the two streams
    a_token = (4.0 * inputs**2 + 2.0 * slopes**2 + 2.0 * slopes * inputs) * site.entries_per_token
    return QuantizedSite(
        site=site,
        turn=site.turn if method.by_turn else 0,
        statistics_flops=0.0 if shares_moments else a_token,
        moment_bytes=0 if shares_moments else 4 * count * (inputs**2 + miss * inputs + slopes**2),
        solve_flops=count * method.matrix_flops(outputs, inputs, metric),
        metric=metric,
        method=method,
    )


@dataclass(frozen=True)
class RunWork:
    """All work of a run."""

    adapter: Adapter
    plan: Plan
    method: MethodCosts
    tokens: Tokens
    # Bytes of a number in the hidden rows.
    itemsize: int
    blocks: tuple[BlockWork, ...]

    @classmethod
    def of(cls, adapter: Adapter, plan: Plan, method: MethodCosts, tokens: Tokens, itemsize: int) -> "RunWork":
        blocks = tuple(count_block(adapter, plan, method, block) for block in range(adapter.n_blocks))
        return cls(adapter=adapter, plan=plan, method=method, tokens=tokens, itemsize=itemsize, blocks=blocks)

    @property
    def pass_flops(self) -> float:
        """Operations of one pass of one token through all blocks."""
        return sum(block.pass_flops for block in self.blocks)

    @property
    def head_flops(self) -> float:
        """Operations of one token at the head."""
        return 2.0 * self.adapter.vocab_size * self.adapter.hidden_size

    @property
    def stream_bytes(self) -> int:
        """Bytes of the calibration rows' hidden rows, for one stream at one place in the model."""
        return self.tokens.calibration * self.adapter.hidden_size * self.itemsize

    @property
    def evaluation_bytes(self) -> int:
        """Bytes of the evaluation rows' hidden rows, for one model at one place."""
        return self.tokens.evaluation * self.adapter.hidden_size * self.itemsize

    def check(self) -> Work:
        """The search of the source for non-finite numbers."""
        return Work(read_bytes=self.plan.source_bytes)

    def sensitivity(self) -> Work:
        """The walk forward and back for metrics and token weights; no work if the method has no such walk."""
        if not self.method.statistics or self.method.walk_back is None:
            return Work()
        tokens = self.tokens.calibration
        return Work(forward_flops=tokens * 5 * self.pass_flops, head_flops=tokens * 2 * self.head_flops)

    def quantizing(self, blocks: tuple[BlockWork, ...] | None = None) -> Work:
        """Reading the source, passing the rows and writing the shards, for `blocks` or for all blocks.

        Each block reads and writes the rows of a stream four times.
        """
        chosen = self.blocks if blocks is None else blocks
        share = 1.0
        if blocks is not None:
            share = sum(b.parameters for b in chosen) / max(1, sum(b.parameters for b in self.blocks))
        read, written = int(self.plan.source_bytes * share), int(self.plan.disk_bytes * share)
        if not self.method.statistics:
            return Work(read_bytes=read, write_bytes=written)
        tokens, moved = self.tokens.calibration, len(chosen) * 4 * self.stream_bytes
        return Work(
            forward_flops=tokens * sum(block.calibration_flops(self.method.tune_epochs) for block in chosen),
            product_flops=tokens * sum(block.statistics_flops for block in chosen),
            solve_flops=sum(site.solve_flops for block in chosen for site in block.sites),
            read_bytes=read + moved,
            write_bytes=written + moved,
        )

    def verification(self) -> Work:
        """Reading the emitted files back, and passing the rows through both models. Digests are taken meanwhile. The
        source is read again only where the files exist at the end only."""
        tokens = 2 * self.tokens.evaluation
        again = self.plan.source_bytes if self.method.verifies_at_the_end else 0
        return Work(
            forward_flops=tokens * self.pass_flops * VERIFICATION_SHARE,
            head_flops=tokens * self.head_flops * VERIFICATION_SHARE,
            read_bytes=again + self.plan.disk_bytes,
        )

    def total(self) -> Work:
        return self.verification() + self.quantizing() + self.sensitivity() + self.check()
