"""Products by bf16 parts, as a GPU takes them, against fp64; and what a CPU computes, which must stay as it is.

A product of two bf16 numbers is exact in fp32, so CPU tensors go the GPU's way with the same products.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.calibration.moments import SiteMoments
from onecard.core import device, products
from onecard.core.products import add_outer, add_outers, bf16_parts, product, quadratic, solved_from_right
from onecard.eval.kl import compare_rows
from onecard.quantize.metric import swiglu_metric, swiglu_slopes

BF16 = torch.bfloat16
Drawn = Callable[..., torch.Tensor]


@pytest.fixture(params=[2, 3])
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    monkeypatch.setattr(products, "PARTS", request.param)
    return int(request.param)


@pytest.fixture
def drawn() -> Drawn:
    generator = torch.Generator().manual_seed(11)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=2**-60, max_value=2**60)))
@settings(max_examples=50, deadline=None)
def test_parts_leave_what_they_promise(numbers: list[float]) -> None:
    x = torch.tensor([*numbers, *(-n for n in numbers)])
    for count, left in ((1, 2.0**-8), (2, 2.0**-17), (3, 0.0)):
        parts = bf16_parts(x, count)
        assert [part.dtype for part in parts] == [BF16] * count
        whole = sum((part.double() for part in parts), torch.zeros(len(x)).double())
        assert ((whole - x.double()).abs() <= left * x.double().abs()).all()
    (same,) = bf16_parts(x.to(BF16), 3)
    assert same.dtype is BF16


def test_bf16_operands_lose_nothing(as_on_a_gpu: int, drawn: Drawn) -> None:
    a, b = drawn(7, 40, dtype=BF16), drawn(40, 9, dtype=BF16)
    assert torch.equal(product(a, b), a.float() @ b.float())
    rows, others = drawn(40, 6, dtype=BF16), drawn(40, 5, dtype=BF16)
    total, same = torch.ones(6, 5), torch.ones(6, 5)
    add_outer(total, rows, others)
    assert torch.equal(total, same.addmm_(rows.float().T, others.float()))


def test_fp32_operands_are_near_fp64(as_on_a_gpu: int, drawn: Drawn) -> None:
    near = {2: 6e-6, 3: 3e-7}[as_on_a_gpu]
    for of_a in (torch.float32, BF16):
        a, b = drawn(30, 200, dtype=of_a), drawn(200, 20)
        assert off(product(a, b), a.double() @ b.double()) < near
        stack = drawn(3, 200, 20)
        assert off(product(a, stack), a.double() @ stack.double()) < near
        assert off(product(stack.transpose(1, 2), a.T), stack.transpose(1, 2).double() @ a.T.double()) < near
        total = torch.zeros(30, 20)
        add_outer(total, a.T, b)
        assert off(total, a.double() @ b.double()) < near
    rows = drawn(200, 12)
    total = torch.zeros(12, 12)
    add_outer(total, rows, rows)  # the same tensor on both sides is cut once
    assert off(total, rows.double().T @ rows.double()) < near


def test_one_part_would_not_do(monkeypatch: pytest.MonkeyPatch, drawn: Drawn) -> None:
    """So the tests above see it if a part is lost."""
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    monkeypatch.setattr(products, "PARTS", 1)
    a, b = drawn(30, 200), drawn(200, 20)
    assert off(product(a, b), a.double() @ b.double()) > 5e-4


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Iterator[None]]:
    def ways() -> Iterator[None]:
        for forced in (False, True):
            monkeypatch.setattr(device, "CUDA_WAY_TOO", forced)
            yield

    return ways


def test_moments_are_the_same_both_ways(both_ways: Callable[[], Iterator[None]], drawn: Drawn) -> None:
    x, miss, slopes, weight = drawn(300, 16, dtype=BF16), drawn(300, 8), drawn(300, 12), drawn(300).abs()
    found = []
    for _ in both_ways():
        moments = SiteMoments(1, 16, torch.device("cpu"), miss_rows=8, slopes=12)
        moments.add(0, x, weight)
        moments.add_miss(0, x, miss, weight)
        moments.add_slopes(0, slopes, weight)
        one = slice(0, 1)
        missed = moments.miss(0.1, one)
        assert missed is not None
        found.append((moments.shrunk(0.1, one), missed, moments.slopes(0.1, one)))
    wide = (x.double() * weight.double()[:, None]).T @ x.double() / weight.double().sum()
    for ours in found:
        assert off(ours[0][0], wide) < 1e-6
    for fp32, by_parts in zip(*found, strict=True):
        assert off(by_parts, fp32) < 6e-6


def test_kl_and_slopes_of_bf16_rows_are_the_same_bits(both_ways: Callable[[], Iterator[None]], drawn: Drawn) -> None:
    p, q, head = drawn(20, 32, dtype=BF16), drawn(20, 32, dtype=BF16), drawn(64, 32, dtype=BF16)
    place = torch.arange(20)
    compared, slopes = [], []
    for _ in both_ways():
        compared.append(compare_rows((p, q), (head, head), place, place, place).kl_nats)
        slopes.append(swiglu_slopes(p, head))
    assert float(compared[0].max()) > 0
    assert torch.equal(*compared)
    assert torch.equal(*slopes)


def test_the_metric_of_gates_and_ups_is_the_same_both_ways(
    both_ways: Callable[[], Iterator[None]], drawn: Drawn
) -> None:
    v, down, metric = drawn(2, 50, 24), drawn(2, 16, 12, dtype=BF16), drawn(16, 16)
    slopes, residual = v.transpose(1, 2) @ v, metric.T @ metric
    fp32, by_parts = [swiglu_metric(slopes.clone(), down, residual) for _ in both_ways()]
    inner = down.double().transpose(1, 2) @ residual.double() @ down.double()
    assert off(by_parts, slopes.double() * inner.repeat(1, 2, 2)) < 6e-6
    assert off(by_parts, fp32) < 6e-6


def test_a_quadratic_form_and_its_gradient(both_ways: Callable[[], Iterator[None]], drawn: Drawn) -> None:
    root, errors, weight = drawn(16, 16), drawn(9, 16), drawn(9).abs()
    metric = root.T @ root
    wide = errors.double().requires_grad_()
    exact = ((wide @ metric.double()) * wide).sum(-1)
    (slope,) = torch.autograd.grad((exact * weight.double()).sum(), wide)
    for _ in both_ways():
        mine = errors.clone().requires_grad_()
        cost = quadratic(mine, metric)
        assert off(cost.detach(), exact.detach()) < 6e-6
        assert off(torch.autograd.grad((cost * weight).sum(), mine)[0], slope) < 6e-6


def test_the_gpus_calls_are_torchs(drawn: Drawn) -> None:
    """On the meta device, which knows the calls that a GPU has: names, dtypes and shapes, and sums in place."""
    a, b = torch.empty(4, 8, dtype=BF16, device="meta"), torch.empty(8, 6, dtype=BF16, device="meta")
    total = torch.mm(a, b, out_dtype=torch.float32)
    assert (total.dtype, tuple(total.shape)) == (torch.float32, (4, 6))
    assert torch.addmm(total, a, b, out_dtype=torch.float32, out=total) is total


def test_totals_of_many_experts_are_each_ones_own(both_ways: Callable[[], Iterator[None]], drawn: Drawn) -> None:
    rows = [5, 0, 40, 1]
    for of_b in (torch.float32, BF16):
        a, b = drawn(sum(rows), 6), drawn(sum(rows), 9, dtype=of_b)
        exact = torch.stack([x.double().T @ y.double() for x, y in zip(a.split(rows), b.split(rows), strict=True)])
        for _ in both_ways():
            totals = torch.zeros(4, 6, 9)
            add_outers(totals, a, b, rows)
            assert off(totals, exact) < 6e-6
            assert not totals[1].any()


@pytest.mark.parametrize("columns", [1, 16, 37, 64, 1024])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_solve_by_blocks_is_as_exact_as_one_in_fp32(
    monkeypatch: pytest.MonkeyPatch, drawn: Drawn, columns: int, width: int
) -> None:
    """Rows that outweigh others a thousandfold, as a moment of real rows has them."""
    rows = drawn(200, width) * torch.logspace(0, 3, width)
    moment = rows.T @ rows
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    lower, right = torch.linalg.cholesky(moment), drawn(5, width)
    exact = torch.linalg.solve(moment.double(), right.double(), left=False)
    plain = solved_from_right(right, lower)
    monkeypatch.setattr(device, "CUDA_WAY_TOO", True)
    monkeypatch.setattr(products, "SOLVED_COLUMNS", columns)
    assert off(solved_from_right(right, lower), exact) <= 3 * off(plain, exact) + 1e-6
