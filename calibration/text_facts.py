"""What the record says of texts and rows, and the warnings about sources that gave too little."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.rows import Row
from ..core.units import counted
from .documents import Document
from .packing import distinct, repeated_share
from .source import Source, SourceDocuments

# Evaluation texts get a warning when more than this share of their scored tokens says nothing new.
MOST_IS_REPEATED = 0.5
# A source gets a warning when this share of its rows is unusable, or when it gives this much less than its weight's
# share of the tokens.
SHORT_BY = 0.1


@dataclass(frozen=True)
class Gathered:
    """What one source gave."""

    source: Source
    documents: list[Document]
    # The documents as the model reads them, uncut.
    rows: list[Row]
    # How many documents cannot be used, and why the first one cannot.
    left_out: int
    reason: str
    read: SourceDocuments


def facts_of(gathered: list[Gathered], rows: list[Row]) -> dict[str, Any]:
    """The record's facts on texts: what the sources gave, and what the rows of the run hold of it."""
    documents, given = [d for part in gathered for d in part.documents], [row for part in gathered for row in part.rows]
    labels = list(dict.fromkeys(part.source.label for part in gathered))
    return {
        "source": ", ".join(labels),
        "digest": _digest(d.digest.encode() for d in documents),
        "documents": len(documents),
        "repeated": len(given) - len(distinct(given)),
        "tokens_given": sum(len(row.tokens) for row in given),
        "sources": [
            {
                "source": part.source.label,
                "kind": part.source.kind,
                "weight": part.source.weight,
                "documents": len(part.documents),
                "left_out": part.left_out,
                "tokens_given": sum(len(row.tokens) for row in part.rows),
                "digest": _digest(d.digest.encode() for d in part.documents),
            }
            | ({"read": part.read.read, "passed_over": part.read.passed_over} if part.read.read else {})
            for part in gathered
        ],
    } | row_facts(rows)


def row_facts(rows: list[Row]) -> dict[str, Any]:
    """The record's facts on rows as a model reads them."""
    kinds: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for part in (part for row in rows for part in row.parts):
        kinds[part.kind] += part.tokens
        sources[part.source] += part.tokens
    lengths = Counter(len(row.tokens) for row in rows)
    return {
        "rows": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "rows_digest": _digest(
            row.tokens.numpy().tobytes() + (b"" if row.pixels is None else row.pixels.numpy().tobytes()) for row in rows
        ),
        "rows_with_images": sum(row.pixels is not None for row in rows),
        "tokens_by_kind": dict(sorted(kinds.items())),
        "tokens_by_source": dict(sorted(sources.items())),
        "longest_row_tokens": max(lengths, default=0),
        "long_rows": lengths[max(lengths)] if len(lengths) > 1 else 0,
    }


def _digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over the parts' own SHA-256, so that moving a boundary changes it."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()


def unfit_warnings(count: int, row_tokens: int) -> list[str]:
    """A warning for evaluation documents that give no row."""
    if not count:
        return []
    return [
        f"{counted(count, 'evaluation text')} of fewer than two tokens, or whose pictures do not fit into "
        f"evaluation_row_tokens ({row_tokens:,}), are left out: raise it in the recipe for those with pictures"
    ]


def left_out_warnings(gathered: list[Gathered], which: str) -> list[str]:
    """A warning for each source that lost many rows. `which`: calibration or evaluation."""
    return [
        f"{part.left_out} {which} rows of {part.source.label} cannot be used and are left out ({part.reason})"
        for part in gathered
        if part.left_out > SHORT_BY * (part.left_out + len(part.rows))
    ]


def reading_notes(gathered: list[Gathered], which: str) -> list[str]:
    """What is said of the reading of each source: the files of a folder, what was passed over, and how rows were
    understood."""
    notes = []
    for part in gathered:
        if part.read.read:
            over = f"; passed over {', '.join(part.read.passed_over)}" if part.read.passed_over else ""
            notes.append(f"of {part.source.label} {which} reads {', '.join(part.read.read)}{over}")
        notes += part.read.notes
    return notes


def repeated_calibration(facts: dict[str, Any]) -> list[str]:
    """A warning about calibration texts that stand there twice: each counts as often as it stands there."""
    if not facts["repeated"]:
        return []
    return [
        f"{facts['repeated']:,} of the {facts['documents']:,} calibration texts repeat others and count again: leave "
        "them out, unless they should weigh more"
    ]


def repeated_warnings(heads: list[Row], used: list[Row], row_tokens: int) -> list[str]:
    """Warnings about evaluation texts that say the same again. `heads`: all documents, cut at `row_tokens`; `used`: the
    rows that are scored."""
    warnings, repeats = [], len(heads) - len(distinct(heads))
    if repeats:
        warnings.append(
            f"{repeats} of the evaluation texts repeat others in their first {row_tokens:,} tokens, which are all that "
            "is scored of a text, and are left out. Raise evaluation_row_tokens if they differ later"
        )
    share = repeated_share(used)
    if share > MOST_IS_REPEATED:
        warnings.append(
            f"{share:.0%} of the scored tokens stand in a beginning that several evaluation texts share, and are "
            "scored again for each of them (a system prompt?): raise evaluation_row_tokens, or give texts without it"
        )
    return warnings


def short_share_warnings(gathered: list[Gathered], facts: dict[str, Any]) -> list[str]:
    """A warning for each source of a mixture that is too short for its weight."""
    total, warnings = sum(part.source.weight for part in gathered), []
    for part in gathered:
        wanted = part.source.weight / total
        share = facts["tokens_by_source"].get(part.source.label, 0) / max(1, facts["tokens"])
        if len(gathered) > 1 and share < (1 - SHORT_BY) * wanted:
            warnings.append(
                f"{part.source.label} gives {share:.0%} of the calibration tokens and its weight asks for {wanted:.0%}"
                ": it holds too little text"
            )
    return warnings
