"""A record's `kl`: how far the quantized model's next-token distributions are from the original's.

Nats per predicted token unless a name says otherwise. `_low` and `_high` are the ends of a 95 % interval over
documents; one document has no interval, and then both are None.
"""

from itertools import pairwise
from typing import Annotated

from pydantic import Field, Strict, model_validator

from .part import Many, RecordPart

# The text of a token and its probability.
Likely = Annotated[tuple[str, float], Strict(False)]


class IntervalMethod(RecordPart):
    """How the intervals were drawn, so that they can be drawn again."""

    method: str
    level: float
    resamples: int | None = None
    seed: int | None = None
    documents: int | None = None


class Histogram(RecordPart):
    """Tokens by their KL: one edge more than bins, rising from 0."""

    edges_nats: Many[float]
    tokens: Many[int]

    @model_validator(mode="after")
    def _sound(self) -> "Histogram":
        edges = self.edges_nats
        if len(edges) != len(self.tokens) + 1 or len(edges) < 3:
            raise ValueError("there must be one edge more than bins, and two bins at least")
        if edges[0] < 0 or edges[1] <= 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError("edges_nats must rise from 0")
        return self


class Bucket(RecordPart):
    """The figures of some of the tokens: those at certain positions, of one kind of text, or of one confidence."""

    label: str
    tokens: int
    documents: int | None = None
    kl_mean_nats: float
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    same_top1: float | None = None


class DocumentKl(RecordPart):
    """The figures of one evaluation document. `digest` pairs it with the same document in another record."""

    document: int | str
    digest: str | None = None
    kind: str | None = None
    source: str | None = None
    tokens: int
    kl_mean_nats: float
    same_top1: float | None = None
    # Mean negative log-likelihood of the text in either model.
    nll_reference: float | None = None
    nll_quantized: float | None = None


class WorstToken(RecordPart):
    """One of the tokens with the largest KL, in its context, and what either model expected there."""

    document: int | str
    kind: str | None = None
    position: int
    kl_nats: float
    before: str = ""
    token: str
    after: str = ""
    p_reference: float | None = None
    p_quantized: float | None = None
    reference_top: Many[Likely] = ()
    quantized_top: Many[Likely] = ()


class Floor(RecordPart):
    """KL(original in float32 || original in `compute_dtype`) on the same texts: what that dtype costs by itself."""

    compute_dtype: str
    kl_mean_nats: float
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    kl_p99_nats: float | None = None
    same_top1: float | None = None
    changed_routes: float | None = None


# The labels of `by_likeness`: texts of kinds that calibration had, and others.
LIKE_CALIBRATION, OTHERS = "texts like calibration", "others"


class KlSummary(RecordPart):
    """All that was measured on evaluation texts. `delta_p`: the true token's probability, quantized minus reference."""

    tokens: int
    documents: int
    kl_mean_nats: float
    kl_standard_error_nats: float | None = None
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    kl_median_nats: float | None = None
    kl_p90_nats: float | None = None
    kl_p95_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_p999_nats: float | None = None
    kl_max_nats: float | None = None
    reverse_kl_mean_nats: float | None = None
    # Share of tokens for which both models hold the same token for the likeliest.
    same_top1: float | None = None
    same_top1_low: float | None = None
    same_top1_high: float | None = None
    top5_overlap: float | None = None
    delta_p_mean: float | None = None
    delta_p_rms: float | None = None
    delta_p_quantiles: dict[str, float] = Field(default_factory=dict)
    perplexity_reference: float | None = None
    perplexity_quantized: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_low: float | None = None
    perplexity_ratio_high: float | None = None
    interval: IntervalMethod | None = None
    histogram: Histogram | None = None
    by_position: Many[Bucket] = ()
    by_confidence: Many[Bucket] = ()
    by_kind: Many[Bucket] = ()
    # LIKE_CALIBRATION and OTHERS; nothing where all texts are of one sort.
    by_likeness: Many[Bucket] = ()
    by_document: Many[DocumentKl] = ()
    worst_tokens: Many[WorstToken] = ()
    # Share of tokens whose set of experts changed, averaged over the layers that route.
    changed_routes: float | None = None
    changed_routes_by_block: dict[str, float] = Field(default_factory=dict)
    # Measured on request.
    floor: Floor | None = None
