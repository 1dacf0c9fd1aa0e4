"""A batch of matrices is cut by a memory budget without a changed code; the reported error is the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matrices import METHODS, SCHEMES, correlated, dequantized, output_error, schemes
from onecard.core.method import Method
from onecard.core.scheme import Scheme
from onecard.quantize.grid import (
    absmax_scales,
    round_to_nearest,
)
from onecard.quantize.site import batch_slices, quantize_batch, relative_output_error, working_bytes


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.integers(1, 10**8))
def test_cuts_cover_the_batch_in_order_within_the_budget(batch: int, outputs: int, inputs: int, budget: int) -> None:
    parts = list(batch_slices(batch, outputs, inputs, budget, Method(refine_rounds=0)))
    assert [b for part in parts for b in range(batch)[part]] == list(range(batch))
    for part in parts:
        size = part.stop - part.start
        assert size == 1 or working_bytes(size, outputs, inputs, False, Method(refine_rounds=0)) <= budget


@pytest.mark.parametrize("method", [Method(method="rtn"), *METHODS.values()], ids=["rtn", *METHODS])
@schemes
def test_cutting_the_batch_by_a_budget_changes_no_code(scheme: Scheme, method: Method) -> None:
    """In fp32, as a run does it."""
    w, moment = (t.float() for t in correlated(7, 300, 160, seed=13))
    whole = quantize_batch(w, moment, scheme, method, torch.bfloat16)
    for step in (1, 2, 3):
        budget = working_bytes(step, 12, 160, False, method)
        slices = batch_slices(7, 12, 160, budget, method)
        parts = [quantize_batch(w[c], moment[c], scheme, method, torch.bfloat16) for c in slices]
        assert len(parts) == -(-7 // step)
        assert torch.equal(torch.cat([p.weight.codes for p in parts]), whole.weight.codes)
        assert torch.equal(torch.cat([p.weight.scales for p in parts]), whole.weight.scales)


def test_the_reported_error_is_the_formula() -> None:
    w, moment = correlated(3, 300, 64, seed=14)
    q = dequantized(round_to_nearest(w, *absmax_scales(w, SCHEMES[0], torch.bfloat16), SCHEMES[0]))
    zero = torch.zeros_like(w)
    for b, got in enumerate(relative_output_error(w, q, moment)):
        expected = output_error(w[b], q[b], moment[b]) / output_error(w[b], zero[b], moment[b])
        assert got == pytest.approx(expected, rel=1e-9)
    for b, got in enumerate(relative_output_error(w, q, None)):
        assert got == pytest.approx(float(((w[b] - q[b]) ** 2).sum() / (w[b] ** 2).sum()), rel=1e-9)
