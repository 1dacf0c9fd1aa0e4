"""KL over vocabulary slices against the whole softmax in fp64, and the figures that are made of it.

The twins hold all logits at once and write every formula out.
"""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.eval.kl import TokenResults, compare, concatenate
from onecard.eval.summary import cluster_standard_error, summarize

TOKENS, VOCAB = 40, 101


def logits(seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reference [T, V], quantized [T, V], targets [T], documents [T])."""
    generator = torch.Generator().manual_seed(seed)
    p = scale * torch.randn(TOKENS, VOCAB, generator=generator)
    q = p + 0.1 * scale * torch.randn(TOKENS, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return p, q, targets, torch.arange(TOKENS) // 7


def sliced(p: torch.Tensor, q: torch.Tensor, widths: list[int]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    starts = [sum(widths[:n]) for n in range(len(widths))]
    assert sum(widths) == p.shape[1]
    return [(s, p[:, s : s + w], q[:, s : s + w]) for s, w in zip(starts, widths, strict=True)]


def naive_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum_v P(v) (log P(v) - log Q(v)), in fp64, token by token."""
    out = []
    for p_V, q_V in zip(p.double(), q.double(), strict=True):
        log_p, log_q = torch.log_softmax(p_V, 0), torch.log_softmax(q_V, 0)
        out.append(torch.sum(torch.exp(log_p) * (log_p - log_q)))
    return torch.stack(out)


def log_probability(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.log_softmax(row.double(), 0)[t] for row, t in zip(x, targets, strict=True)])


widths = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(
    lambda w: [*[x for n, x in enumerate(w) if sum(w[: n + 1]) < VOCAB], 0]
)


@settings(deadline=None)
@given(st.integers(0, 2**31), widths, st.sampled_from([0.01, 3.0, 30.0]))
def test_slices_of_any_widths_give_the_whole_softmax(seed: int, parts: list[int], scale: float) -> None:
    p, q, targets, document = logits(seed, scale)
    parts = [*parts[:-1], VOCAB - sum(parts)]
    got = compare(sliced(p, q, parts), targets, document)
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q).clamp_min(0), rtol=1e-4, atol=2e-6 * (1 + scale))
    assert torch.equal(got.top1_reference, p.argmax(-1))
    assert torch.equal(got.top1_quantized, q.argmax(-1))
    for mine, x in ((got.logp_reference, p), (got.logp_quantized, q)):
        torch.testing.assert_close(mine.double(), log_probability(x, targets), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.document, document)


@pytest.mark.parametrize("parts", [[VOCAB], [1] * VOCAB, [50, 51], [100, 1], [1, 100]])
def test_fixed_slices(parts: list[int]) -> None:
    p, q, targets, document = logits(5)
    got = compare(sliced(p, q, parts), targets, document)
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equal_logits_have_a_kl_of_zero(scale: float) -> None:
    p, _, targets, document = logits(6, scale)
    got = compare(sliced(p, p.clone(), [30, 71]), targets, document)
    assert (got.kl_nats == 0).all()
    assert torch.equal(got.logp_reference, got.logp_quantized)
    assert torch.equal(got.top1_reference, got.top1_quantized)


@pytest.mark.parametrize("parts", [[VOCAB], [10, 91], [1] * VOCAB])
def test_large_logits_stay_finite_and_right(parts: list[int]) -> None:
    p, q, targets, document = logits(7)
    p, q = p.clone(), q.clone()
    p[0], q[0] = 1e4, -1e4  # shifts alone: the distributions are both uniform
    p[1], q[1] = -1e4, 1e4
    p[2, 3], q[2, 90] = 1e4, 1e4  # all mass in two places
    p[3, 90], q[3, 90] = -1e4, 1e4
    p[4, 0], p[4, 100], q[4, 0], q[4, 100] = 1e4, 1e4, 1e4, 1e4 - 1
    p[5, 50], q[5, 50] = 1e4, -1e4
    got = compare(sliced(p, q, parts), targets, document)
    for values in (got.kl_nats, got.logp_reference, got.logp_quantized):
        assert torch.isfinite(values).all()
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q), rtol=1e-5, atol=2e-3)
    assert got.kl_nats[:2].max() < 2e-3
    assert got.kl_nats[2] == pytest.approx(1e4, rel=1e-2)


def test_kl_has_a_direction_and_half_precision_is_summed_in_fp32() -> None:
    p, q, targets, document = logits(8)
    there = compare(sliced(p, q, [VOCAB]), targets, document).kl_nats
    back = compare(sliced(q, p, [VOCAB]), targets, document).kl_nats
    assert not torch.allclose(there, back, rtol=1e-2)
    low_p, low_q = p.bfloat16(), q.bfloat16()
    got = compare(sliced(low_p, low_q, [50, 51]), targets, document)
    assert got.kl_nats.dtype == torch.float32
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(low_p, low_q), rtol=1e-4, atol=1e-6)


def test_parts_are_joined_in_order() -> None:
    p, q, targets, document = logits(9)
    whole = compare(sliced(p, q, [VOCAB]), targets, document)
    cut = [slice(0, 13), slice(13, 14), slice(14, TOKENS)]
    joined = concatenate([compare(sliced(p[c], q[c], [VOCAB]), targets[c], document[c]) for c in cut])
    for name in TokenResults.__dataclass_fields__:
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


# Figures


def slow_standard_error(values: list[float], document: list[int]) -> float:
    """Cochran's ratio estimator, written out: each document's sum against what its tokens would give at the mean."""
    names = sorted(set(document))
    mean = math.fsum(values) / len(values)
    spread = 0.0
    for name in names:
        own = [v for v, d in zip(values, document, strict=True) if d == name]
        spread += (math.fsum(own) - mean * len(own)) ** 2
    return math.sqrt(len(names) / (len(names) - 1) * spread) / len(values)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(3, 9)), min_size=2, max_size=60))
def test_standard_error_over_documents_is_the_formula(rows: list[tuple[float, int]]) -> None:
    """Document numbers have gaps and need not start at zero."""
    values, document = [v for v, _ in rows], [d for _, d in rows]
    got = cluster_standard_error(torch.tensor(values, dtype=torch.float64), torch.tensor(document))
    if len(set(document)) < 2:
        assert got is None
    else:
        assert got == pytest.approx(slow_standard_error(values, document), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(0, 50), min_size=2, max_size=60))
def test_with_a_token_a_document_it_is_the_plain_standard_error(values: list[float]) -> None:
    got = cluster_standard_error(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)))
    plain = float(torch.tensor(values, dtype=torch.float64).std(unbiased=True)) / math.sqrt(len(values))
    assert got == pytest.approx(plain, rel=1e-9, abs=1e-12)


def test_tokens_of_one_document_do_not_count_as_independent() -> None:
    """Every document repeats one value a hundred times: the error is that of the documents, not of the tokens."""
    generator = torch.Generator().manual_seed(10)
    value = torch.rand(12, generator=generator)
    repeated, document = value.repeat_interleave(100), torch.arange(12).repeat_interleave(100)
    got = cluster_standard_error(repeated, document)
    assert got == pytest.approx(cluster_standard_error(value, torch.arange(12)), rel=1e-6)
    assert got > 5 * cluster_standard_error(repeated, torch.arange(1200))


def results(seed: int = 11) -> TokenResults:
    p, q, targets, document = logits(seed)
    return compare(sliced(p, q, [VOCAB]), targets, document)


def test_every_field_of_the_summary() -> None:
    found = results()
    got = summarize(found)
    kl = sorted(found.kl_nats.double().tolist())
    mean = math.fsum(kl) / TOKENS
    error = slow_standard_error(found.kl_nats.double().tolist(), found.document.tolist())

    def quantile(q: float) -> float:
        """Between the two neighbours, linearly."""
        at = q * (TOKENS - 1)
        low = math.floor(at)
        return kl[low] + (at - low) * (kl[min(low + 1, TOKENS - 1)] - kl[low])

    expected = {
        "tokens": TOKENS,
        "documents": 6,
        "kl_mean_nats": mean,
        "kl_standard_error_nats": error,
        # 2.570582: the 97.5 % point of Student's distribution with 5 degrees of freedom, from a printed table.
        "kl_low_nats": mean - 2.570582 * error,
        "kl_high_nats": mean + 2.570582 * error,
        "kl_p90_nats": quantile(0.9),
        "kl_p99_nats": quantile(0.99),
        "kl_max_nats": kl[-1],
        "same_top1": sum(
            a == b for a, b in zip(found.top1_reference.tolist(), found.top1_quantized.tolist(), strict=True)
        )
        / TOKENS,
        "perplexity_reference": math.exp(-math.fsum(found.logp_reference.tolist()) / TOKENS),
        "perplexity_quantized": math.exp(-math.fsum(found.logp_quantized.tolist()) / TOKENS),
    }
    fields = asdict(got)
    median = fields.pop("kl_median_nats")
    assert kl[TOKENS // 2 - 1] <= median <= kl[TOKENS // 2]
    assert fields == pytest.approx(expected, rel=1e-6)
    assert 0 < got.same_top1 < 1
    assert got.kl_low_nats < got.kl_mean_nats < got.kl_high_nats


def test_an_interval_does_not_reach_below_zero() -> None:
    found = results()
    skewed = torch.zeros(TOKENS)
    skewed[0] = 5.0
    got = summarize(TokenResults(**{**asdict_shallow(found), "kl_nats": skewed}))
    assert got.kl_low_nats == 0
    assert got.kl_high_nats > got.kl_mean_nats


def asdict_shallow(found: TokenResults) -> dict[str, torch.Tensor]:
    return {name: getattr(found, name) for name in TokenResults.__dataclass_fields__}


def test_one_document_has_no_interval_and_the_figures_are_still_json() -> None:
    """The summary goes into the record and onto stdout, where a script's strict reader must not meet NaN."""
    found = results()
    got = summarize(TokenResults(**{**asdict_shallow(found), "document": torch.zeros(TOKENS, dtype=torch.int64)}))
    assert got.documents == 1
    assert got.kl_mean_nats == pytest.approx(float(found.kl_nats.double().mean()))
    assert json.loads(json.dumps(asdict(got), allow_nan=False))["documents"] == 1
