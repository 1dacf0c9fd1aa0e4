"""The counted model of a run on a GPU (benchmarks/gpu_cost.py): what it counts is there, and short ways to count give
what long ways give."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from babies import llama4_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

pytest.importorskip("triton")

from gpu_model import job, kernels, rates, whole  # noqa: E402
from gpu_model.ledger import Ledger  # noqa: E402
from onecard.core.method import PRESETS, Method  # noqa: E402
from onecard.core.scheme import Scheme  # noqa: E402
from onecard.quantize import launch, site  # noqa: E402

CUDA = torch.device("cuda", 0)
KEYS = {"group_size": 32, "batch_tokens": 2048}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """A pretended card."""
    found = Ledger()
    with job.pretended(found):
        yield found


def counted(ledger: Ledger, what: str) -> float:
    return sum(amount for (kind, _), amount in ledger.counts.items() if kind == what)


def test_a_product_and_a_look_at_it_are_counted_as_by_hand(ledger: Ledger) -> None:
    a, b = torch.empty(64, 32, device=CUDA), torch.empty(32, 16, device=CUDA, dtype=torch.bfloat16)
    before = ledger.live_bytes
    c = a @ b.float()
    assert counted(ledger, "launches") == 2
    assert counted(ledger, "flops float32") == 2 * 64 * 32 * 16
    assert ledger.live_bytes - before == 64 * 16 * 4, "the widened factor is gone"
    assert ledger.peak == 64 * 32 * 4 + 32 * 16 * (2 + 4) + 64 * 16 * 4
    assert counted(ledger, "syncs") == 0
    assert float(c[0, 0]) == 1.0
    assert counted(ledger, "syncs") == 1
    c.cpu()
    assert counted(ledger, "from card pageable") == 64 * 16 * 4
    assert not any(what.startswith("flag") for what, _ in ledger.counts)


def test_tensors_of_two_devices_and_sums_without_an_order_are_flagged(ledger: Ledger) -> None:
    x = torch.zeros(8, 4, device=CUDA)
    x + torch.zeros(8, 4)
    x.index_add_(0, torch.zeros(2, dtype=torch.long, device=CUDA), torch.zeros(2, 4, device=CUDA))
    flags = [what for what, _ in ledger.counts if what.startswith("flag")]
    assert flags == ["flag mixes devices: add.Tensor", "flag not deterministic: index_add_.default"]


def test_the_host_waits_for_the_card_only_where_it_looks(ledger: Ledger) -> None:
    x = torch.empty(2**28, device=CUDA)
    began = ledger.host
    for _ in range(10):
        x.add_(1.0)
    assert ledger.host - began == pytest.approx(10 * rates.LAUNCH_SECONDS)
    x.sum().item()
    seconds = 11 * 4 * 2**28 / rates.MEMORY
    assert seconds * 1.8 < ledger.host - began < seconds * 2.2, "ten times read and written, once read"


@pytest.mark.parametrize("triton", [False, True])
def test_remembered_calls_cost_what_calls_cost(triton: bool) -> None:
    keys = PRESETS["best" if triton else "fast"] | {"tabu_moves": 2, "restarts": int(triton)}
    method = Method(**{key: value for key, value in keys.items() if key in Method.model_fields})
    inputs = 160 if triton else 32

    def cost(remember: bool) -> tuple[Any, int]:
        ledger = Ledger()
        with job.pretended(ledger, triton=triton, remember=remember):
            w, moment, metric = (torch.empty(2, *size, device=CUDA) for size in ((16, inputs), (inputs,) * 2, (16, 16)))
            for _ in range(2):
                site.quantize_batch(w, moment, Scheme(4, 32, True), method, torch.bfloat16, metric)
        return dict(ledger.counts), ledger.peak

    (short, short_peak), (long, long_peak) = cost(True), cost(False)
    assert short == pytest.approx(long)
    assert short_peak == pytest.approx(long_peak, rel=0.05)


def test_a_run_of_many_batches_is_a_line_through_two_short_ones() -> None:
    config, recipe = llama4_config(1).to_dict(), job.recipe_of("llama4-scout-h100", "fast", KEYS)
    config["text_config"]["num_local_experts"] = 2

    def gone(batches: int) -> whole.Gone:
        return job.go_through(config, recipe, job.Size(1, batches))

    line, full = whole.at_batches(gone(2), gone(3), (4, 4)), gone(4)
    assert {"load", "statistics", "quantize", "propagate", "verify: head"} <= {name for name, _ in line}
    for key, stage in full.stages.items():
        for what in ("launches", "views", "syncs", "to card pageable", "from card pageable"):
            assert line[key].total(what) == pytest.approx(stage.total(what), abs=1e-6), (key, what)
        assert line[key].seconds == pytest.approx(stage.seconds, rel=0.1, abs=1e-3), key
    for way in ("read", "written"):  # threads read and write, whatever stage is open
        whole_way, line_way = (sum(each.total(way) for each in found.values()) for found in (full.stages, line))
        assert line_way == pytest.approx(whole_way)


def test_a_kernel_that_the_model_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in vars(launch.kernels) if name.endswith("_kernel")]
    assert set(ours) == kernels.TRIPS.keys() | kernels.PRODUCTS.keys()
    monkeypatch.delitem(kernels.TRIPS, "tabu_kernel")
    with pytest.raises(LookupError, match="tabu_kernel"):
        _ = kernels._Kernels(launch.kernels, Ledger()).tabu_kernel


def test_instructions_of_a_loop_are_counted_from_ptx() -> None:
    ptx = """
    .visible .entry f()
    {
        mov.u32 %r1, 0;
    $L__BB0_1:
        add.f32 %f1, %f1, %f2;
        div.rn.f32 %f3, %f1, %f2;
    """ + "\n".join(["        add.f32 %f1, %f1, %f2;"] * 30)
    ptx += """
        setp.lt.s32 %p1, %r1, 9;
        @%p1 bra $L__BB0_1;
        ret;
    }
    """
    assert kernels.body_of(ptx) == kernels.Body((1 + kernels.DIVISION + 30 + 2,), 1)


def test_kinds_of_blocks_stand_for_each_other() -> None:
    gone = whole.Gone(job.Size(4, 2), {}, 1, 1, ("dense", "moe", "dense", "moe"))
    assert [whole._times(gone, ["dense", "moe"] * 24, block) for block in range(4)] == [0, 23, 24, 1]
