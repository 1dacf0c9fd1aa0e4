"""Rates of this machine at the work of one model and recipe: what `onecard plan --measure` measures and keeps.

Each rate is measured on the work itself for a few seconds, with random values in the model's true shapes:

    forward   rows through a block with attention and routing; if the block is larger than a quarter of the free
              memory, only the products of its largest expert
    product   matrix products for second moments
    solve     matrices of one site through the recipe's method; of large ones a part
    head      logits and their KL
    disk      a file that is written to the current folder and read back

A busy machine measures slow. No weight of a model is read.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import nn

from ..checkpoint.plan import Plan
from ..core.device import Compute, site_budget
from ..core.head_slices import COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from ..core.method import Method
from ..core.rates import Rates
from ..core.scheme import Scheme
from ..models.adapter import Adapter, Role, Site
from ..models.block import Block
from ..models.calls import Calls
from ..quantize.site import batch_slices, matrix_flops, quantize_batch
from ..recipe import Recipe
from ..report.resources import package_versions
from .kl import compare

# Seconds for each kind of work; less jitters, more makes the user wait.
SECONDS = 4.0
# Operations of quantizing that are enough to time: seconds on one core, less than one on a GPU.
SOLVE_FLOPS = {"cpu": 1.5e11, "cuda": 2e13}
# Longer than a disk's own cache, short enough for a slow disk.
FILE_BYTES = 2**28


Clock = Callable[[], float]
Random = Callable[..., torch.Tensor]
Timed = Callable[..., float]


def rates_key(adapter: Adapter, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str:
    """Everything that rates depend on, as one line: machine, device, threads, versions, shapes and method."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sites = adapter.sites(adapter.n_blocks - 1)
    told = {
        "machine": [platform.node(), platform.processor() or platform.machine(), os.cpu_count(), gpu],
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "versions": package_versions(),
        "sites": [[len(site.members), sum(site.out_features), site.in_features] for site in sites],
        "vocabulary": adapter.vocab_size,
        "rows": [recipe.batch_tokens, recipe.texts.evaluation_row_tokens],
        "method": [*recipe.quantizer.model_dump().values(), str(recipe.scheme), *recipe.widths.schemes.values()],
    }
    return json.dumps(told, separators=(",", ":"))


def measure_rates(
    adapter: Adapter,
    plan: Plan,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock = time.perf_counter,
) -> Rates:
    """Takes about half a minute. Writes 256 MB into the current folder and removes them. With time.process_time as
    `clock`, a CPU's other work does not slow the rates. Raises OSError if the folder cannot be written."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    method = recipe.quantizer

    def timed(work: Callable[[], object], seconds: float = SECONDS) -> float:
        """Seconds that `work` takes: the mean of as many as fit into `seconds`, one at least."""
        begin, count = clock(), 0
        while clock() - begin < seconds or not count:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += 1
        return (clock() - begin) / count

    read, write = disk_rates(Path.cwd())
    forward = _forward(adapter, recipe, device, dtype, random, timed)
    return Rates(
        forward,
        _products(adapter, recipe, device, random, timed),
        _solve(adapter, plan, method, device, random, timed) if method.needs_statistics else forward,
        _head(adapter, device, dtype, random, timed),
        read,
        write,
    )


def _forward(
    adapter: Adapter, recipe: Recipe, device: torch.device, dtype: torch.dtype, random: Random, timed: Timed
) -> float:
    """Evaluation rows through the last block, a walk's batch at a time."""
    index = adapter.n_blocks - 1
    sites = adapter.sites(index)
    shares = [(site, adapter.top_k if site.role is Role.EXPERT else 1) for site in sites]
    a_token = sum(2.0 * sum(site.out_features) * site.in_features * share for site, share in shares)
    parameters = sum(sum(site.out_features) * site.in_features * len(site.members) for site in sites)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    length = recipe.texts.evaluation_row_tokens
    rows = max(1, recipe.batch_tokens // length)
    if parameters * torch.float32.itemsize > free // 4:
        site = max(sites, key=lambda s: sum(s.out_features) * s.in_features * len(s.members))
        each = max(1, rows * length * adapter.top_k // max(1, adapter.n_experts))
        w_IO, x_TI = (
            random(site.in_features, sum(site.out_features)).to(dtype),
            random(each, site.in_features).to(dtype),
        )
        return 2.0 * w_IO.numel() * each / timed(lambda: x_TI @ w_IO)
    compute = Compute(device=device, dtype=dtype, batch_tokens=recipe.batch_tokens)
    block = Block(adapter, index, adapter.build_block(index), Calls(adapter, compute))
    experts = {id(parameter) for parameter in block.experts.parameters()} if block.experts else set()
    for name, parameter in list(block.layer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.ones(parameter.shape, device=device) if parameter.dim() < 2 else random(*parameter.shape)
        value = value / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0)
        # Experts stay in their stored dtype and are widened on use.
        kept = torch.bfloat16 if id(parameter) in experts else dtype
        setattr(block.layer.get_submodule(owner), leaf, nn.Parameter(value.to(kept), requires_grad=False))
    hidden_NTH = random(rows, length, adapter.hidden_size).to(dtype)
    return a_token * rows * length / timed(lambda: block.forward(hidden_NTH))


def _products(adapter: Adapter, recipe: Recipe, device: torch.device, random: Random, timed: Timed) -> float:
    """A second moment of an expert's rows, fp32."""
    rows = max(1, recipe.batch_tokens * adapter.top_k // max(1, adapter.n_experts))
    x_TI = random(rows, adapter.hidden_size)
    total_II = torch.zeros(adapter.hidden_size, adapter.hidden_size, device=device)
    return 2.0 * rows * adapter.hidden_size**2 / timed(lambda: total_II.addmm_(x_TI.T, x_TI))


def _solve(adapter: Adapter, plan: Plan, method: Method, device: torch.device, random: Random, timed: Timed) -> float:
    """One cut of the matrices of the site that takes longest. Large matrices lose outputs first, then inputs."""

    def metric(site: Site) -> bool:
        return method.output_metric and (bool(site.feeds) or site.reaches_residual)

    def flops(site: Site) -> float:
        return len(site.members) * matrix_flops(sum(site.out_features), site.in_features, metric(site), method)

    quantized = [s for b in range(adapter.n_blocks) for s in adapter.sites(b) if s.first_module in plan.schemes]
    site = max(quantized, key=flops)
    outputs, inputs, measured = sum(site.out_features), site.in_features, metric(site)
    scheme: Scheme = plan.schemes[site.first_module]
    most = SOLVE_FLOPS[device.type]
    while outputs > 256 and matrix_flops(outputs, inputs, measured, method) > most:
        outputs //= 2
    while inputs % 16 == 0 and scheme.divides(inputs // 2) and matrix_flops(outputs, inputs, measured, method) > most:
        inputs //= 2
    batch = next(batch_slices(len(site.members), outputs, inputs, site_budget(device), method, measured)).stop
    batch = max(1, min(batch, int(most // matrix_flops(outputs, inputs, measured, method))))
    rows_TI = random(2 * inputs, inputs)
    moment_BII = (rows_TI.T @ rows_TI / len(rows_TI)).expand(batch, -1, -1).contiguous()
    metric_BOO = None
    if measured:
        rows_TO = random(2 * outputs, outputs)
        metric_BOO = (rows_TO.T @ rows_TO / len(rows_TO)).expand(batch, -1, -1).contiguous()
    w_BOI = random(batch, outputs, inputs)
    seconds = timed(lambda: quantize_batch(w_BOI, moment_BII, scheme, method, torch.bfloat16, metric_BOO), 0.0)
    return batch * matrix_flops(outputs, inputs, measured, method) / seconds


def _head(adapter: Adapter, device: torch.device, dtype: torch.dtype, random: Random, timed: Timed) -> float:
    """One slice of the logits of two heads, and its comparison."""
    columns = min(adapter.vocab_size, COLUMNS_PER_SLICE)
    h_TH = random(TOKENS_PER_SLICE, adapter.hidden_size)
    heads = [random(columns, adapter.hidden_size).to(dtype) for _ in range(2)]
    place_T = torch.arange(TOKENS_PER_SLICE, device=device)

    def work() -> None:
        def slices() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
            yield 0, h_TH @ heads[0].float().T, h_TH @ heads[1].float().T

        compare(slices(), place_T % columns, place_T, place_T)

    return 2 * 2.0 * columns * adapter.hidden_size * TOKENS_PER_SLICE / timed(work)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second (read, written) of the disk of `folder`, past the page cache where the system allows that."""
    piece = os.urandom(2**24)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".onecard-rate-") as file:
        begin = time.perf_counter()
        for _ in range(FILE_BYTES // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        write = FILE_BYTES / (time.perf_counter() - begin)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(len(piece)):
            pass
        return FILE_BYTES / (time.perf_counter() - begin), write
