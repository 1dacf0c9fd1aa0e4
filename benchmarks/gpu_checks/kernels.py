"""The kernels and products against their torch forms and fp64, on the device itself; and their rates."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from gpu_checks.processes import Checks, Setup, in_child, table
from gpu_checks.sites import ExactSite, RealSite, Shape, copied
from onecard.core import device as core_device
from onecard.core.device import choose_device
from onecard.core.method import PRESETS, Method
from onecard.core.products import add_outer, product, quadratic
from onecard.core.scheme import Scheme
from onecard.models.experts import RoutedExperts
from onecard.quantize import card, gptq, grid, held, refine, restarts, tabu
from onecard.quantize.held import Held
from onecard.quantize.site import quantize_batch

# Batch, outputs, inputs, columns of a group. A group wider than a block is swept block by block (launch.sweep).
EXACT = (Shape(1, 1, 8, 8), Shape(2, 9, 48, 24), Shape(3, 70, 256, 32), Shape(2, 300, 256, 128), Shape(2, 40, 512, 256))
EXACT_SMALL = (Shape(1, 2, 16, 8), Shape(1, 2, 24, 24))
REAL, REAL_SMALL = Shape(16, 8192, 256, 128), Shape(1, 2, 16, 8)
CUT, CUT_SMALL = Shape(4, 1100, 512, 128), Shape(2, 2, 16, 16)
SEEDS, MOVES = 4, 12
Found = TypeVar("Found")
# What the error that is left may differ by: a near tie that falls otherwise sends a search another way.
NEAR = 2e-3
# Relative errors of products of fp32 matrices cut in two parts (tests/test_products.py), and with a card's long sums.
NEAR_PRODUCT, NEAR_LONG_PRODUCT = 6e-6, 3e-5


@contextmanager
def in_torch() -> Iterator[None]:
    """While open, the torch form computes, on whatever device."""
    with patch.object(card, "_kernels", lambda: None):
        yield


@contextmanager
def on_the_cards_way(small: bool) -> Iterator[None]:
    """CPU tensors go to the kernels, which Triton interprets, and to bf16 products; and blocks are small."""
    with ExitStack() as stack:
        if small:
            stack.enter_context(patch.object(card, "CPU_TOO", True))
            stack.enter_context(patch.object(core_device, "CUDA_WAY_TOO", True))
            for module in (gptq, held, refine):
                stack.enter_context(patch.object(module, "BLOCK_COLUMNS", 16))
        yield


def exact_searches() -> dict[str, Callable[[ExactSite, Held], None]]:
    """Each function of launch.py but the scale search, through the function that calls it."""

    def by_gptq(site: ExactSite, of: Held) -> None:
        of.error_BIO.copy_(site.weights().transpose(1, 2))
        gptq.round_columns(of, site.order(site.shape.inputs), site.root(site.shape.inputs))

    return {
        "gptq": by_gptq,
        "refine, sweep": lambda site, of: refine.refine(of, site.moment(), 1),
        "restart": lambda site, of: restarts.restart(of, site.moment(), site.stretches(), 1),
        "tabu": lambda site, of: tabu.tabu_search(of, site.moment(), MOVES),
    }


def check_exact(device: torch.device, small: bool, checks: Checks) -> None:
    """Codes, scales and errors, bit for bit. A case in which fp32 is not exact says nothing: fp64 finds it."""
    shapes, seeds = (EXACT_SMALL, 1) if small else (EXACT, SEEDS)
    for name, search in exact_searches().items():
        exact = equal = 0
        for shape in shapes:
            for seed in range(seeds):
                scheme = Scheme(4, shape.width, symmetric=seed < 2)
                found = []
                for dtype, way in ((torch.float32, nullcontext), (torch.float32, in_torch), (torch.float64, in_torch)):
                    site = ExactSite(shape, scheme, seed, device, dtype)
                    of = site.held()
                    with way():
                        search(site, of)
                    found.append([of.codes_BIO, of.scale_BGO.double(), of.error_BIO.double()])
                ours, theirs, twice = found
                if all(map(torch.equal, theirs, twice)):
                    exact += 1
                    equal += all(map(torch.equal, ours, theirs))
        seen = f"{equal} of {exact} exact cases equal, bit for bit"
        checks.add(f"{name}: kernel and torch", 0 < exact == equal, seen)


def timed(device: torch.device, work: Callable[[], Found], times: int) -> tuple[Found, float]:
    """What it gives, and the median seconds of several runs, of which the first does not count unless it is alone."""
    taken = []
    for _ in range(times + (times > 1)):
        _wait(device)
        began = time.perf_counter()
        found = work()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return found, statistics.median(taken[1:] or taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_real(device: torch.device, small: bool, checks: Checks) -> list[dict[str, Any]]:
    """The error left on real values, and the rates of both forms."""
    site, rates = RealSite.drawn(REAL_SMALL if small else REAL, device), []
    best = PRESETS["best"]
    tries, moves = (1, 3) if small else (best["restarts"], best["tabu_moves"])
    objective = site.prepared.objective
    with in_torch():
        start = gptq.gptq(site.w, site.prepared, site.scale, None, site.scheme)
        made = restarts.prepare_restarts(objective, site.scheme.width(site.w.shape[2]), tries)[0]

    def changed(search: Callable[[Held], None]) -> Callable[[], Held]:
        def work() -> Held:
            of = copied(start)
            search(of)
            return of

        return work

    works: dict[str, Callable[[], Held]] = {
        "gptq": lambda: gptq.gptq(site.w, site.prepared, site.scale, None, site.scheme),
        "refine": changed(lambda of: refine.refine(of, objective, 1)),
        f"restart, {tries} tries": changed(lambda of: restarts.restart(of, objective, made, 2)),
        f"tabu, {moves} moves": changed(lambda of: tabu.tabu_search(of, objective, moves)),
    }
    for name, work in works.items():
        ours, taken = timed(device, work, 1 if small else 3)
        with in_torch():
            theirs, slow = timed(device, work, 1)
        off = site.loss(ours) / site.loss(theirs) - 1
        same = float((ours.codes_BIO == theirs.codes_BIO).float().mean())
        checks.add(f"{name}: error left", abs(off) < NEAR, f"{off:+.1e} of torch's; {same:.2%} of codes equal")
        rates.append({"function": name, "elements_per_second": site.w.numel() / taken, "times_torch": slow / taken})
    return [*rates, check_scales(device, small, site, checks)]


def check_scales(device: torch.device, small: bool, site: RealSite, checks: Checks) -> dict[str, Any]:
    importance = site.prepared.importance

    def search() -> torch.Tensor:
        return grid.searched_scales(site.w, importance, site.scheme, torch.bfloat16, True)[0]

    def errors(scale: torch.Tensor) -> torch.Tensor:
        off = grid.round_to_nearest(site.w, scale, None, site.scheme).dequantize(torch.float32) - site.w
        groups = (site.scheme.groups(site.w.shape[2]), -1)
        return (off.double().square() * importance[:, None]).unflatten(-1, groups).sum(-1)

    ours, taken = timed(device, search, 1 if small else 3)
    with in_torch():
        theirs, slow = timed(device, search, 1)
    near = torch.allclose(errors(ours), errors(theirs), rtol=1e-5, atol=0)
    same = float((ours == theirs).float().mean())
    checks.add("searched_scales: error left", near, f"{same:.2%} of scales equal, and the errors of all to 1e-5")
    name = "searched_scales"
    return {"function": name, "elements_per_second": site.w.numel() / taken, "times_torch": slow / taken}


def check_products(device: torch.device, small: bool, checks: Checks) -> list[dict[str, Any]]:
    """core/products.py against fp64. Products of bf16 numbers are exact; their sums are fp32's."""
    generator, rates = torch.Generator(device).manual_seed(2), []
    near = NEAR_PRODUCT if small else NEAR_LONG_PRODUCT
    m, k, n = (30, 200, 20) if small else (4096, 8192, 4096)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    def off(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got.double() - expected).norm() / expected.norm())

    for of_a, of_b in ((torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2):
        a, b = drawn(m, k).to(of_a), drawn(k, n).to(of_b)
        wide, total = a.double() @ b.double(), torch.ones(m, n, device=device)
        add_outer(total, a.T, b)
        made, taken = timed(device, lambda a=a, b=b: product(a, b), 1 if small else 5)
        found = off(made, wide), off(total - 1, wide)
        name = " x ".join(str(dtype).removeprefix("torch.") for dtype in (of_a, of_b))
        checks.add(f"{name}: product, add_outer", max(found) < near, "{:.1e}, {:.1e} from fp64".format(*found))
        rates.append({"function": f"product, {name}", "tflops": 2 * m * k * n / taken / 1e12})
    rows, metric = drawn(m, n), drawn(n, n)
    metric = metric.T @ metric
    wide = ((rows.double() @ metric.double()) * rows.double()).sum(-1)
    checks.add("quadratic", (seen := off(quadratic(rows, metric), wide)) < near, f"{seen:.1e} from fp64")
    a, x = (drawn(2, 16, 32), drawn(2, 32, 5)) if small else (drawn(4, 128, n), drawn(4, n, m))
    made, taken = timed(device, lambda: held.product(a, x), 1 if small else 5)
    wide, alone = a.double() @ x.double(), held.product(a[1:], x[1:])
    checks.add("slopes' product", (seen := off(made, wide)) < near, f"{seen:.1e} from fp64")
    checks.add("slopes' product: cut otherwise", torch.equal(made[1:], alone), "the same bytes")
    rates.append({"function": "slopes' product", "tflops": 2 * a.numel() * x.shape[2] / taken / 1e12})
    whole = product(stack := drawn(3, n, n), metric)
    same = all(torch.equal(whole[i], product(stack[i], metric)) for i in range(3))
    checks.add("product: cut otherwise", same, "stacks and single matrices, the same bytes")
    return rates


def check_cuts(device: torch.device, small: bool, checks: Checks) -> None:
    """A batch that is cut otherwise gets the same codes."""
    site = RealSite.drawn(CUT_SMALL if small else CUT, device)
    batch, outputs = site.w.shape[:2]

    def by_kernels(part: RealSite) -> torch.Tensor:
        of = gptq.gptq(part.w, part.prepared, part.scale, None, part.scheme)
        tabu.tabu_search(of, part.prepared.objective, 2 if small else MOVES)
        return of.codes_BIO.transpose(1, 2)

    whole = by_kernels(site)
    every, some = slice(0, batch), (slice(0, 1), slice(1, batch))
    same = [torch.equal(by_kernels(site.part(s, slice(0, outputs))), whole[s]) for s in some]
    checks.add("matrices cut otherwise: kernels", all(same), f"{sum(same)} of {len(same)} parts have the same codes")
    rows = (slice(0, 1), slice(1, outputs))
    same = [torch.equal(by_kernels(site.part(every, s)), whole[:, s]) for s in rows]
    checks.add("rows cut otherwise: kernels", all(same), f"{sum(same)} of {len(same)} parts have the same codes")
    method = Method(**{key: v for key, v in PRESETS["fast"].items() if key in Method.model_fields})
    method = method.model_copy(update={"tabu_moves": 2 if small else method.tabu_moves})

    def by_site(part: RealSite) -> torch.Tensor:
        return quantize_batch(part.w, part.moment, part.scheme, method, torch.bfloat16).weight.codes

    whole = by_site(site)
    same = [torch.equal(by_site(site.part(s, slice(0, outputs))), whole[s]) for s in some]
    checks.add("matrices cut otherwise: a whole site", all(same), f"{sum(same)} of {len(same)} parts, the same codes")


def check_experts(device: torch.device, small: bool, checks: Checks) -> None:
    """Rows through the experts, and back, twice."""
    generator = torch.Generator(device).manual_seed(3)
    count, hidden, tokens = (4, 32, 40) if small else (16, 1024, 8192)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(torch.bfloat16)

    with torch.device(device):
        experts = RoutedExperts(count, hidden, 2 * hidden, scale_input=True)
    experts.gate_up.data, experts.down.data = (
        0.1 * drawn(count, 4 * hidden, hidden),
        0.1 * drawn(count, hidden, 2 * hidden),
    )
    x, logits = drawn(tokens, hidden), drawn(tokens, count).float()
    found = []
    for _ in range(2):
        leaves = [x.clone(), logits.clone(), experts.gate_up, experts.down]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        top, chosen = torch.topk(leaves[1], 2, dim=-1)
        out = experts(leaves[0], chosen, torch.sigmoid(top).to(torch.bfloat16))
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    same = sum(map(torch.equal, *found))
    checks.add(
        "RoutedExperts twice", same == len(found[0]), f"{same} of {len(found[0])}: outputs and gradients, same bytes"
    )


def in_this_process(setup: Setup, result: Path) -> None:
    """Everything, into the file `result`."""
    device, checks = choose_device(setup.device), Checks()
    with on_the_cards_way(setup.on_cpu):
        if card.kernels_for(torch.zeros(1, device=device)) is None:
            checks.add("Triton", False, "it is not installed: the torch forms would run")
            rates = []
        else:
            check_exact(device, setup.small, checks)
            rates = check_real(device, setup.small, checks)
            check_cuts(device, setup.small, checks)
        rates += check_products(device, setup.small, checks)
        check_experts(device, setup.small, checks)
    rows = [(r["function"], _rate(r), _times(r)) for r in rates]
    found = {
        "ok": checks.ok,
        "checks": checks.facts(),
        "rates": rates,
        "table": f"{checks.table()}\n\n{table(('function', 'rate', 'times the torch form'), rows)}",
    }
    result.write_text(json.dumps(found))


def _rate(row: dict[str, Any]) -> str:
    return f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['elements_per_second']:.3g} elements a second"


def _times(row: dict[str, Any]) -> str:
    return f"{row['times_torch']:.3g}" if "times_torch" in row else ""


def kernels(setup: Setup) -> dict[str, Any]:
    result = setup.place("kernels") / "found.json"
    result.unlink(missing_ok=True)
    status, _ = in_child(setup, in_this_process, setup, result)
    if status:
        raise RuntimeError(f"the kernels' process ended with {status}; what it said is above")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
