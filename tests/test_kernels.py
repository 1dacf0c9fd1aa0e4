"""The Triton kernels in Triton's interpreter, against the torch forms.

Where every product and sum is exact in fp32, the order of sums does not matter, and codes must be equal bit for bit:
such inputs are small integers over powers of two, where ties between codes are frequent. On real values a sum in
another order may decide a near tie otherwise, so there the errors that are left are compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onecard.core.method import PRESETS, Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize import card, gptq, grid, refine, tabu
from onecard.quantize.site import quantize_batch

pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """CPU tensors go to the kernels, which Triton interprets (conftest.py)."""
    card.CPU_TOO = True
    assert card.kernels_for(torch.zeros(1)) is not None
    yield
    card.CPU_TOO = False


@contextmanager
def in_torch() -> Iterator[None]:
    """While open, the torch form computes."""
    card.CPU_TOO = False
    try:
        yield
    finally:
        card.CPU_TOO = True


def of_dyadics(generator: torch.Generator, *shape: int, low: int, high: int, over: float) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).float() / over


SIZES = {
    "batch": st.integers(1, 2),
    "outputs": st.integers(1, 40),
    "groups": st.integers(1, 2),
    "width": st.sampled_from([8, 24]),
    "seed": st.integers(0, 2**20),
    "bits": st.sampled_from([4, 8]),
    "symmetric": st.booleans(),
    "negative": st.booleans(),
}


def exact_site(batch: int, outputs: int, groups: int, width: int, seed: int, negative: bool) -> dict[str, torch.Tensor]:
    """Weights in eighths, scales 1/2, 1 or 2 of either sign, whole zero points, whole moments with 1, 2, 4 on the
    diagonal, and a factor of -1, 0 and 1 with 1 and 2 on its."""
    generator = torch.Generator().manual_seed(seed)
    inputs = groups * width
    scale = 2.0 ** torch.randint(-1, 2, (batch, outputs, groups), generator=generator)
    if negative:
        scale = scale * (2.0 * torch.randint(0, 2, scale.shape, generator=generator) - 1)
    own = 2.0 ** torch.randint(0, 3, (batch, inputs), generator=generator)
    whole = of_dyadics(generator, batch, inputs, inputs, low=-1, high=1, over=1)
    whole = whole * (torch.rand(whole.shape, generator=generator) < 0.3)
    upper = whole.triu(1) + torch.diag_embed(own.clamp_max(2))
    order = torch.stack([torch.randperm(inputs, generator=generator) for _ in range(batch)])
    return {
        "w": of_dyadics(generator, batch, outputs, inputs, low=-60, high=60, over=8),
        "scale": scale,
        "zero": torch.randint(-3, 4, scale.shape, generator=generator).float(),
        "upper": upper,
        "moment": whole.triu(1) + whole.triu(1).transpose(1, 2) + torch.diag_embed(own * 4),
        "order": order,
    }


def is_exact(x: torch.Tensor) -> bool:
    """Whether a sum of such values cannot have been rounded: they are multiples of 2^-6 below 2^16."""
    return bool((x.abs() < 2**16).all()) and torch.equal((x * 64).round(), x * 64)


@settings(max_examples=6)
@given(**SIZES)
def test_gptqs_columns_get_the_torch_forms_codes(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    site = exact_site(batch, outputs, groups, width, seed, negative)
    scheme = Scheme(bits, width, symmetric)
    factor = gptq.Factor(site["upper"], site["moment"], 0, 0)
    prepared = gptq.Prepared(site["order"], factor, site["moment"])
    zero = None if symmetric else site["zero"]
    ours = gptq.gptq(site["w"], prepared, site["scale"], zero, scheme)
    with in_torch():
        theirs = gptq.gptq(site["w"], prepared, site["scale"], zero, scheme)
        twice = gptq.gptq(
            site["w"].double(), wider(prepared), site["scale"].double(), None if zero is None else zero.double(), scheme
        )
    assume(torch.equal(theirs.codes, twice.codes))  # fp32 was exact
    assert torch.equal(ours.codes, theirs.codes)


def wider(prepared: gptq.Prepared) -> gptq.Prepared:
    factor = gptq.Factor(prepared.factor.upper.double(), prepared.factor.damped.double(), 0, 0)
    return gptq.Prepared(prepared.order_BI, factor, prepared.objective.double())


def started(site: dict[str, torch.Tensor], scheme: Scheme, seed: int) -> QuantizedWeight:
    """Codes at random."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, site["w"].shape, generator=generator).to(torch.int8)
    return QuantizedWeight(codes, site["scale"], None if scheme.symmetric else site["zero"].to(torch.int8), scheme)


@settings(max_examples=6)
@given(**SIZES)
def test_a_sweep_moves_the_torch_forms_codes(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    site = exact_site(batch, outputs, groups, width, seed, negative)
    scheme = Scheme(4, width, symmetric)
    weight = started(site, scheme, seed)
    given = {
        "codes": weight.codes.float().transpose(1, 2).contiguous(),
        "scale": weight.scales.transpose(1, 2).contiguous(),
        "zero": None if weight.zero_points is None else weight.zero_points.float().transpose(1, 2).contiguous(),
        "gradient": torch.bmm(site["moment"], (site["w"] - weight.dequantize(torch.float32)).transpose(1, 2)),
    }

    def swept() -> tuple[torch.Tensor, torch.Tensor]:
        codes, gradient = given["codes"].clone(), given["gradient"].clone()
        refine._sweep(codes, given["scale"], given["zero"], gradient, site["moment"], weight)
        return codes, gradient

    ours, our_gradient = swept()
    with in_torch():
        theirs, their_gradient = swept()
    assume(is_exact(their_gradient))
    assert torch.equal(ours, theirs)
    assert torch.equal(our_gradient, their_gradient)


@settings(max_examples=6)
@given(**SIZES)
def test_a_tabu_search_makes_the_torch_forms_moves(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    site, moves = exact_site(batch, outputs, groups, width, seed, negative), 1 + seed % 14
    scheme = Scheme(4, width, symmetric)
    weight = started(site, scheme, seed)
    ours = tabu.tabu_searched(weight, site["w"], site["moment"], moves)
    with in_torch():
        theirs = tabu.tabu_searched(weight, site["w"], site["moment"], moves)
    assert torch.equal(ours.codes, theirs.codes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the overflow that is meant
@settings(max_examples=4)
@given(
    outputs=st.integers(1, 9),
    groups=st.integers(1, 3),
    width=st.sampled_from([8, 24, 32]),
    seed=st.integers(0, 2**20),
    symmetric=st.booleans(),
    signed=st.booleans(),
    stored=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_the_scale_search_finds_the_torch_forms_scales(
    outputs: int, groups: int, width: int, seed: int, symmetric: bool, signed: bool, stored: torch.dtype
) -> None:
    """On real values. Where two multiples leave the same error but for rounding, either may be found."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, outputs, groups * width, generator=generator)
    w[0, 0, :width] = 0  # a group of zeros
    w[1, 0, 0] = 1e25  # a group whose squared error overflows
    importance = torch.rand(2, groups * width, generator=generator)
    scheme = Scheme(4, width, symmetric)
    ours, our_zero = grid.searched_scales(w, importance, scheme, stored, signed)
    with in_torch():
        theirs, their_zero = grid.searched_scales(w, importance, scheme, stored, signed)

    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        off = (grid.round_to_nearest(w, scale, zero, scheme).dequantize(torch.float32) - w).double()
        return (off.square() * importance[:, None]).unflatten(-1, (groups, -1)).sum(-1)

    assert ours.dtype == theirs.dtype == stored
    assert torch.equal(ours[:, 0, 0], theirs[:, 0, 0])
    assert torch.allclose(error(ours, our_zero), error(theirs, their_zero), rtol=1e-5, atol=0, equal_nan=True)
    assert (ours == theirs).float().mean() > 0.95


# Real values


def real_site(batch: int = 2, outputs: int = 24, inputs: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, 200, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    return torch.randn(batch, outputs, inputs, generator=generator), rows.transpose(1, 2) @ rows / 200


def test_the_error_of_best_is_the_torch_forms() -> None:
    """A near tie that falls otherwise sends a search another way, so single rows may differ, either way."""
    plain = Method(**{k: v for k, v in PRESETS["best"].items() if k in Method.model_fields})
    method = plain.model_copy(
        update={"tabu_moves": min(plain.tabu_moves, 5), "restarts": min(plain.restarts, 1), "refine_rounds": 1}
    )
    w, moment = real_site()
    given: Any = (w, moment, Scheme(4, 32, True), method, torch.bfloat16)
    ours = quantize_batch(*given)
    with in_torch():
        theirs = quantize_batch(*given)
    assert ours.output_error == pytest.approx(theirs.output_error, rel=2e-3)
    same = (ours.weight.codes == theirs.weight.codes).float().mean()
    assert same > 0.99


def test_cutting_a_batch_or_its_rows_changes_no_code() -> None:
    w, moment = real_site()
    scheme = Scheme(4, 32, True)
    prepared = gptq.prepare(moment, 0.01)
    scale = torch.rand(2, 24, 1, generator=torch.Generator().manual_seed(1)) + 0.2
    whole = gptq.gptq(w, prepared, scale, None, scheme)
    moved = tabu.tabu_searched(whole, w, prepared.objective, 9)
    for rows in (slice(0, 1), slice(7, 20)):
        part = gptq.gptq(w[:, rows], prepared, scale[:, rows], None, scheme)
        assert torch.equal(part.codes, whole.codes[:, rows])
        part = QuantizedWeight(whole.codes[:, rows], scale[:, rows], None, scheme)
        assert torch.equal(tabu.tabu_searched(part, w[:, rows], prepared.objective, 9).codes, moved.codes[:, rows]), (
            "each row is searched alone"
        )


def test_fp64_and_a_machine_without_triton_take_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    with in_torch():
        assert card.kernels_for(torch.zeros(1)) is None
    monkeypatch.setattr(card, "_kernels", lambda: None)
    assert card.kernels_for(torch.zeros(1)) is None
