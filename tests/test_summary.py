"""Every figure quoted from token results, against plain Python in fp64."""

import json
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onecard.eval.intervals import RESAMPLES, bootstrap
from onecard.eval.kl import TokenResults
from onecard.eval.summary import (
    CONFIDENCE,
    DELTA_P,
    TokenGroup,
    by_confidence,
    by_label,
    by_position,
    cluster_standard_error,
    histogram,
    quantiles,
    summarize,
    summarize_groups,
)
from outcomes import make_results, make_rows, only, with_values

VOCAB = 61
LENGTHS = [9, 40, 2, 18, 70, 33, 12]


@pytest.fixture(scope="module")
def results() -> TokenResults:
    """Seven documents of unequal length, in an order that batches might have."""
    return make_results(make_rows(LENGTHS, VOCAB), VOCAB, order=[4, 1, 5, 3, 6, 0, 2])


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def slow_quantile(values: list[float], q: float) -> float:
    """Between the two neighbours, linearly."""
    ranked = sorted(values)
    at = q * (len(ranked) - 1)
    low = math.floor(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def slow_interval(values: list[float], document: list[int]) -> tuple[float, float]:
    """Standard error of the token mean, from documents' sums made one token at a time."""
    names = sorted(set(document))
    own = {name: [v for v, d in zip(values, document, strict=True) if d == name] for name in names}
    sums = np.array([[math.fsum(own[name])] for name in names])
    (found,) = bootstrap(sums, np.array([[float(len(own[name]))] for name in names]))
    assert found is not None
    return found.low, found.high


# Standard error


def slow_standard_error(values: list[float], document: list[int]) -> float:
    """Cochran's ratio estimator, written out: each document's sum against its tokens times the mean."""
    names = sorted(set(document))
    middle = mean(values)
    spread = 0.0
    for name in names:
        own = [v for v, d in zip(values, document, strict=True) if d == name]
        spread += (math.fsum(own) - middle * len(own)) ** 2
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
    """Every document repeats one value a hundred times, so the error is that of documents, not of tokens."""
    generator = torch.Generator().manual_seed(10)
    value = torch.rand(12, generator=generator)
    repeated, document = value.repeat_interleave(100), torch.arange(12).repeat_interleave(100)
    got = cluster_standard_error(repeated, document)
    assert got == pytest.approx(cluster_standard_error(value, torch.arange(12)), rel=1e-6)
    assert got > 5 * cluster_standard_error(repeated, torch.arange(1200))


# All tokens


def test_every_field_of_the_summary(results: TokenResults) -> None:
    kl, reverse = results.kl_nats.double().tolist(), results.reverse_kl_nats.double().tolist()
    p, q = results.logp_reference.double().tolist(), results.logp_quantized.double().tolist()
    document = results.document.tolist()
    tokens = sum(n - 1 for n in LENGTHS)
    same, overlap = [], []
    for a, b in zip(results.top_reference.tolist(), results.top_quantized.tolist(), strict=True):
        same.append(float(a[0] == b[0]))
        overlap.append(len(set(a) & set(b)) / 5)
    delta = [math.exp(b) - math.exp(a) for a, b in zip(p, q, strict=True)]
    kl_low, kl_high = slow_interval(kl, document)
    same_low, same_high = slow_interval(same, document)
    lost_low, lost_high = slow_interval([a - b for a, b in zip(p, q, strict=True)], document)
    expected = {
        "tokens": tokens,
        "documents": len(LENGTHS),
        "kl_mean_nats": mean(kl),
        "kl_standard_error_nats": slow_standard_error(kl, document),
        "kl_low_nats": kl_low,
        "kl_high_nats": kl_high,
        "kl_median_nats": slow_quantile(kl, 0.5),
        "kl_p90_nats": slow_quantile(kl, 0.9),
        "kl_p95_nats": slow_quantile(kl, 0.95),
        "kl_p99_nats": slow_quantile(kl, 0.99),
        "kl_p999_nats": slow_quantile(kl, 0.999),
        "kl_max_nats": max(kl),
        "reverse_kl_mean_nats": mean(reverse),
        "same_top1": mean(same),
        "same_top1_low": same_low,
        "same_top1_high": same_high,
        "top5_overlap": mean(overlap),
        "delta_p_mean": mean(delta),
        "delta_p_rms": math.sqrt(mean([d * d for d in delta])),
        "perplexity_reference": math.exp(-mean(p)),
        "perplexity_quantized": math.exp(-mean(q)),
        "perplexity_ratio": math.exp(-mean(q)) / math.exp(-mean(p)),
        "perplexity_ratio_low": math.exp(lost_low),
        "perplexity_ratio_high": math.exp(lost_high),
    }
    fields = summarize(results).to_json()
    assert fields.pop("delta_p_quantiles") == pytest.approx(
        {name: slow_quantile(delta, int(name[1:]) / 100) for name in DELTA_P}
    )
    assert fields.pop("interval") == {
        "method": "BCa bootstrap over documents",
        "level": 0.95,
        "resamples": RESAMPLES,
        "seed": 0,
        "documents": len(LENGTHS),
    }
    assert fields == pytest.approx(expected, rel=1e-6)
    assert 0 < fields["same_top1"] < 1
    assert 0 < fields["top5_overlap"] < 1
    assert kl_low < fields["kl_mean_nats"] < kl_high


def test_intervals_do_not_reach_past_what_is_possible(results: TokenResults) -> None:
    skewed = torch.zeros(len(results))
    skewed[0] = 5.0
    agree = with_values(results, kl_nats=skewed, top_quantized=results.top_reference)
    got = summarize(agree)
    assert got.kl_low_nats is not None
    assert got.kl_high_nats is not None
    assert 0 <= got.kl_low_nats < got.kl_mean_nats < got.kl_high_nats
    assert (got.same_top1_low, got.same_top1, got.same_top1_high) == (1, 1, 1)
    assert got.top5_overlap == 1


def test_a_model_against_itself_has_no_interval_of_any_width(results: TokenResults) -> None:
    zero = torch.zeros(len(results))
    got = summarize(with_values(results, kl_nats=zero, logp_quantized=results.logp_reference))
    assert (got.kl_low_nats, got.kl_mean_nats, got.kl_high_nats) == (0, 0, 0)
    assert (got.perplexity_ratio_low, got.perplexity_ratio, got.perplexity_ratio_high) == (1, 1, 1)
    assert got.delta_p_rms == 0


def test_one_document_has_no_interval_and_the_figures_are_still_json(results: TokenResults) -> None:
    """The summary goes into the record and onto stdout, where a script's strict reader must not meet NaN."""
    got = summarize(with_values(results, document=torch.zeros(len(results), dtype=torch.int64)))
    assert got.documents == 1
    assert got.kl_mean_nats == pytest.approx(float(results.kl_nats.double().mean()))
    fields = json.loads(json.dumps(got.to_json(), allow_nan=False))
    missing = {name for name, value in fields.items() if value is None}
    assert missing == {
        "kl_standard_error_nats",
        "kl_low_nats",
        "kl_high_nats",
        "same_top1_low",
        "same_top1_high",
        "perplexity_ratio_low",
        "perplexity_ratio_high",
    }


def test_quantiles_of_more_values_than_torch_takes() -> None:
    values = torch.zeros(2**24 + 1)
    values[7] = 3.0
    assert quantiles(values, (0.0, 1.0)) == [0.0, 3.0]


# Groups


def slow_groups(results: TokenResults, label: Callable[[int], str]) -> dict[str, list[int]]:
    """label -> the numbers of its tokens."""
    found: dict[str, list[int]] = {}
    for token in range(len(results)):
        found.setdefault(label(token), []).append(token)
    return found


def check_groups(results: TokenResults, groups: list[TokenGroup], expected: dict[str, list[int]]) -> None:
    """Every token is in one group, no group is empty, and each group's figures are computed by hand."""
    got = [entry.to_json() for entry in summarize_groups(results, groups)]
    assert {entry["label"] for entry in got} == set(expected)
    assert sum(entry["tokens"] for entry in got) == len(results)
    for entry in got:
        own = expected[entry["label"]]
        part = only(results, torch.tensor(own))
        kl, document = part.kl_nats.double().tolist(), part.document.tolist()
        assert entry["tokens"] == len(own)
        assert entry["documents"] == len(set(document))
        assert entry["kl_mean_nats"] == pytest.approx(mean(kl), rel=1e-9)
        assert entry["same_top1"] == pytest.approx(mean(part.same_top1.double().tolist()))
        if entry["documents"] < 2:
            assert entry["kl_low_nats"] is entry["kl_high_nats"] is None
        else:
            assert min(kl) <= entry["kl_low_nats"] <= entry["kl_mean_nats"] + 1e-12
            assert entry["kl_mean_nats"] - 1e-12 <= entry["kl_high_nats"] <= max(kl)


def test_groups_by_position(results: TokenResults) -> None:
    """Groups by the number of tokens before a prediction, in octaves; the first predicted token has one before it."""

    def label(token: int) -> str:
        seen = int(results.position[token]) + 1
        return next(f"{a} to {b}" for a, b in ((1, 15), (16, 31), (32, 63), (64, 127)) if a <= seen <= b)

    groups = by_position(results)
    assert [group.label for group in groups] == ["1 to 15", "16 to 31", "32 to 63", "64 to 127"]
    check_groups(results, groups, slow_groups(results, label))


@pytest.mark.parametrize(("last", "count"), [(14, 1), (15, 2), (30, 2), (31, 3)])
def test_the_last_position_has_a_group(results: TokenResults, last: int, count: int) -> None:
    groups = by_position(only(results, results.position <= last))
    assert len(groups) == count
    assert groups[-1].member.any()


def test_groups_by_confidence(results: TokenResults) -> None:
    p = results.top_p_reference[:, 0].clone()
    p[:4] = torch.tensor([1.0, 0.99, 0.5, 0.25])
    results = with_values(results, top_p_reference=p[:, None])

    def label(token: int) -> str:
        bounds = list(pairwise(CONFIDENCE))
        low, high = next((a, b) for a, b in reversed(bounds) if float(p[token]) >= float(np.float32(a)))
        return f"{low:g} to {high:g}"

    expected = slow_groups(results, label)
    assert {0, 1} <= set(expected["0.99 to 1"])
    assert 2 in expected["0.5 to 0.75"]
    check_groups(results, by_confidence(results), expected)


def test_groups_by_label(results: TokenResults) -> None:
    labels = ["beta" if n % 3 else "alpha" for n in range(len(results))]
    labels[0] = "one document alone"
    groups = by_label(labels)
    assert [group.label for group in groups] == ["alpha", "beta", "one document alone"]
    check_groups(results, groups, slow_groups(results, lambda token: labels[token]))


def test_a_group_without_tokens_is_left_out(results: TokenResults) -> None:
    nobody = TokenGroup("nobody", torch.zeros(len(results), dtype=torch.bool))
    everyone = TokenGroup("everyone", torch.ones(len(results), dtype=torch.bool))
    entry = summarize_groups(results, [nobody, everyone])[0].to_json()
    assert len(summarize_groups(results, [nobody, everyone])) == 1
    whole = summarize(results)
    assert entry["label"] == "everyone"
    assert (entry["kl_mean_nats"], entry["kl_low_nats"], entry["kl_high_nats"]) == pytest.approx(
        (whole.kl_mean_nats, whole.kl_low_nats, whole.kl_high_nats)
    )
    assert summarize_groups(results, [nobody]) == ()


# The histogram


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 100.0)), min_size=1, max_size=80))
def test_the_histogram_holds_every_token_once(values: list[float]) -> None:
    kl = torch.tensor(values, dtype=torch.float32)
    found = histogram(kl).to_json()
    edges, counts = found["edges_nats"], found["tokens"]
    assert len(edges) == len(counts) + 1
    assert sum(counts) == len(values)
    assert edges[0] == 0
    assert edges[1] == 1e-6
    assert edges[-1] >= float(kl.double().max())
    assert all(a < b for a, b in pairwise(edges))
    inner = edges[1:-1]
    assert [b / a for a, b in pairwise(inner)] == pytest.approx([10**0.25] * (len(inner) - 1))
    for k, (low, high) in enumerate(pairwise(edges)):
        last = k == len(counts) - 1
        assert counts[k] == sum(low <= v < high or (last and v == high) for v in kl.double().tolist())


def test_the_histogram_ends_near_the_worst_token() -> None:
    found = histogram(torch.tensor([0.0, 0.5e-6, 1e-3, 0.02])).to_json()
    assert found["tokens"][0] == 2
    assert found["tokens"][-1] == 1
    assert found["edges_nats"][-1] < 0.02 * 10**0.26
