"""Rates of this machine at the work of one model and recipe: what `onecard plan --measure` measures and keeps.

Each rate is measured at the work itself, on random values of the model's true shapes, for a few seconds:

    forward   rows through a block with its attention and routing; if the block takes more than a quarter of the free
              memory, the products of its largest expert alone
    product   matrix products for second moments
    solve     one site's matrices through the recipe's method; fewer rows of large ones
    head      logits of both models and their KL
    disk      a file written to and read from the current folder

A busy machine measures slow, and counts as that slow. No weight of the model is read.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from ..checkpoint.plan import Plan
from ..core.device import Compute, site_budget
from ..core.json_text import json_text
from ..core.products import add_outer, product
from ..core.rates import Rates
from ..core.scheme import Scheme
from ..core.slices import COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from ..models.adapter import Adapter, Site
from ..models.block import Block
from ..models.calls import Calls
from ..quantize.site import batch_slices, matrix_flops, quantize_batch
from ..recipe import Recipe
from ..report.resources import device_name, package_versions
from .kl import compare

# Each kind of work is repeated for this long: less gives unsteady rates, more makes the user wait.
SECONDS = 4.0
# Operations of quantizing that are enough to time: they take seconds on one core, and under one on a GPU.
SOLVE_FLOPS = {"cpu": 1.5e11, "cuda": 2e13}
# Longer than a disk's own cache, short enough for a slow disk.
FILE_BYTES = 2**28


Clock = Callable[[], float]


def rates_key(adapter: Adapter, recipe: Recipe, compute: Compute) -> str:
    """All that rates depend on, as one line: machine, device, threads, versions, shapes and method."""
    sites = adapter.sites(adapter.n_blocks - 1)
    processor, card = platform.processor() or platform.machine(), device_name(compute.device)
    told = {
        "machine": [platform.node(), processor, os.cpu_count(), card],
        "threads": torch.get_num_threads(),
        "dtype": str(compute.dtype),
        "versions": package_versions(),
        "sites": [[len(site.members), sum(site.out_features), site.in_features] for site in sites],
        "vocabulary": adapter.vocab_size,
        "rows": [recipe.batch_tokens, recipe.texts.evaluation_row_tokens],
        "method": [*recipe.quantizer.model_dump().values(), str(recipe.scheme), *recipe.widths.schemes.values()],
    }
    return json_text(told, separators=(",", ":"))


def measure_rates(
    adapter: Adapter, plan: Plan, recipe: Recipe, compute: Compute, clock: Clock = time.perf_counter
) -> Rates:
    """Takes about half a minute. Writes 256 MB into the current folder, and removes them. `clock`: seconds; a process's
    own time on a CPU gives the rates of a machine that does other work at the same time. Raises OSError."""
    bench = _Bench(adapter, plan, recipe, compute, clock, torch.Generator().manual_seed(0))
    read, write = disk_rates(Path.cwd())
    forward = bench.forward_flops()
    return Rates(
        forward_flops=forward,
        product_flops=bench.product_flops(),
        solve_flops=bench.solve_flops() if recipe.quantizer.needs_statistics else forward,
        head_flops=bench.head_flops(),
        read_bytes=read,
        write_bytes=write,
    )


@dataclass(frozen=True)
class _Bench:
    """One model's and recipe's work on this machine; each method gives the operations a second of one kind."""

    adapter: Adapter
    plan: Plan
    recipe: Recipe
    compute: Compute
    clock: Clock
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.compute.device

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def timed(self, work: Callable[[], object], seconds: float | None = None) -> float:
        """Seconds that `work` takes, from repeating it for `seconds`, once at least."""
        least = SECONDS if seconds is None else seconds
        begin, count = self.clock(), 0
        while self.clock() - begin < least or not count:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            count += 1
        return (self.clock() - begin) / count

    def forward_flops(self) -> float:
        """Rows of the evaluation's length through the last block, as a walk takes them."""
        adapter = self.adapter
        sites = adapter.sites(adapter.n_blocks - 1)
        parameters = sum(sum(site.out_features) * site.in_features * len(site.members) for site in sites)
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else psutil.virtual_memory().available
        length = self.recipe.texts.evaluation_row_tokens
        rows = max(1, self.recipe.batch_tokens // length)
        if parameters * torch.float32.itemsize > free // 4:
            site = max(sites, key=lambda s: sum(s.out_features) * s.in_features * len(s.members))
            each = max(1, rows * length * adapter.top_k // max(1, adapter.n_experts))
            w_IO = self.random(site.in_features, sum(site.out_features)).to(self.compute.dtype)
            x_TI = self.random(each, site.in_features).to(self.compute.dtype)
            return 2.0 * w_IO.numel() * each / self.timed(lambda: x_TI @ w_IO)
        block = self._random_block()
        hidden_NTH = self.random(rows, length, adapter.hidden_size).to(self.compute.dtype)
        a_token = sum(2.0 * sum(site.out_features) * site.in_features * site.entries_per_token for site in sites)
        return a_token * rows * length / self.timed(lambda: block.forward(hidden_NTH))

    def _random_block(self) -> Block:
        """The last block with random weights."""
        index = self.adapter.n_blocks - 1
        block = Block(self.adapter, index, self.adapter.build_block(index), Calls(self.adapter, self.compute))
        experts = {id(parameter) for parameter in block.experts.parameters()} if block.experts else set()
        for name, parameter in list(block.layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            shape = parameter.shape
            value = torch.ones(shape, device=self.device) if parameter.dim() < 2 else self.random(*shape)
            value = value / (shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0)
            # Experts are held as they are stored, and widened when they are used.
            kept = torch.bfloat16 if id(parameter) in experts else self.compute.dtype
            setattr(block.layer.get_submodule(owner), leaf, nn.Parameter(value.to(kept), requires_grad=False))
        return block

    def product_flops(self) -> float:
        """A second moment of an expert's weighted rows."""
        hidden_size = self.adapter.hidden_size
        rows = max(1, self.recipe.batch_tokens * self.adapter.top_k // max(1, self.adapter.n_experts))
        x_TI, weighted_TI = self.random(rows, hidden_size).to(self.compute.dtype), self.random(rows, hidden_size)
        total_II = torch.zeros(hidden_size, hidden_size, device=self.device)
        return 2.0 * rows * hidden_size**2 / self.timed(lambda: add_outer(total_II, weighted_TI, x_TI))

    def solve_flops(self) -> float:
        """One part of the site that takes longest. Large matrices get fewer outputs, then fewer inputs."""
        adapter, plan, method = self.adapter, self.plan, self.recipe.quantizer

        def with_metric(site: Site) -> bool:
            return method.output_metric and (bool(site.feeds) or site.adds_to_residual)

        def flops(site: Site) -> float:
            return len(site.members) * matrix_flops(sum(site.out_features), site.in_features, with_metric(site), method)

        quantized = [s for b in range(adapter.n_blocks) for s in adapter.sites(b) if s.first_module in plan.schemes]
        site = max(quantized, key=flops)
        outputs, inputs, metric = sum(site.out_features), site.in_features, with_metric(site)
        scheme: Scheme = plan.schemes[site.first_module]
        most = SOLVE_FLOPS[self.device.type]
        while outputs > 256 and matrix_flops(outputs, inputs, metric, method) > most:
            outputs //= 2
        while inputs % 16 == 0 and scheme.divides(inputs // 2) and matrix_flops(outputs, inputs, metric, method) > most:
            inputs //= 2
        budget = site_budget(self.device)
        batch = next(batch_slices(len(site.members), outputs, inputs, budget, method, metric)).stop
        batch = max(1, min(batch, int(most // matrix_flops(outputs, inputs, metric, method))))
        moment_BII = self._moment(inputs).expand(batch, -1, -1).contiguous()
        metric_BOO = self._moment(outputs).expand(batch, -1, -1).contiguous() if metric else None
        w_BOI = self.random(batch, outputs, inputs)
        seconds = self.timed(
            lambda: quantize_batch(w_BOI, moment_BII, scheme, method, torch.bfloat16, metric_BOO), seconds=0.0
        )
        return batch * matrix_flops(outputs, inputs, metric, method) / seconds

    def _moment(self, size: int) -> torch.Tensor:
        rows = self.random(2 * size, size)
        return rows.T @ rows / len(rows)

    def head_flops(self) -> float:
        """Logits of one slice by two heads, and their comparison."""
        columns = min(self.adapter.vocab_size, COLUMNS_PER_SLICE)
        h_TH = self.random(TOKENS_PER_SLICE, self.adapter.hidden_size).to(self.compute.dtype)
        heads = [self.random(columns, self.adapter.hidden_size).to(self.compute.dtype) for _ in range(2)]
        place_T = torch.arange(TOKENS_PER_SLICE, device=self.device)

        def work() -> None:
            def slices() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
                yield 0, product(h_TH, heads[0].T), product(h_TH, heads[1].T)

            compare(slices(), place_T % columns, place_T, place_T)

        return 2 * 2.0 * columns * self.adapter.hidden_size * TOKENS_PER_SLICE / self.timed(work)


def disk_rates(folder: Path) -> tuple[float, float]:
    """(read, written) bytes a second of the disk of `folder`, past the page cache where the system lets one."""
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
