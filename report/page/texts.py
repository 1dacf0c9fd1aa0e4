"""Sections on texts: the tokens that differ most, in their context, and the documents that do."""

from itertools import cycle

from ...core.record.kl import DocumentKl, WorstToken
from ...core.record.schema import Record
from ...core.units import percent
from ..shown import readable
from . import scatter
from .chart import Spec
from .parts import Figure, Guess, Passage, Section, count, nats, short, table

WORST_DOCUMENTS = 12
# This many of the worst tokens are shown open; the others are folded away.
OPEN_TOKENS = 6
PAINTS = ("accent", "orange", "teal", "violet", "muted")


def tokens_section(record: Record) -> list[Section]:
    found = record.kl.worst_tokens if record.kl else ()
    if not found:
        return []
    passages = tuple(map(_passage, found))
    lede = (
        f"The {len(found)} tokens on which the two models differ most, in their context. Orange: what the text "
        "says. Bars: what each model would have said."
    )
    shown, more = passages[:OPEN_TOKENS], passages[OPEN_TOKENS:]
    return [Section("tokens", "The worst tokens", lede, passages=shown, more_passages=more)]


def _passage(token: WorstToken) -> Passage:
    facts = [f"document {token.document}", *([token.kind] if token.kind else []), f"position {count(token.position)}"]
    if token.p_reference is not None and token.p_quantized is not None:
        facts.append(f"its probability: {percent(token.p_reference)} to {percent(token.p_quantized)}")
    reference, quantized = (
        tuple(Guess(visible(word), p, word == token.token) for word, p in top)
        for top in (token.reference_top, token.quantized_top)
    )
    return Passage(
        heading=f"{nats(token.kl_nats)} nats",
        facts=readable(", ".join(facts)),
        before=readable(token.before),
        token=visible(token.token),
        after=readable(token.after),
        reference=reference,
        quantized=quantized,
    )


def visible(text: str) -> str:
    """A token's text; where it is white space alone, with marks for it."""
    plain = readable(text)
    return plain if plain.strip() else plain.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def documents_section(record: Record) -> list[Section]:
    documents = record.kl.by_document if record.kl else ()
    if not documents:
        return []
    worst = sorted(documents, key=lambda d: -d.kl_mean_nats)
    columns = (
        "document",
        ">mean KL",
        ">same top-1",
        ">tokens",
        "kind",
        ">nats, original",
        ">nats, quantized",
        "source",
        "digest",
    )
    rows = [
        (
            d.document,
            nats(d.kl_mean_nats),
            percent(d.same_top1),
            f"{d.tokens:,}",
            d.kind,
            nats(d.nll_reference),
            nats(d.nll_quantized),
            d.source,
            short(d.digest),
        )
        for d in worst
    ]
    lede = (
        f"{len(documents):,} documents. The worst has a mean KL of {nats(worst[0].kl_mean_nats)} nats, the best "
        f"{nats(worst[-1].kl_mean_nats)}."
    )
    top = table("The worst documents", columns[:-2], [row[:-2] for row in rows[:WORST_DOCUMENTS]])
    every = table("Every document, the worst first", columns, rows)
    hard = [d for d in documents if d.nll_reference is not None and d.kl_mean_nats > 0]
    if not hard:
        return [Section("documents", "The worst documents", lede, tables=(top,), folded=(every,))]
    figure = Figure("Every document", _cloud(hard), (every,))
    return [Section("documents", "The worst documents", lede, (figure,), (top,))]


def _cloud(documents: list[DocumentKl]) -> Spec:
    """KL against how hard the text is, a colour for each kind."""
    kinds = list(dict.fromkeys(d.kind or "text" for d in documents))
    series = [
        (
            kind,
            paint,
            [
                (d.nll_reference or 0.0, d.kl_mean_nats, f"document {d.document}: {nats(d.kl_mean_nats)}")
                for d in documents
                if (d.kind or "text") == kind
            ],
        )
        for kind, paint in zip(kinds, cycle(PAINTS), strict=False)
    ]
    return scatter.cloud(series, "how hard the text is: nats a token of the original", "mean KL, nats a token")
