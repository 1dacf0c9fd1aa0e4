"""What a run has to do, counted in operations and bytes, by stage of the run and kind of work. No rates, no seconds.

forward:    2 x outputs x inputs a row; an expert site sees tokens x top-k rows in all
statistics: 2 x inputs^2 a row for each of the two second moments; slopes of gates and ups: 2 x outputs^2 and once more
            the forward
solve:      quantize/site.matrix_flops
head:       2 x vocabulary x hidden size a row and model

Counts are integers: sums by block and sums by kind agree to the last digit, whatever their order. Only `solve`, which
a method may count in fractions, is not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from ..checkpoint.plan import Plan
from ..core.method import Method
from ..core.rows import spacing
from ..models.adapter import Adapter, Half, Role, Site
from ..quantize.site import matrix_flops, working_bytes
from ..recipe import Recipe

# What is embedded, and what is made of the results, is in no count: such stages get their time from what is measured.
QUANTIZING = ("tune", "statistics", "quantize", "propagate")
VERIFYING = ("verify: reference", "verify: quantized", "verify: errors")


@dataclass(frozen=True)
class Workload:
    """A model, a plan and a recipe, and how many tokens they are for."""

    adapter: Adapter
    plan: Plan
    recipe: Recipe
    dtype: torch.dtype
    calibration_tokens: int
    evaluation_tokens: int

    @property
    def method(self) -> Method:
        return self.recipe.quantizer

    @property
    def tune_epochs(self) -> int:
        return self.method.tune_epochs if self.method.needs_statistics else 0

    @property
    def stream_bytes(self) -> int:
        """Hidden rows of all calibration tokens at one place of the model."""
        return self.calibration_tokens * self.adapter.hidden_size * self.dtype.itemsize

    @cached_property
    def blocks(self) -> list["BlockWork"]:
        return [block_work(self, block) for block in range(self.adapter.n_blocks)]


@dataclass(frozen=True)
class BlockWork:
    """What one block takes. Operations are for one token, except `solve`."""

    forward: int
    # Passes of the calibration rows while the block is quantized.
    calibration: int
    statistics: int
    # Quantizing all its matrices.
    solve: float
    weights: int
    # The second moments that are held at the same time.
    moment_bytes: int
    # What quantizing its largest matrix holds.
    matrix_bytes: int
    # Weights that are tuned together.
    tuned_weights: int


@dataclass(frozen=True)
class Counts:
    """Operations by kind, and bytes."""

    forward: int = 0
    statistics: int = 0
    solve: float = 0.0
    head: int = 0
    read: int = 0
    write: int = 0


@dataclass(frozen=True)
class StageWork:
    """One stage of a run. The fields but `counts` are those of core/schedule.Expected."""

    name: str
    kind: str
    counts: Counts
    tasks: tuple[str, ...]
    block: int | None = None
    tokens: int = 0


@dataclass(frozen=True)
class RunWork:
    """All stages of a run, by its parts in their order."""

    check: list[StageWork]
    sensitivities: list[StageWork]
    blocks: list[StageWork]
    rest: list[StageWork]
    verification: list[StageWork]

    @property
    def move(self) -> StageWork:
        return self.rest[-1]

    @property
    def stages(self) -> list[StageWork]:
        return self.check + self.sensitivities + self.blocks + self.rest + self.verification


def total(stages: Iterable[StageWork]) -> Counts:
    """The sum by kind."""
    counts = [stage.counts for stage in stages]
    return Counts(**{field.name: sum(getattr(count, field.name) for count in counts) for field in fields(Counts)})


def site_flops(site: Site, adapter: Adapter) -> int:
    """Forward operations of a site for one token."""
    return 2 * sum(site.out_features) * site.in_features * (adapter.top_k if site.role is Role.EXPERT else 1)


def site_weights(site: Site) -> int:
    return sum(site.out_features) * site.in_features * len(site.members)


def head_flops(adapter: Adapter) -> int:
    """Operations of one model's logits for one token."""
    return 2 * adapter.vocab_size * adapter.hidden_size


# --- one block


def block_work(load: Workload, block: int) -> BlockWork:
    """The calibration rows of the quantized stream go through the attention half once, and through the feed-forward
    half once for every stage and once more; those of the reference stream once, and in the feed-forward half once more
    for every later stage that reads inner inputs. In the attention half both go once more for what reads inside it
    (MLA's latents). An epoch of tuning takes them through a feed-forward half forward and back."""
    sites, method = load.adapter.sites(block), load.method
    quantized = [site for site in sites if site.first_module in load.plan.schemes]
    halves = {half: sum(site_flops(site, load.adapter) for site in sites if site.half is half) for half in Half}
    moments = _moment_bytes(quantized, method)
    inner = [site for site in quantized if not site.adds_to_residual]
    read = {_stage(site, method) for site in inner}
    inside = {site.turn for site in inner if site.half is Half.ATTENTION and site.reads_norm is None}
    tuned = [site for site in quantized if load.tune_epochs and site.half is Half.FEED_FORWARD]
    tuned_stages = {_stage(site, method) for site in tuned if not site.adds_to_residual}
    fed_stages, fed_reads = (sum(half is Half.FEED_FORWARD for half, _ in group) for group in (moments, read))
    feeding = fed_stages + 1 + max(1, fed_reads) + 3 * load.tune_epochs * len(tuned_stages)
    shapes = [(sum(site.out_features), site.in_features, _with_metric(site, method)) for site in quantized]
    many = [len(site.members) for site in quantized]
    return BlockWork(
        forward=sum(halves.values()),
        calibration=halves[Half.ATTENTION] * (2 + 2 * len(inside)) + halves[Half.FEED_FORWARD] * feeding,
        statistics=sum(_statistics_flops(site, load) for site in _with_own_moments(quantized, method)),
        solve=sum(count * matrix_flops(*shape, method) for count, shape in zip(many, shapes, strict=True)),
        weights=sum(site_weights(site) for site in sites),
        moment_bytes=max(moments.values(), default=0),
        matrix_bytes=max((working_bytes(*shape, method) for shape in shapes), default=0),
        tuned_weights=sum(site_weights(site) for site in tuned),
    )


def _stage(site: Site, method: Method) -> tuple[Half, int]:
    """Sites of one stage take their statistics together: a whole half, or its sites turn by turn."""
    return site.half, site.turn if method.sequential == "sites" else 0


def _with_metric(site: Site, method: Method) -> bool:
    return method.output_metric and (bool(site.feeds) or site.reaches_residual)


def _slopes(site: Site, method: Method) -> int:
    """Outputs whose slopes are measured beside the second moments."""
    return sum(site.out_features) if method.output_metric and site.feeds else 0


def _with_own_moments(quantized: list[Site], method: Method) -> list[Site]:
    """Sites that read the same norm share one moment, unless tokens count by each site's own gradients."""
    if method.token_weighting == "gradient":
        return quantized
    norms = [site.reads_norm for site in quantized]
    return [site for n, site in enumerate(quantized) if not site.reads_norm or site.reads_norm not in norms[:n]]


def _statistics_flops(site: Site, load: Workload) -> int:
    inputs, slopes = site.in_features, _slopes(site, load.method)
    share = load.adapter.top_k if site.role is Role.EXPERT else 1
    return (4 * inputs**2 + 2 * slopes**2 + 2 * slopes * inputs) * share


def _moment_bytes(quantized: list[Site], method: Method) -> dict[tuple[Half, int], int]:
    """What the second moments of each stage hold."""
    found = dict.fromkeys((_stage(site, method) for site in quantized), 0)
    for site in _with_own_moments(quantized, method):
        inputs = site.in_features
        miss = sum(site.out_features) if site.adds_to_residual else inputs
        size = inputs**2 + miss * inputs + _slopes(site, method) ** 2
        found[_stage(site, method)] += 4 * len(site.members) * size
    return found


# --- the stages of a run


def run_work(load: Workload) -> RunWork:
    """The source is looked through, quantized from and verified against; what is emitted is read back. Streams are
    written and read several times a block."""
    plan, statistics = load.plan, load.method.needs_statistics
    source, emitted = (_shares(count, load.adapter) for count in (plan.source_bytes, plan.emitted_bytes))
    moved = 4 * load.stream_bytes if statistics else 0
    joined = plan.disk_bytes - plan.emitted_bytes  # pieces that become one file
    blocks = [
        StageWork(
            name=f"block {index + 1}",
            kind=f"quantize {_block_kind(load.adapter, index)}",
            counts=Counts(
                forward=load.calibration_tokens * block.calibration if statistics else 0,
                statistics=load.calibration_tokens * block.statistics if statistics else 0,
                solve=block.solve if statistics else 0.0,
                read=source[index] + moved,
                write=emitted[index] + moved,
            ),
            tasks=QUANTIZING,
            block=index,
        )
        for index, block in enumerate(load.blocks)
    ]
    check, copy, move = "check weights", "copy the rest", "move to OUT"
    forward = [block.forward for block in load.blocks]
    return RunWork(
        check=[StageWork(check, check, Counts(read=plan.source_bytes), (check,)), _uncounted("embed", "embed")],
        sensitivities=_sensitivities(load, forward) if load.method.walks_back else [],
        blocks=blocks,
        rest=[
            StageWork(copy, copy, Counts(read=source[-1], write=emitted[-1]), (copy,)),
            StageWork(move, move, Counts(read=joined, write=joined), (move,)),
        ],
        verification=verification(load.adapter, plan.source_bytes, plan.emitted_bytes, load.evaluation_tokens),
    )


def _sensitivities(load: Workload, forward: list[int]) -> list[StageWork]:
    """The calibration rows go through a block three times forward and once back, which counts twice: forward to the
    head, forward again from the last rows that were stored (not in the last stretch), and back."""
    tokens, blocks = load.calibration_tokens, load.adapter.n_blocks
    apart = spacing(blocks)
    last = (blocks - 1) // apart * apart

    def passed(kind: str, index: int, times: int) -> StageWork:
        counts = Counts(forward=tokens * forward[index] * times)
        return StageWork("sensitivities", f"sensitivities {kind}", counts, ("sensitivity",), index, tokens)

    stages = [_uncounted("sensitivities", "sensitivity")]
    stages += [passed("forward", index, 1) for index in range(blocks)]
    head = Counts(head=tokens * 2 * head_flops(load.adapter))
    stages.append(StageWork("sensitivities", "sensitivities head", head, ("sensitivity",), None, tokens))
    for begin in reversed(range(0, blocks, apart)):
        again = range(begin, begin + apart - 1) if begin < last else range(0)
        stages += [passed("forward", index, 1) for index in again]
        back = reversed(range(begin, min(begin + apart, blocks)))
        stages += [passed("back", index, 3 if index in again else 4) for index in back]
    return stages


def verification(adapter: Adapter, source_bytes: int, emitted_bytes: int, tokens: int) -> list[StageWork]:
    """The evaluation rows go through each block twice, and twice through the head."""
    read = [sum(pair) for pair in zip(*(_shares(n, adapter) for n in (source_bytes, emitted_bytes)), strict=True)]
    blocks = [
        StageWork(
            name=f"verify block {index + 1}",
            kind=f"verify {_block_kind(adapter, index)}",
            counts=Counts(forward=2 * tokens * block_forward(adapter, index), read=read[index]),
            tasks=VERIFYING,
            block=index,
            tokens=2 * tokens,
        )
        for index in range(adapter.n_blocks)
    ]
    head = Counts(head=2 * tokens * head_flops(adapter), read=read[-1])
    return [
        _uncounted("verify embed", "verify: embed"),
        *blocks,
        StageWork("verify head", "verify head", head, ("verify: head",), None, tokens),
        _uncounted("verify figures", "verify: figures"),
        _uncounted("finish", "finish"),
    ]


def _uncounted(name: str, task: str) -> StageWork:
    """A stage that the estimate takes no time for."""
    return StageWork(name, name, Counts(), (task,))


def _block_kind(adapter: Adapter, index: int) -> str:
    return "experts" if adapter.is_moe(index) else "dense"


def block_forward(adapter: Adapter, index: int) -> int:
    return sum(site_flops(site, adapter) for site in adapter.sites(index))


def _shares(count: int, adapter: Adapter) -> list[int]:
    """`count` bytes by block, and for all outside the blocks at the end, in proportion to their weights."""
    blocks = [sum(site_weights(site) for site in adapter.sites(index)) for index in range(adapter.n_blocks)]
    weights = sum(blocks) + 2 * adapter.vocab_size * adapter.hidden_size
    shares = [count * block // weights for block in blocks]
    return [*shares, count - sum(shares)]
