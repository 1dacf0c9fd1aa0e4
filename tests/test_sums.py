"""The statistics of a half on the GPU's way, all experts at once, are those of the CPU's way, expert by expert."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.blocks.streams import HalfJob, Known, take_statistics
from onecard.calibration.moments import SiteMoments
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.model import open_model
from onecard.core import device
from onecard.models.adapter import Half, Role
from onecard.models.experts import RoutedExperts
from onecard.models.walk import HiddenRows
from walking import cpu_walk

TOKENS = 24
BOTH, EVERY = [[0, 1], [2]], slice(None)


class Taken:
    """One pass of both streams, which part by a tenth, through each half of a baby's block; some tokens change their
    routes."""

    def __init__(self, folder: Path, store: Path, index: int, dtype: torch.dtype) -> None:
        model = open_model(str(folder))
        walk = cpu_walk(model, dtype=dtype)
        self.original = walk.load(index)
        self.target = self.original.copy()
        self.jobs = []
        for half in Half:
            rows = HiddenRows(walk=walk, rows=[], groups=BOTH, store=Activations(store / half.name))
            slopes, weighting = half is Half.FEED_FORWARD, "residual"
            job = HalfJob(rows, self.original, self.target, half, weighting, correct=True, slopes=slopes)
            generator = torch.Generator().manual_seed(index)
            middle = "-middle" if half is Half.FEED_FORWARD else ""
            for k, numbers in enumerate(BOTH):
                x = torch.randn(len(numbers), TOKENS, model.adapter.hidden_size, generator=generator)
                moved = x + 0.3 * torch.randn(x.shape, generator=generator)
                rows.store.put(index, f"reference{middle}", k, x.to(dtype))
                rows.store.put(index, f"quantized{middle}", k, moved.to(dtype))
            self.jobs.append(job)

    def moments(self) -> dict[str, SiteMoments]:
        found = {}
        for job in self.jobs:
            sites = [site for site in self.original.sites if site.half is job.half]
            found |= take_statistics(job, sites, Known())[0]
        return found


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "index"), [("scout", 0), ("maverick", 0), ("qwen3", 0), ("deepseek", 1)])
def test_both_ways_take_the_same_statistics(
    family: str,
    index: int,
    dtype: torch.dtype,
    baby: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_by_one = Taken(baby(family), tmp_path / "a", index, dtype).moments()
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    together = Taken(baby(family), tmp_path / "b", index, dtype).moments()
    assert one_by_one.keys() == together.keys()
    assert any(moments.slope_EPP is not None for moments in together.values())
    for key, expected in one_by_one.items():
        got = together[key]
        assert got.rows == expected.rows
        pairs = [(got.shrunk(0.1, EVERY), expected.shrunk(0.1, EVERY))]
        pairs += [(got.miss(0.1, EVERY), expected.miss(0.1, EVERY))] if got.miss_EXI is not None else []
        pairs += [(got.slopes(0.1, EVERY), expected.slopes(0.1, EVERY))] if got.slope_EPP is not None else []
        for ours, theirs in pairs:
            assert float(theirs.norm()) > 0
            assert off(ours, theirs) < (2e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize(("family", "index"), [("qwen3", 0), ("mixtral", 0), ("deepseek", 1)])
def test_a_routing_weight_is_part_of_what_the_down_reads_and_counts_squared_before_it(
    family: str, index: int, baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W (g x) is added to the residual stream, where the routing weight g multiplies an expert's output. The twin gets
    rows and routing weights from the call of the experts."""
    taken = Taken(baby(family), tmp_path, index, torch.float32)
    job = taken.jobs[1]
    called: list[tuple[torch.Tensor, ...]] = []
    experts = taken.target.experts
    assert experts is not None
    run = type(experts).forward

    def forward(self: RoutedExperts, *args: torch.Tensor) -> torch.Tensor:
        if self is experts:
            called.append(args)
        return run(self, *args)

    monkeypatch.setattr(RoutedExperts, "forward", forward)
    moments = taken.moments()
    gate_up, down = (moments[site.key] for site in taken.target.sites if site.role is Role.EXPERT)
    expected = torch.zeros_like(gate_up.sum_EII), torch.zeros_like(down.sum_EII), torch.zeros_like(down.miss_EXI)
    for k, (x_TH, chosen_TK, weight_TK) in enumerate(tuple(called)):
        ends = [job.rows_out("reference", k), taken.target.routed(job.rows_in("quantized", k), job.half).hidden]
        missed_TH = ends[0].flatten(0, 1) - ends[1].flatten(0, 1)
        count_T = 1 / ends[0].flatten(0, 1).square().mean(-1)
        routes = [
            block.routed(job.rows_in(stream, k), job.half).routes_TK
            for block, stream in ((taken.original, "reference"), (taken.target, "quantized"))
        ]
        for t, each in enumerate(chosen_TK.tolist()):
            for expert, g in zip(each, weight_TK[t].tolist(), strict=True):
                gate, up = (experts.gate_up[expert].float() @ x_TH[t]).chunk(2)
                read = g * torch.nn.functional.silu(gate) * up
                expected[0][expert] += count_T[t] * g * g * torch.outer(x_TH[t], x_TH[t])
                expected[1][expert] += count_T[t] * torch.outer(read, read)
                if torch.equal(routes[0][t], routes[1][t]):
                    expected[2][expert] += count_T[t] * torch.outer(missed_TH[t], read)
    assert float(expected[2].norm()) > 0
    for got, twin in zip((gate_up.sum_EII, down.sum_EII, down.miss_EXI), expected, strict=True):
        assert off(got, twin) < 1e-4


def test_the_streams_routes_do_part(baby: Callable[..., Path], tmp_path: Path) -> None:
    """So that the test above has tokens to leave out."""
    job = Taken(baby("qwen3"), tmp_path, 0, torch.float32).jobs[1]
    routes = [
        block.routed(job.rows_in(stream, 0), job.half).routes_TK
        for block, stream in ((job.original, "reference"), (job.target, "quantized"))
    ]
    assert routes[0] is not None
    assert routes[1] is not None
    alike = (routes[0] == routes[1]).all(-1)
    assert 0 < int(alike.sum()) < len(alike)


class Counted(TorchDispatchMode):
    """How many operations were called that are no views, and how often rows were picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.picks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.launches += not func.is_view
        by_index = func.overloadpacket.__name__ == "index"
        self.picks += by_index and any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def test_the_gpus_way_picks_no_rows_by_mask_and_launches_less(
    baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask makes the host wait, since it decides a shape."""
    counted = []
    for forced in (False, True):
        monkeypatch.setattr(device, "CUDA_WAY_TOO", forced)
        taken = Taken(baby("qwen3"), tmp_path / str(forced), 0, torch.bfloat16)
        with Counted() as count:
            taken.moments()
        counted.append(count)
    one_by_one, together = counted
    assert together.picks == 0 < one_by_one.picks
    assert together.launches < one_by_one.launches
