"""A KL's lists: groups of tokens, documents, and the worst tokens in their context.

People read them on the page, and the gate compares two runs document by document.

Shape legend: T tokens.
"""

from collections.abc import Callable, Collection

import torch

from ..core.record.kl import LIKE_CALIBRATION, OTHERS, DocumentKl, KlSummary, WorstToken
from ..core.rows import Row
from .kl import TokenResults
from .summary import by_confidence, by_label, by_position, histogram, summarize_groups

WORST_TOKENS = 20
# Tokens of context shown before and after a worst token, and the most worst tokens of one document.
BEFORE, AFTER, WORST_OF_A_DOCUMENT = 24, 8, 3
SHOWN_OF_TOP = 3
AFTER_AN_IMAGE = "after an image"

Decode = Callable[[list[int]], str]


def kinds(results: TokenResults, rows: list[Row], placeholder: int | None) -> list[str]:
    """For every token the kind of its row, and whether its prediction saw an image."""
    first_image = [
        int((row.tokens == placeholder).nonzero()[0]) if row.pixels is not None and placeholder is not None else None
        for row in rows
    ]
    found = []
    for number, position in zip(results.document.tolist(), results.position.tolist(), strict=True):
        kind, image = rows[number].kind, first_image[number]
        found.append(kind if image is None or position < image else f"{kind}, {AFTER_AN_IMAGE}")
    return found


def likenesses(results: TokenResults, rows: list[Row], calibrated: Collection[str]) -> list[str]:
    """For every token whether calibration had texts of its row's kind. Empty where that is one answer for all, or where
    `calibrated`, the kinds that calibration had, names none."""
    of_row = [LIKE_CALIBRATION if row.kind in calibrated else OTHERS for row in rows]
    found = [of_row[number] for number in results.document.tolist()]
    return found if calibrated and len(set(found)) > 1 else []


def break_down(
    summary: KlSummary,
    results: TokenResults,
    rows: list[Row],
    placeholder: int | None,
    decode: Decode,
    calibrated: Collection[str] = (),
) -> KlSummary:
    """`summary` with its lists: groups of tokens, documents, worst tokens, histogram. `placeholder`: the token id that
    stands for a picture, None for a model without vision. `calibrated`: the kinds of the calibration texts."""
    likeness = likenesses(results, rows, calibrated)
    return summary.model_copy(
        update={
            "histogram": histogram(results.kl_nats),
            "by_position": summarize_groups(results, by_position(results)),
            "by_confidence": summarize_groups(results, by_confidence(results)),
            "by_kind": summarize_groups(results, by_label(kinds(results, rows, placeholder))),
            "by_document": documents(results, rows),
            "worst_tokens": worst_tokens(results, rows, decode),
        }
        | ({"by_likeness": summarize_groups(results, by_label(likeness))} if likeness else {})
    )


def documents(results: TokenResults, rows: list[Row]) -> tuple[DocumentKl, ...]:
    """The figures of every document that has predicted tokens, in the order of the rows."""
    count = len(rows)
    tokens = torch.bincount(results.document, minlength=count)

    def mean(values: torch.Tensor) -> list[float]:
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, results.document, values.double())
        return list((sums / tokens.clamp_min(1)).tolist())

    kl, same = mean(results.kl_nats), mean(results.same_top1)
    reference, quantized = mean(-results.logp_reference), mean(-results.logp_quantized)
    return tuple(
        DocumentKl(
            document=row.document,
            digest=row.digest,
            kind=row.kind,
            source=row.parts[0].source if row.parts else "",
            tokens=int(tokens[n]),
            kl_mean_nats=kl[n],
            same_top1=same[n],
            nll_reference=reference[n],
            nll_quantized=quantized[n],
        )
        for n, row in enumerate(rows)
        if tokens[n]
    )


def worst_tokens(results: TokenResults, rows: list[Row], decode: Decode) -> tuple[WorstToken, ...]:
    """The tokens with the largest KL, worst first, in their context; at most WORST_OF_A_DOCUMENT of one document."""
    found: list[WorstToken] = []
    taken: dict[int, int] = {}
    for index in results.kl_nats.argsort(descending=True, stable=True).tolist():
        number = int(results.document[index])
        if taken.get(number, 0) == WORST_OF_A_DOCUMENT:
            continue
        taken[number] = taken.get(number, 0) + 1
        found.append(_worst_token(results, index, rows[number], decode))
        if len(found) == WORST_TOKENS:
            break
    return tuple(found)


def _worst_token(results: TokenResults, index: int, row: Row, decode: Decode) -> WorstToken:
    """The predicted token number `index` of the results, which is in `row`."""
    ids = row.tokens.tolist()
    target = int(results.position[index]) + 1  # a result stands at the position that the prediction was made from

    def top(ids_TK: torch.Tensor, p_TK: torch.Tensor) -> tuple[tuple[str, float], ...]:
        pairs = zip(ids_TK[index].tolist(), p_TK[index].tolist(), strict=True)
        return tuple((decode([i]), p) for i, p in list(pairs)[:SHOWN_OF_TOP] if i >= 0)

    return WorstToken(
        document=row.document,
        kind=row.kind,
        position=target,
        kl_nats=float(results.kl_nats[index]),
        before=decode(ids[max(0, target - BEFORE) : target]),
        token=decode([ids[target]]),
        after=decode(ids[target + 1 : target + 1 + AFTER]),
        p_reference=float(results.logp_reference[index].exp()),
        p_quantized=float(results.logp_quantized[index].exp()),
        reference_top=top(results.top_reference, results.top_p_reference),
        quantized_top=top(results.top_quantized, results.top_p_quantized),
    )
