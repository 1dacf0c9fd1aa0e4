"""The Triton kernels in Triton's interpreter, against the torch forms.

Where every product and sum is exact in fp32, the order of sums does not matter, and codes must be equal bit for bit:
such inputs are small integers over powers of two, where ties between codes are frequent. On real values a sum in
another order may decide a near tie otherwise, so there the errors that are left are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onecard.core.errors import ResourceError
from onecard.core.method import PRESETS, Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize import card, gptq, grid, held, refine, restarts, tabu
from onecard.quantize.held import Held, stretches
from onecard.quantize.site import quantize_batch

pytest.importorskip("triton")
# Changes a tensor's dtype to that of what is held.
Typed = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """CPU tensors go to the kernels, which Triton interprets (conftest.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "CPU_TOO", True)
        # Small blocks, so that small matrices have several.
        for module in (gptq, held, refine):
            patch.setattr(module, "BLOCK_COLUMNS", 16)
        launch = card.kernels_for(torch.zeros(1))
        assert launch is not None
        for kernel in ("REFINE", "RESTART", "TABU"):  # fewer programs to interpret
            patch.setattr(launch, f"{kernel}_ROWS", 8)
        yield


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
    "outputs": st.integers(1, 9),
    "groups": st.integers(1, 3),
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
    root = whole.triu(1) + torch.diag_embed(own.clamp_max(2))
    order = torch.stack([torch.randperm(inputs, generator=generator) for _ in range(batch)])
    return {
        "w": of_dyadics(generator, batch, outputs, inputs, low=-60, high=60, over=8),
        "scale": scale,
        "zero": torch.randint(-3, 4, scale.shape, generator=generator).float(),
        "root": root,
        "moment": whole.triu(1) + whole.triu(1).transpose(1, 2) + torch.diag_embed(own * 4),
        "order": order,
    }


def held_of(site: dict[str, torch.Tensor], scheme: Scheme, seed: int, dtype: torch.dtype) -> Held:
    """Codes at random, and scales in bf16."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, site["w"].shape, generator=generator).to(torch.int8)
    zero = None if scheme.symmetric else site["zero"].to(torch.int8)
    return Held.of(QuantizedWeight(codes, site["scale"].bfloat16(), zero, scheme), site["w"].to(dtype))


def check_exact(
    site: dict[str, torch.Tensor], scheme: Scheme, seed: int, search: Callable[[Held, Typed], None]
) -> None:
    """The kernel's codes, scales and errors are the torch form's. `search` changes what is held."""
    made = []
    for in_triton, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        held = held_of(site, scheme, seed, dtype)
        with nullcontext() if in_triton else in_torch():
            search(held, lambda x, to=dtype: x.to(to))
        made.append((held.codes_BIO, held.scale_BGO.double(), held.error_BIO.double()))
    ours, theirs, twice = made
    assume(all(torch.equal(a, b) for a, b in zip(theirs, twice, strict=True)))  # fp32 was exact
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=8)
@given(
    batch=st.integers(1, 2),
    columns=st.sampled_from([1, 130]),
    inputs=st.sampled_from([8, 40, 96]),
    outputs=st.sampled_from([9, 70]),
    turned=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_product_has_the_bits_of_two_parts(
    batch: int, columns: int, inputs: int, outputs: int, turned: bool, seed: int
) -> None:
    """Of views, as its callers give them. 8 bits times 10 are exact; of real values 2^-16 is lost at most."""
    generator = torch.Generator().manual_seed(seed)
    a = of_dyadics(generator, batch, inputs + 3, columns + 5, low=-255, high=255, over=16)[:, :inputs, :columns]
    a = a.transpose(1, 2) if turned else a.transpose(1, 2).contiguous()
    x = of_dyadics(generator, batch, inputs + 2, outputs, low=-1023, high=1023, over=64)[:, 1:-1]
    assert torch.equal(held.product(a, x).double(), a.double() @ x.double())
    a, x = (torch.randn(y.shape, generator=generator) for y in (a, x))
    off = held.product(a, x).double() - a.double() @ x.double()
    assert (off.abs() <= 2**-15 * (a.abs() @ x.abs()).double()).all()


@settings(max_examples=8)
@given(**SIZES)
def test_gptqs_columns_get_the_torch_forms_codes(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    site = exact_site(batch, outputs, groups, width, seed, negative)

    def search(held: Held, to: Typed) -> None:
        held.error_BIO.copy_(site["w"].transpose(1, 2))
        gptq.round_columns(held, site["order"], to(site["root"]))

    check_exact(site, Scheme(bits, width, symmetric), seed, search)


@settings(max_examples=8)
@given(**SIZES)
def test_a_round_of_refinement_gives_the_torch_forms_scales_and_codes(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    """Blocks of 16 columns: stretches of two groups and of one, and groups wider than a block."""
    site = exact_site(batch, outputs, groups, width, seed, negative)
    check_exact(site, Scheme(bits, width, symmetric), seed, lambda held, to: refine.refine(held, to(site["moment"]), 1))


@settings(max_examples=6)
@given(**SIZES)
def test_a_tabu_search_makes_the_torch_forms_moves(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    site, moves = exact_site(batch, outputs, groups, width, seed, negative), 1 + seed % 14
    check_exact(
        site, Scheme(4, width, symmetric), seed, lambda held, to: tabu.tabu_search(held, to(site["moment"]), moves)
    )


@settings(max_examples=4)
@given(**SIZES)
def test_restarts_keep_the_torch_forms_tries(
    batch: int, outputs: int, groups: int, width: int, seed: int, bits: int, symmetric: bool, negative: bool
) -> None:
    """Two tries. Inverse, orders and factors are drawn, not computed, so that all products are exact."""
    site, columns = exact_site(batch, outputs, groups, width, seed, negative), stretches(groups * width, width)
    tries = [exact_site(batch, 1, 1, groups * width, seed + k, negative) for k in (1, 2)]

    def search(held: Held, to: Typed) -> None:
        made = []
        for c in columns:
            size = c.stop - c.start
            orders = torch.stack([torch.argsort(t["order"][:, :size]) for t in tries])
            roots = torch.stack([to(t["root"][:, :size, :size]) for t in tries])
            inverse = to(tries[0]["moment"][:, :size, :size] / 8).contiguous()
            made.append(restarts.Stretch(inverse, orders, torch.argsort(orders), roots.contiguous()))
        restarts.restart(held, to(site["moment"]), made, 1)

    check_exact(site, Scheme(4, width, symmetric), seed, search)


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


def real_site(batch: int = 2, outputs: int = 6, inputs: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
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
    given: Any = (w, moment, Scheme(4, 16, True), method, torch.bfloat16)
    ours = quantize_batch(*given)
    with in_torch():
        theirs = quantize_batch(*given)
    assert ours.output_error == pytest.approx(theirs.output_error, rel=2e-3)
    same = (ours.weight.codes == theirs.weight.codes).float().mean()
    assert same > 0.99


def test_cutting_a_batch_or_its_rows_changes_no_code() -> None:
    w, moment = real_site()
    scheme = Scheme(4, 16, True)
    prepared = gptq.prepare(moment, 0.01)
    scale = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(1)) + 0.2

    def searched(rows: slice) -> Held:
        found = gptq.gptq(w[:, rows], prepared, scale[:, rows].bfloat16(), None, scheme)
        tabu.tabu_search(found, prepared.objective, 9)
        return found

    whole = searched(slice(0, 6))
    for rows in (slice(0, 1), slice(3, 6)):
        assert torch.equal(searched(rows).codes_BIO, whole.codes_BIO[:, :, rows]), "each row is searched alone"


def test_fp64_and_a_machine_without_triton_take_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    with in_torch():
        assert card.kernels_for(torch.zeros(1)) is None
    monkeypatch.setattr(card, "_kernels", lambda: None)
    assert card.kernels_for(torch.zeros(1)) is None


def test_a_card_without_a_c_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a weight is read; else the first launch would say it, after the statistics."""
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    card.refuse_without_compiler(torch.device("cpu"))
    with pytest.raises(ResourceError, match="install gcc"):
        card.refuse_without_compiler(torch.device("cuda:0"))
    monkeypatch.setattr(card.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    card.refuse_without_compiler(torch.device("cuda:0"))
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "cc")
    card.refuse_without_compiler(torch.device("cuda:0"))
