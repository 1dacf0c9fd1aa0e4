"""Second moments, and the share that an expert with few rows borrows, against the formula in fp64.

S_e* = (n_e S_e + tau S) / (n_e + tau), tau = shrinkage * inputs, S the layer's pooled second moment.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.calibration.moments import SiteMoments

CPU = torch.device("cpu")
INPUTS = 24


def rows_of(counts: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=generator)
    return [(1 + e) * torch.randn(n, INPUTS, generator=generator) @ mix for e, n in enumerate(counts)]


def gathered(rows: list[torch.Tensor]) -> SiteMoments:
    moments = SiteMoments(len(rows), INPUTS, CPU)
    for expert, x in enumerate(rows):
        moments.add(expert, x)
    return moments


def formula(rows: list[torch.Tensor], shrinkage: float) -> torch.Tensor:
    """Row by row, in fp64."""
    sums = [sum((torch.outer(x, x) for x in own.double()), torch.zeros(INPUTS, INPUTS).double()) for own in rows]
    counts = [len(own) for own in rows]
    pooled = sum(sums) / sum(counts)
    tau = shrinkage * INPUTS
    return torch.stack([(s + tau * pooled) / (n + tau) for s, n in zip(sums, counts, strict=True)])


@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("counts", [[70, 5, 0, 1], [1, 0, 0, 0], [40, 40]])
def test_shrunk_is_the_formula(counts: list[int], shrinkage: float) -> None:
    rows = rows_of(counts)
    moments, expected = gathered(rows), formula(rows, shrinkage)
    assert moments.rows == counts
    size = float(expected.abs().max())
    got = moments.shrunk(shrinkage, slice(0, len(counts)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6 * size)
    for e in range(len(counts)):  # a slice of the experts borrows from all of them
        assert torch.equal(moments.shrunk(shrinkage, slice(e, e + 1))[0], got[e])


def test_an_expert_without_rows_takes_the_layers_and_one_with_many_keeps_its_own() -> None:
    rows = rows_of([4000, 0, 4000])
    moments = gathered(rows)
    got = moments.shrunk(0.1, slice(0, 3)).double()
    pooled = torch.cat(rows).double()
    torch.testing.assert_close(got[1], pooled.T @ pooled / 8000, rtol=1e-4, atol=1e-2)
    own = rows[0].double().T @ rows[0].double() / 4000
    assert float((got[0] - own).norm() / own.norm()) < 0.01
    assert float((got[1] - own).norm() / own.norm()) > 1


def test_a_site_of_one_matrix_borrows_from_nobody() -> None:
    (x,) = rows_of([50])
    got = gathered([x]).shrunk(0.1, slice(0, 1))[0]
    torch.testing.assert_close(got.double(), x.double().T @ x.double() / 50, rtol=1e-5, atol=1e-3)


def test_a_layer_that_saw_nothing_takes_its_inputs_for_white() -> None:
    got = SiteMoments(3, INPUTS, CPU).shrunk(0.1, slice(1, 3))
    assert torch.equal(got, torch.eye(INPUTS).repeat(2, 1, 1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 10_000), st.floats(0.01, 4))
def test_positive_definite_whenever_the_pooled_moment_is(few: list[int], seed: int, shrinkage: float) -> None:
    """One expert with rows in all directions makes the others' matrices regular too."""
    rows = rows_of([4 * INPUTS, *few], seed)
    pooled = torch.cat(rows).double()
    least = float(torch.linalg.eigvalsh(pooled.T @ pooled / len(pooled))[0])
    got = gathered(rows).shrunk(shrinkage, slice(0, len(rows))).double()
    tau = shrinkage * INPUTS
    for e, own in enumerate(rows):
        bound = tau / (len(own) + tau) * least
        # fp32 sums: the loss is small beside the largest eigenvalue.
        assert float(torch.linalg.eigvalsh(got[e])[0]) > bound - 1e-5 * float(torch.linalg.eigvalsh(got[e])[-1])
        if bound > 1e-4 * float(torch.linalg.eigvalsh(got[e])[-1]):
            torch.linalg.cholesky(got[e].float())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(0, 10_000))
def test_adding_in_chunks_equals_adding_at_once(lengths: list[int], seed: int) -> None:
    (x,) = rows_of([sum(lengths)], seed)
    chunks, once = SiteMoments(2, INPUTS, CPU), SiteMoments(2, INPUTS, CPU)
    once.add(1, x)
    for chunk in x.split(lengths):
        chunks.add(1, chunk)
    assert chunks.rows == once.rows == [0, len(x)]
    scale = float(once.sum_EII.abs().max())
    torch.testing.assert_close(chunks.sum_EII, once.sum_EII, rtol=0, atol=1e-5 * scale)


def test_half_precision_rows_are_summed_in_fp32() -> None:
    """Sums of 30,000 rows: bf16 would stop growing at 256 times the last value."""
    x = torch.ones(30_000, INPUTS, dtype=torch.bfloat16)
    moments = SiteMoments(1, INPUTS, CPU)
    for chunk in x.split(1000):
        moments.add(0, chunk)
    assert torch.equal(moments.sum_EII, torch.full((1, INPUTS, INPUTS), 30_000.0))
    assert moments.sum_EII.dtype == torch.float32
