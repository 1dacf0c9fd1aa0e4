"""What a run will take: time, RAM, device memory and disk. Estimates with their formulas; the plan's bytes are exact.

Time is each kind of work, counted in operations or bytes, over its rate on this machine (planner/rates.py): the rates
that `onecard plan --measure` kept, or one matrix product of half a second for all of them, which errs low where
matrices are small and attention long. It counts the tokens that a recipe wants: texts that hold fewer take less. With
measured rates it came out 15 to 30 % below the processor time of runs on the embedded model (benchmarks/plan_cost.py):
what is not arithmetic (figures, intervals, files) is in no rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..checkpoint.plan import Plan
from ..core.rates import Rates
from ..core.rows import rows_at_once
from ..models.adapter import Adapter, Half, Role
from ..quantize.site import matrix_flops, working_bytes
from ..recipe import Recipe

# Experts are held as they are stored, in bf16.
STORED_BYTES = 2
# Of a parameter that is tuned: as it was, its gradient, master, master's gradient, and the optimizer's two moments.
TUNING_BYTES = 2 + 2 + 4 + 4 + 8
# The interpreter with torch and transformers imported, texts and tokenizer: 0.45 GB before the first block, and 0.1 to
# 0.2 GB of buffers that come and go. Measured on the embedded model, whose weights are small beside it.
BASE_RAM_BYTES = 550_000_000
# Verification beside its two forward walks: where errors come from, intervals, files. docs/benchmarks.md has 1.29.
VERIFICATION_SHARE = 1.3
# Logits of so many tokens and columns at a time, in about six fp32 arrays (eval/twin.py).
HEAD_TOKENS, HEAD_COLUMNS, HEAD_ARRAYS = 1024, 16384, 6


@dataclass(frozen=True)
class Cost:
    """Estimates. `seconds` covers scan, quantize and verify; `seconds_by`: its parts. `flops_per_second`: of all
    computing together."""

    flops: float
    flops_per_second: float
    seconds: float
    seconds_by: dict[str, float]
    ram_bytes: int
    device_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Work:
    """What of the method costs time and memory: none of it for round-to-nearest. `matrix_bytes`, `matrix_flops`:
    (outputs, inputs, whether with an output metric) -> what quantizing one matrix holds, and takes."""

    statistics: bool
    one_by_one: bool  # statistics for every stage of a half, or once for each half
    output_metric: bool
    # All calibration rows through the model and back, for metrics or token weights: number of blocks -> of places at
    # which they lie on disk at the same time. None: no such walk.
    walk_back: Callable[[int], int] | None
    tune_epochs: int
    token_gradients: bool  # tokens count by each site's own gradients, so that sites share no statistics
    matrix_bytes: Callable[[int, int, bool], int]
    matrix_flops: Callable[[int, int, bool], float]


def estimate(
    adapter: Adapter,
    plan: Plan,
    work: Work,
    calibration_tokens: int,
    evaluation_tokens: int,
    compute_itemsize: int,
    rates: Rates,
    device: torch.device,
    site_budget_bytes: int,
) -> Cost:
    """Add up the work of every site.

    forward:    2 x outputs x inputs a row; an expert site sees tokens x top-k rows in all
    statistics: 2 x inputs^2 a row for each of the two second moments; slopes of gates and ups: 2 x outputs^2 and once
                more the forward
    GPTQ:       quantize/site.matrix_flops
    The calibration rows of the quantized stream go through the attention half once, and through the feed-forward half
    once for every stage and once more; those of the reference stream once, and in the feed-forward half once more for
    every later stage that reads inner inputs. In the attention half both go once more for what reads inside it (MLA's
    latents). For metrics and token weights they go through a block three times forward
    and once back, and lie on disk at several places meanwhile. An epoch of tuning
    takes them through a feed-forward half forward and back. The evaluation rows go through each block twice,
    and twice through the head.
    """
    forward = calibration = statistics = solve = 0.0
    block_bytes = moment_bytes = matrix_bytes = tuned_bytes = 0
    for block in range(adapter.n_blocks):
        block_forward = 0.0
        block_params = 0
        moments: dict[tuple[Half, int], int] = {}
        inner: set[tuple[Half, int]] = set()
        inside: set[int] = set()
        half_forward = dict.fromkeys(Half, 0.0)
        tuned_params = 0
        tuned_stages: set[int] = set()
        norms: set[str] = set()
        for site in adapter.sites(block):
            outputs, inputs, count = sum(site.out_features), site.in_features, len(site.members)
            share = adapter.top_k if site.role is Role.EXPERT else 1
            block_forward += 2.0 * outputs * inputs * share
            half_forward[site.half] += 2.0 * outputs * inputs * share
            stage = (site.half, site.turn if work.one_by_one else 0)
            block_params += outputs * inputs * count
            if site.first_module in plan.schemes:
                common = site.reads_norm in norms and not work.token_gradients
                norms |= {site.reads_norm} if site.reads_norm else set()
                measured = work.output_metric and (bool(site.feeds) or site.reaches_residual)
                slopes = outputs if work.output_metric and site.feeds else 0
                miss = outputs if site.adds_to_residual else inputs
                moments.setdefault(stage, 0)
                if not common:
                    statistics += (4.0 * inputs**2 + 2.0 * slopes**2 + 2.0 * slopes * inputs) * share
                    moments[stage] += 4 * count * (inputs**2 + miss * inputs + slopes**2)
                solve += count * work.matrix_flops(outputs, inputs, measured)
                matrix_bytes = max(matrix_bytes, work.matrix_bytes(outputs, inputs, measured))
                if not site.adds_to_residual:
                    inner.add(stage)
                    inside |= {site.turn} if site.half is Half.ATTENTION and site.reads_norm is None else set()
                if work.tune_epochs and site.half is Half.FEED_FORWARD:
                    tuned_params += outputs * inputs * count
                    tuned_stages |= set() if site.adds_to_residual else {stage[1]}
        forward += block_forward
        for half, flops_a_token in half_forward.items():
            stages, reads = (sum(stage[0] is half for stage in group) for group in (moments, inner))
            attention = 2 + 2 * len(inside)
            calibration += flops_a_token * (attention if half is Half.ATTENTION else stages + 1 + max(1, reads))
        calibration += 3 * half_forward[Half.FEED_FORWARD] * work.tune_epochs * len(tuned_stages)
        tuned_bytes = max(tuned_bytes, tuned_params * TUNING_BYTES)
        block_bytes = max(block_bytes, block_params * STORED_BYTES)
        moment_bytes = max(moment_bytes, max(moments.values(), default=0))
    head = 2.0 * adapter.vocab_size * adapter.hidden_size
    forward_flops = 2 * evaluation_tokens * forward * VERIFICATION_SHARE
    head_flops = 2 * evaluation_tokens * head * VERIFICATION_SHARE
    statistics_flops = 0.0
    largest_shard = max(shard.data_bytes for shard in plan.pieces)
    stream = calibration_tokens * adapter.hidden_size * compute_itemsize
    # The verification walk: both versions of one block, a slice of the logits and the heads.
    verify_bytes = 2 * block_bytes + 4 * HEAD_ARRAYS * HEAD_TOKENS * min(HEAD_COLUMNS, adapter.vocab_size)
    verify_bytes += 2 * STORED_BYTES * adapter.vocab_size * adapter.hidden_size
    # Its rows lie on disk before and after a block, of both versions.
    verify_disk = plan.disk_bytes + 4 * evaluation_tokens * adapter.hidden_size * compute_itemsize
    device_bytes, disk = verify_bytes, verify_disk
    if work.statistics:
        forward_flops += calibration_tokens * calibration
        statistics_flops = calibration_tokens * statistics
        # The block as it was and as it becomes; moments of one stage, and one cut, which holds a matrix at least; or,
        # before there are moments, what tuning holds.
        quantize_bytes = 2 * block_bytes + max(moment_bytes + max(site_budget_bytes, matrix_bytes), tuned_bytes)
        device_bytes = max(device_bytes, quantize_bytes)
        disk = max(verify_disk, plan.disk_bytes + 7 * stream)
        if work.walk_back is not None:
            forward_flops += calibration_tokens * 5 * forward
            head_flops += calibration_tokens * 2 * head
            disk = max(disk, (2 + work.walk_back(adapter.n_blocks)) * stream)
    # The source is looked through, quantized from and verified against; what is emitted is read back, and its digests
    # are taken. Streams are written and read several times a block.
    moved = adapter.n_blocks * 4 * stream if work.statistics else 0
    seconds_by = {
        "forward": forward_flops / rates.forward_flops,
        "statistics": statistics_flops / rates.product_flops,
        "quantize": (solve if work.statistics else 0.0) / rates.solve_flops,
        "head": head_flops / rates.head_flops,
        "disk": (3 * plan.source_bytes + plan.disk_bytes + moved) / rates.read_bytes
        + (plan.disk_bytes + moved) / rates.write_bytes,
    }
    flops = forward_flops + statistics_flops + head_flops + (solve if work.statistics else 0.0)
    seconds = sum(seconds_by.values())
    on_cpu = device.type == "cpu"
    ram = BASE_RAM_BYTES + largest_shard + (device_bytes if on_cpu else block_bytes // 16)
    return Cost(
        flops=flops,
        flops_per_second=flops / (seconds - seconds_by["disk"]),
        seconds=seconds,
        seconds_by=seconds_by,
        ram_bytes=ram,
        device_bytes=0 if on_cpu else device_bytes,
        disk_bytes=disk,
    )


def work_of(recipe: Recipe) -> Work:
    method = recipe.quantizer
    return Work(
        method.needs_statistics,
        recipe.quantizer.sequential == "sites",
        method.output_metric,
        rows_at_once if method.walks_back else None,
        recipe.quantizer.tune_epochs if method.needs_statistics else 0,
        recipe.quantizer.token_weighting == "gradient",
        partial(working_bytes, method=method),
        partial(matrix_flops, method=method),
    )
