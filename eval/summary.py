"""Token results to quoted figures, over all tokens and by group, each with an interval over documents.

One draw is a document (intervals.py). The standard error of the mean is that of the ratio estimator for clusters
(Cochran, Sampling Techniques, 1977, section 9A.1): with S_d the sum over a document's tokens and n_d their number,
m = sum S_d / sum n_d and

    se^2 = D / (D - 1) * sum (S_d - m n_d)^2 / (sum n_d)^2

Shape legend: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import numpy as np
import torch

from ..core.record.kl import Bucket, Histogram, IntervalMethod, KlSummary
from .intervals import LEVEL, RESAMPLES, SEED, Interval, bootstrap
from .kl import TokenResults

# Groups by confidence: bounds of the reference's probability of its likeliest token.
CONFIDENCE = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# The histogram's first bound above zero (below 1e-6 nats lies rounding), and its bins for each decade above.
HISTOGRAM_FROM, BINS_A_DECADE = 1e-6, 4
DELTA_P = ("p01", "p05", "p25", "p50", "p75", "p95", "p99")


@dataclass(frozen=True)
class TokenGroup:
    """Some of the tokens: all that are in `member` (bool [T])."""

    label: str
    member: torch.Tensor


def cluster_standard_error(values: torch.Tensor, document: torch.Tensor) -> float | None:
    """Standard error of the token mean over documents, by the formula above; None for fewer than two documents."""
    values = values.double()
    index = document - document.min()
    count = int(index.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    present = sizes > 0
    sums, sizes = sums[present], sizes[present]
    documents = len(sums)
    if documents < 2:
        return None
    mean = sums.sum() / sizes.sum()
    spread = (sums - mean * sizes).square().sum()
    return float((documents / (documents - 1) * spread).sqrt() / sizes.sum())


def quantiles(values: torch.Tensor, at: Sequence[float]) -> list[float]:
    """By linear interpolation, for any number of values (torch.quantile takes at most 16 million)."""
    return [float(x) for x in np.quantile(values.double().numpy(), at)]


def means(
    values: Sequence[torch.Tensor], members: Sequence[torch.Tensor], document: torch.Tensor
) -> list[Interval | None]:
    """95 % intervals of token means: for each of `values`, over the tokens in the `members` beside it (bool [T])."""
    index = torch.unique(document, return_inverse=True)[1].numpy()
    count = int(index.max()) + 1

    def sums(weights: torch.Tensor) -> np.ndarray:
        return np.bincount(index, weights.double().numpy(), minlength=count)

    numerators = np.stack([sums(v.double() * m) for v, m in zip(values, members, strict=True)], 1)
    return bootstrap(numerators, np.stack([sums(m) for m in members], 1))


def _exponential(nats: float) -> float | None:
    """e^nats; None where it is beyond every number."""
    value = float(torch.tensor(nats, dtype=torch.float64).exp())
    return value if isfinite(value) else None


def summarize(results: TokenResults) -> KlSummary:
    """Every figure over all tokens; the lists of breakdown.py are still missing."""
    kl = results.kl_nats.double()
    same = results.same_top1.double()
    lost = results.logp_reference.double() - results.logp_quantized.double()
    delta = results.logp_quantized.double().exp() - results.logp_reference.double().exp()
    everyone = torch.ones_like(same, dtype=torch.bool)
    of_kl, of_same, of_lost = means([kl, same, lost], [everyone] * 3, results.document)
    documents = len(results.document.unique())
    median, p90, p95, p99, p999 = quantiles(kl, (0.5, 0.9, 0.95, 0.99, 0.999))
    return KlSummary(
        tokens=len(kl),
        documents=documents,
        kl_mean_nats=float(kl.mean()),
        kl_standard_error_nats=cluster_standard_error(kl, results.document),
        kl_low_nats=of_kl.low if of_kl else None,
        kl_high_nats=of_kl.high if of_kl else None,
        kl_median_nats=median,
        kl_p90_nats=p90,
        kl_p95_nats=p95,
        kl_p99_nats=p99,
        kl_p999_nats=p999,
        kl_max_nats=float(kl.max()),
        reverse_kl_mean_nats=float(results.reverse_kl_nats.double().mean()),
        same_top1=float(same.mean()),
        same_top1_low=of_same.low if of_same else None,
        same_top1_high=of_same.high if of_same else None,
        top5_overlap=float(results.top_overlap.double().mean()),
        delta_p_mean=float(delta.mean()),
        delta_p_rms=float(delta.square().mean().sqrt()),
        delta_p_quantiles=dict(zip(DELTA_P, quantiles(delta, [int(n[1:]) / 100 for n in DELTA_P]), strict=True)),
        perplexity_reference=_exponential(-float(results.logp_reference.double().mean())),
        perplexity_quantized=_exponential(-float(results.logp_quantized.double().mean())),
        perplexity_ratio=_exponential(float(lost.mean())),
        perplexity_ratio_low=_exponential(of_lost.low) if of_lost else None,
        perplexity_ratio_high=_exponential(of_lost.high) if of_lost else None,
        interval=IntervalMethod(
            method="BCa bootstrap over documents", level=LEVEL, resamples=RESAMPLES, seed=SEED, documents=documents
        ),
    )


def summarize_groups(results: TokenResults, groups: list[TokenGroup]) -> tuple[Bucket, ...]:
    """Mean KL with its interval, and same top-1, of each group that has tokens."""
    groups = [group for group in groups if group.member.any()]
    kl, same = results.kl_nats.double(), results.same_top1.double()
    found = means([kl] * len(groups), [group.member for group in groups], results.document) if groups else []
    return tuple(
        Bucket(
            label=group.label,
            tokens=int(group.member.sum()),
            documents=len(results.document[group.member].unique()),
            kl_mean_nats=float(kl[group.member].mean()),
            kl_low_nats=interval.low if interval else None,
            kl_high_nats=interval.high if interval else None,
            same_top1=float(same[group.member].mean()),
        )
        for group, interval in zip(groups, found, strict=True)
    )


def by_position(results: TokenResults) -> list[TokenGroup]:
    """By the number of tokens that a prediction sees, in octaves from 16."""
    seen = results.position + 1
    bounds = [1, 16]
    while bounds[-1] <= int(seen.max()):
        bounds.append(2 * bounds[-1])
    return [TokenGroup(f"{low} to {high - 1}", (seen >= low) & (seen < high)) for low, high in pairwise(bounds)]


def by_confidence(results: TokenResults) -> list[TokenGroup]:
    """By the probability of the reference's likeliest token."""
    p = results.top_p_reference[:, 0]
    return [
        TokenGroup(f"{low:g} to {high:g}", (p >= low) & ((p < high) | (high == CONFIDENCE[-1])))
        for low, high in pairwise(CONFIDENCE)
    ]


def by_label(labels: Sequence[str]) -> list[TokenGroup]:
    """One label a token; groups in the order of their names."""
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    index = torch.tensor([number[label] for label in labels])
    return [TokenGroup(name, index == i) for name, i in number.items()]


def histogram(kl_T: torch.Tensor) -> Histogram:
    """Tokens by KL: bounds rise evenly in log10 from 1e-6 nats; the first bin holds everything below."""
    kl = kl_T.double().numpy()
    decades = max(1.0, np.log10(max(float(kl.max()), HISTOGRAM_FROM * 10) / HISTOGRAM_FROM))
    bins = int(np.ceil(decades * BINS_A_DECADE + 1e-9))
    edges = HISTOGRAM_FROM * 10 ** (np.arange(bins + 1) / BINS_A_DECADE)
    edges[-1] = max(edges[-1], float(kl.max()))
    edges = np.concatenate([[0.0], edges])
    counts, _ = np.histogram(kl, edges)
    return Histogram(edges_nats=tuple(float(e) for e in edges), tokens=tuple(int(c) for c in counts))
