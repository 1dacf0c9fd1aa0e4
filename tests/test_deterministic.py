"""No operation of a block's passes is without a deterministic form on a GPU; the few that torch makes deterministic by
sorting are named. Experts send and fetch rows by index, to the bit as the obvious loop does.

A dispatch mode lists every operation that CPU tensors call on the GPU's way: statistics, aiming, tuning, the walk back
and the judge's comparison, forward and backward.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.blocks.streams import HalfJob, Known, propagate, take_statistics
from onecard.blocks.tuning import tune
from onecard.calibration.sensitivity import RESIDUAL, sensitivities
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.model import open_model
from onecard.core import device
from onecard.eval.kl import compare_rows
from onecard.models.adapter import Half
from onecard.models.experts import RoutedExperts
from onecard.quantize.metric import swiglu_metric
from walking import cpu_walk, make_rows

# Without a deterministic form on a GPU: they raise there. (torch.use_deterministic_algorithms in torch 2.13; kthvalue
# and multinomial by replacement from ATen's alertNotDeterministic. Pooling, padding, interpolation and CTC are left
# out: no text model has them.)
RAISES = {"kthvalue", "median", "nanmedian", "histc", "put_", "nll_loss_forward", "_embedding_bag_backward"}
# With floating-point input, or with weights, they raise, too.
RAISES_FLOATING = {"cumsum", "cumsum_"}
RAISES_WEIGHTED = {"bincount"}
# These add or write in the order of threads; with deterministic algorithms on, torch sorts the indices first. That
# costs launches and memory, so only the ones below are used, whose indices are few.
SORTED = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "index_copy",
    "scatter",
    "scatter_",
}
SORTED |= {"index_put", "index_put_", "_index_put_impl_", "index_select_backward", "embedding_dense_backward"}
ALLOWED = {
    "index_put_": "pictures' rows in the embedding, once; rows of logits with ties among the likeliest",
    "index_add_": "tie_metric's edges between experts, once a block",
    "scatter": "the backward pass of a router's topk and gather: top-k numbers a token",
    "scatter_": "the head's drawn label, one number a token",
    "scatter_add": "the backward pass of a router's gather, top-k numbers a token",
}


class Listed(TorchDispatchMode):
    """The operations called while it is open: (name, shape of the largest tensor given)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def names(self) -> set[str]:
        return {name for name, _ in self.calls}

    def raising(self) -> list[str]:
        found = []
        for name, args in self.calls:
            floating = args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
            weighted = len(args) > 1 and args[1] is not None
            if name in RAISES or (name in RAISES_FLOATING and floating) or (name in RAISES_WEIGHTED and weighted):
                found.append(name)
        return found


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def half_by_half(folder: Path, store: Path) -> Mapping[str, torch.Tensor]:
    """Everything that the blocks and the judge compute of a baby in bf16; returns the metrics of its first block."""
    model = open_model(str(folder))
    rows = make_rows(model.adapter)[:3]
    walk = cpu_walk(model, batch_tokens=70, dtype=torch.bfloat16)
    hidden = walk.hidden_rows(rows, Activations(store / "back"))
    metrics: dict[int, dict[str, torch.Tensor]] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def keep(index: int, of_block: dict[str, torch.Tensor], of_tokens: dict[str, torch.Tensor]) -> None:
        metrics[index], weights[index] = of_block, of_tokens

    sensitivities(hidden, keep, "gradient")
    hidden = walk.hidden_rows(rows, Activations(store / "forward"))
    hidden.embed("reference", "quantized")
    sizes = [sum(len(rows[n].tokens) for n in numbers) for numbers in hidden.groups]
    original = walk.load(0)
    target = original.copy()
    by_batch = {key: each.split(sizes) for key, each in weights[0].items()}
    for half in Half:
        job = HalfJob(hidden, original, target, half, "gradient", by_batch, correct=True, slopes=True)
        sites = [site for site in original.sites if site.half is half]
        moments, known = take_statistics(job, sites, Known())
        if half is Half.FEED_FORWARD:
            tune(job, sites, metrics[0][RESIDUAL], 1)
            site = next(site for site in sites if site.feeds)
            down = torch.stack([target.joined((name,)) for name in site.feeds])
            swiglu_metric(moments[site.key].slopes(0.3, slice(None)), down, metrics[0][RESIDUAL])
        propagate(job, known)
    rows_TH = walk.final_norm()(hidden.get(1, "quantized", 0)).flatten(0, 1)
    place = torch.arange(len(rows_TH))
    compare_rows((rows_TH, rows_TH), (walk.head(), walk.head()), place % 7, place, place)
    return metrics[0]


@pytest.mark.parametrize("family", ["scout", "qwen3", "deepseek"])
def test_every_operation_is_deterministic_on_a_gpu(
    family: str, baby: Callable[..., Path], tmp_path: Path, deterministic: None
) -> None:
    listed = Listed()
    with listed:
        half_by_half(baby(family), tmp_path)
    assert {"mm", "topk", "sort"} <= listed.names()  # so it looks at what it means to
    assert listed.raising() == []
    assert (listed.names() & SORTED) - ALLOWED.keys() == set()


def test_the_list_finds_what_it_looks_for() -> None:
    listed, x = Listed(), torch.rand(5)
    with listed:
        x.kthvalue(2)
        x.cumsum(0)
        torch.bincount(torch.arange(5), x)
        torch.arange(5).cumsum(0)
        torch.bincount(torch.arange(5))
    assert listed.raising() == ["kthvalue", "cumsum", "bincount"]


def one_by_one(
    experts: RoutedExperts, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The twin of RoutedExperts.forward: each expert's outputs are added to a sum, expert by expert."""
    out_TH = torch.zeros_like(x_TH)
    for expert in range(len(experts.gate_up)):
        token, choice = (experts_TK == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        x_RH, weight_R1 = x_TH[token], weights_TK[token, choice][:, None]
        x_RH = x_RH * weight_R1 if experts.scale_input else x_RH
        gate_RM, up_RM = F.linear(x_RH, experts.gate_up[expert]).chunk(2, dim=-1)
        y_RH = F.linear(F.silu(gate_RM) * up_RM, experts.down[expert])
        out_TH.index_add_(0, token, y_RH if experts.scale_input else (y_RH * weight_R1).to(out_TH.dtype))
    return out_TH


@pytest.mark.parametrize("scale_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_experts_are_the_loop_to_the_bit(
    top_k: int, dtype: torch.dtype, scale_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, and gradients of rows, router and weights."""
    generator = torch.Generator().manual_seed(top_k)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = RoutedExperts(12, 32, 48, scale_input)
    x_TH, logits_TE, router_HE = random(90, 32).to(dtype), random(90, 12), 0.1 * random(32, 12)
    logits_TE[:, 3] = -9.0  # an expert without rows
    stacks = [0.2 * random(12, 96, 32).to(dtype), 0.2 * random(12, 32, 48).to(dtype)]
    found = []
    for way in (experts.forward, lambda *given: one_by_one(experts, *given)):
        experts.gate_up.data, experts.down.data = (stack.clone().requires_grad_() for stack in stacks)
        leaves = [x_TH.clone(), logits_TE.clone(), experts.gate_up.requires_grad_(), experts.down.requires_grad_()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        top_TK, experts_TK = torch.topk(leaves[1] + leaves[0].float() @ router_HE, top_k, dim=-1)
        weights_TK = torch.sigmoid(top_TK).to(dtype)
        out_TH = way(leaves[0], experts_TK, weights_TK)
        gradients = torch.autograd.grad(out_TH.float().square().sum(), leaves)
        with torch.no_grad():
            alone = [way(leaves[0], experts_TK, weights_TK)]
            monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
            alone.append(way(leaves[0], experts_TK, weights_TK))
            monkeypatch.setattr(device, "CUDA_WAY_TOO", False)
        found.append([out_TH, *alone, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(found[0][0], found[0][1])
