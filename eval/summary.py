"""Token results -> the figures that are quoted, with an interval that respects documents.

Tokens of one document are correlated, so the standard error of the mean is taken over documents (the ratio estimator
for clusters: Cochran, Sampling Techniques, 1977, section 9A.1): with S_d the sum and n_d the number of a document's
tokens, m = sum S_d / sum n_d and

    se^2 = D / (D - 1) * sum (S_d - m n_d)^2 / (sum n_d)^2

and the interval is m -+ t se with t the 97.5 % point of Student's distribution with D - 1 degrees of freedom.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit

from .kl import TokenResults


@dataclass(frozen=True)
class KlSummary:
    """Nats per token unless said otherwise. `kl_low_nats`, `kl_high_nats`: 95 % interval of the mean.

    One document has no standard error and no interval: None, which JSON can write, and NaN cannot.
    """

    tokens: int
    documents: int
    kl_mean_nats: float
    kl_standard_error_nats: float | None
    kl_low_nats: float | None
    kl_high_nats: float | None
    kl_median_nats: float
    kl_p90_nats: float
    kl_p99_nats: float
    kl_max_nats: float
    same_top1: float
    perplexity_reference: float
    perplexity_quantized: float


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


def summarize(results: TokenResults) -> KlSummary:
    kl = results.kl_nats.double()
    mean = float(kl.mean())
    error = cluster_standard_error(kl, results.document)
    documents = len(results.document.unique())
    low = high = None
    if error is not None:
        half = float(stdtrit(documents - 1, 0.975)) * error
        low, high = max(0.0, mean - half), mean + half
    p90, p99 = (
        float(torch.quantile(kl, q)) if len(kl) < 2**24 else float(kl.sort().values[int(q * len(kl))])
        for q in (0.9, 0.99)
    )
    return KlSummary(
        tokens=len(kl),
        documents=documents,
        kl_mean_nats=mean,
        kl_standard_error_nats=error,
        kl_low_nats=low,
        kl_high_nats=high,
        kl_median_nats=float(kl.median()),
        kl_p90_nats=p90,
        kl_p99_nats=p99,
        kl_max_nats=float(kl.max()),
        same_top1=float((results.top1_reference == results.top1_quantized).double().mean()),
        perplexity_reference=float(torch.exp(-results.logp_reference.double().mean())),
        perplexity_quantized=float(torch.exp(-results.logp_quantized.double().mean())),
    )
