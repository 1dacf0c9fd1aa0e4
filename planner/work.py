"""The work of a run, counted in operations and bytes, by its stages and by kind. Nothing is measured here.

A token, at a site with O outputs and I inputs; an expert site counts top-k times:

    forward     2 O I
    statistics  4 I^2 for the two second moments; for the slopes of gates and ups 2 O^2, and 2 O I for one more forward
    quantize    quantize/site.matrix_flops for each matrix

How often calibration rows go through a half of a block: the quantized stream once through attention; through the
feed-forward half once for every turn of its sites and once more. The reference stream once through either, and through
the feed-forward half once more for every later turn that reads inner inputs. Both go through attention once more for
each turn that reads inside it (MLA's latents). An epoch of tuning takes them through the feed-forward half forward and
back, three times a forward. The walk back for metrics or token weights takes them through every block three times
forward and once back. Evaluation rows go twice through each block and twice through the head.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial

from ..checkpoint.plan import Plan
from ..core.rates import Rates
from ..core.rows import rows_at_once
from ..models.adapter import Adapter, Half, Role, Site
from ..quantize.site import matrix_flops, working_bytes
from ..recipe import Recipe

# Verification beside its two forward walks: attribution of errors, intervals, files. docs/benchmarks.md measured 1.29.
VERIFICATION_SHARE = 1.3


@dataclass(frozen=True)
class MethodCosts:
    """What of a quantization method costs time and memory. Round-to-nearest has no statistics and none of the rest."""

    statistics: bool
    # Statistics are taken anew for every turn of a half's sites, not once for the half.
    by_turn: bool
    output_metric: bool
    # Number of blocks -> places of the model whose rows lie on disk at once during the walk back. None: no such walk.
    walk_back: Callable[[int], int] | None
    tune_epochs: int
    # Tokens count by each site's own gradients, so sites share no statistics.
    token_gradients: bool
    # (outputs, inputs, whether with an output metric) of one matrix -> what quantizing it holds, and takes.
    matrix_bytes: Callable[[int, int, bool], int]
    matrix_flops: Callable[[int, int, bool], float]

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
            matrix_bytes=partial(working_bytes, method=method),
            matrix_flops=partial(matrix_flops, method=method),
        )


@dataclass(frozen=True)
class Tokens:
    """Tokens of the rows that a run reads; round-to-nearest reads none for calibration."""

    calibration: int
    evaluation: int


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind. core/rates.Rates has a speed for each."""

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
        """Kind of work -> seconds."""
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
    """Work at one site that is quantized. Statistics that it shares with an earlier site cost nothing here."""

    site: Site
    turn: int
    statistics_flops: float  # a calibration token
    moment_bytes: int
    solve_flops: float
    matrix_bytes: int  # of quantizing one matrix

    @property
    def parameters(self) -> int:
        return _parameters(self.site)

    @property
    def reads_inside_attention(self) -> bool:
        site = self.site
        return site.half is Half.ATTENTION and site.reads_norm is None and not site.adds_to_residual


@dataclass(frozen=True)
class BlockWork:
    """Work at one block. `forward_flops`: of one pass, a token, by half."""

    parameters: int
    forward_flops: dict[Half, float]
    sites: tuple[QuantizedSite, ...]

    @property
    def pass_flops(self) -> float:
        """One pass through the whole block, a token."""
        return sum(self.forward_flops.values())

    @property
    def statistics_flops(self) -> float:
        return sum(site.statistics_flops for site in self.sites)

    def calibration_flops(self, tune_epochs: int) -> float:
        """All passes of the calibration rows, a token."""
        attention = 2 + 2 * len({site.site.turn for site in self.sites if site.reads_inside_attention})
        later = [site for site in self.sites if site.site.half is Half.FEED_FORWARD]
        turns = {site.turn for site in later}
        inner_turns = {site.turn for site in later if not site.site.adds_to_residual}
        feed_forward = len(turns) + 1 + max(1, len(inner_turns))
        tuning = 3 * tune_epochs * len(inner_turns)
        flops = self.forward_flops
        return flops[Half.ATTENTION] * attention + flops[Half.FEED_FORWARD] * (feed_forward + tuning)

    @property
    def moment_bytes(self) -> int:
        """The second moments of the turn that has most of them."""
        sums: dict[tuple[Half, int], int] = {}
        for site in self.sites:
            key = site.site.half, site.turn
            sums[key] = sums.get(key, 0) + site.moment_bytes
        return max(sums.values(), default=0)

    @property
    def matrix_bytes(self) -> int:
        return max((site.matrix_bytes for site in self.sites), default=0)

    @property
    def feed_forward_parameters(self) -> int:
        """Those that are quantized."""
        return sum(site.parameters for site in self.sites if site.site.half is Half.FEED_FORWARD)


def _parameters(site: Site) -> int:
    return sum(site.out_features) * site.in_features * len(site.members)


def _share(adapter: Adapter, site: Site) -> int:
    """How often a token goes through the site."""
    return adapter.top_k if site.role is Role.EXPERT else 1


def count_block(adapter: Adapter, plan: Plan, method: MethodCosts, block: int) -> BlockWork:
    forward = dict.fromkeys(Half, 0.0)
    parameters = 0
    quantized: list[QuantizedSite] = []
    norms: set[str] = set()
    for site in adapter.sites(block):
        forward[site.half] += 2.0 * sum(site.out_features) * site.in_features * _share(adapter, site)
        parameters += _parameters(site)
        if site.first_module in plan.schemes:
            shares_moments = site.reads_norm in norms and not method.token_gradients
            quantized.append(_count_site(adapter, method, site, shares_moments))
            norms |= {site.reads_norm} if site.reads_norm else set()
    return BlockWork(parameters=parameters, forward_flops=forward, sites=tuple(quantized))


def _count_site(adapter: Adapter, method: MethodCosts, site: Site, shares_moments: bool) -> QuantizedSite:
    outputs, inputs, count = sum(site.out_features), site.in_features, len(site.members)
    metric = method.output_metric and (bool(site.feeds) or site.reaches_residual)
    slopes = outputs if method.output_metric and site.feeds else 0
    miss = outputs if site.adds_to_residual else inputs  # what the quantized stream misses of the reference
    a_token = (4.0 * inputs**2 + 2.0 * slopes**2 + 2.0 * slopes * inputs) * _share(adapter, site)
    return QuantizedSite(
        site=site,
        turn=site.turn if method.by_turn else 0,
        statistics_flops=0.0 if shares_moments else a_token,
        moment_bytes=0 if shares_moments else 4 * count * (inputs**2 + miss * inputs + slopes**2),
        solve_flops=count * method.matrix_flops(outputs, inputs, metric),
        matrix_bytes=method.matrix_bytes(outputs, inputs, metric),
    )


@dataclass(frozen=True)
class RunWork:
    """All work of a run. `itemsize`: bytes of a number in the hidden rows."""

    adapter: Adapter
    plan: Plan
    method: MethodCosts
    tokens: Tokens
    itemsize: int
    blocks: tuple[BlockWork, ...]

    @classmethod
    def of(cls, adapter: Adapter, plan: Plan, method: MethodCosts, tokens: Tokens, itemsize: int) -> "RunWork":
        blocks = tuple(count_block(adapter, plan, method, block) for block in range(adapter.n_blocks))
        return cls(adapter=adapter, plan=plan, method=method, tokens=tokens, itemsize=itemsize, blocks=blocks)

    @property
    def pass_flops(self) -> float:
        """One pass through all blocks, a token."""
        return sum(block.pass_flops for block in self.blocks)

    @property
    def head_flops(self) -> float:
        """A token, at the head."""
        return 2.0 * self.adapter.vocab_size * self.adapter.hidden_size

    @property
    def stream_bytes(self) -> int:
        """The hidden rows of one stream of the calibration rows, at one place of the model."""
        return self.tokens.calibration * self.adapter.hidden_size * self.itemsize

    def check(self) -> Work:
        """The source is looked through for numbers that are not finite."""
        return Work(read_bytes=self.plan.source_bytes)

    def sensitivity(self) -> Work:
        """The walk forward and back for metrics and token weights."""
        if not self.method.statistics or self.method.walk_back is None:
            return Work()
        tokens = self.tokens.calibration
        return Work(forward_flops=tokens * 5 * self.pass_flops, head_flops=tokens * 2 * self.head_flops)

    def quantizing(self, blocks: tuple[BlockWork, ...] | None = None) -> Work:
        """Blocks, all by default: the source is read, rows go through, shards are written. Streams are written and read
        several times a block."""
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
        """The source and the emitted files are read, and rows go through both. The digests are taken on the way."""
        tokens = 2 * self.tokens.evaluation
        return Work(
            forward_flops=tokens * self.pass_flops * VERIFICATION_SHARE,
            head_flops=tokens * self.head_flops * VERIFICATION_SHARE,
            read_bytes=self.plan.source_bytes + self.plan.disk_bytes,
        )

    def total(self) -> Work:
        return self.verification() + self.quantizing() + self.sensitivity() + self.check()
