"""The texts of a run: a recipe's sources, or the user's files, to the rows that a model reads.

Calibration and evaluation share no document. Where both name the same file or the same split of a data set, one
document in eight, by its digest, is evaluated and the others calibrate; the record says so.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Model
from ..core.errors import InputError
from ..core.rows import Row
from ..models.adapter import Adapter, Role
from ..models.known import demo_folder
from ..recipe import Recipe, Texts, TextSource
from .columns import Columns
from .documents import Document, refuse_shared
from .packing import Layout, distinct, document_rows, mixed, pack
from .sources import SUFFIXES, Found, Limit, Source, read_source, split_by_digest
from .tokens import Encoder

# Own evaluation texts of which less than this is evaluated get a warning.
MOST_IS_UNUSED = 0.1
# A token of English is about four characters and of code three; so much is read for each token that is wanted, that
# packing has a choice and nothing runs out.
CHARACTERS_PER_TOKEN = 6
# A source that gives this much less than its weight's share, or loses this share of its rows, gets a warning.
SHORT_BY = 0.1


@dataclass(frozen=True)
class Gathered:
    """What one source gave: its documents, a row for each that the model can take, and how many it gave up."""

    source: Source
    documents: list[Document]
    rows: list[Row]
    left_out: int
    reason: str


@dataclass(frozen=True)
class RunTexts:
    """Token rows of a run, what the record says of them and what the user should know. `calibration` is empty when the
    method needs none. `wanted` says how many rows of each length are to be used of it, when it is a pool."""

    calibration: list[Row]
    evaluation: list[Row]
    facts: dict[str, Any]
    warnings: list[str]
    wanted: dict[int, int]

    @property
    def is_pool(self) -> bool:
        return sum(self.wanted.values()) < len(self.calibration)


def calibration_rows(recipe: Recipe, adapter: Adapter) -> int:
    """How many rows a run calibrates on, as the recipe limits them by number and by the experts' inputs."""
    if not recipe.texts.calibration_rows_per_input:
        return recipe.texts.calibration_rows
    sites = [site for block in range(adapter.n_blocks) for site in adapter.sites(block)]
    inputs = max(site.in_features for site in sites if site.role is Role.EXPERT)
    tokens = recipe.texts.calibration_rows_per_input * inputs * adapter.n_experts / adapter.top_k
    return min(recipe.texts.calibration_rows, math.ceil(tokens / recipe.texts.calibration_row_tokens))


def layout_of(recipe: Recipe, adapter: Adapter) -> Layout:
    return Layout(
        calibration_rows(recipe, adapter),
        recipe.texts.calibration_row_tokens,
        recipe.texts.calibration_long_share,
        recipe.texts.calibration_long_row_tokens,
        recipe.texts.calibration_pool,
    )


def sources_of(texts: Texts, which: str, override: Path | None, folder: Path) -> list[Source]:
    """`folder`: what paths in the recipe begin at. Raises InputError for what is no file, folder or data set."""
    if override is not None:
        return [Source(override.name, override)]
    return [_source(item, which, folder) for item in texts.mixture or (texts,)]


def _source(item: TextSource, which: str, folder: Path) -> Source:
    if item.source == "demo":
        return Source("demo", demo_folder() / "data" / f"{which}.jsonl", kind=item.kind, weight=item.weight)
    columns = Columns(
        item.column, item.prompt_column, item.response_column, item.role_key, item.content_key, item.image_column
    )
    path = folder / Path(item.source).expanduser()
    named_as_path = item.source.startswith(("/", "./", "../", "~")) or Path(item.source).suffix.lower() in SUFFIXES
    if path.exists() or named_as_path:
        return Source(item.source, path, columns=columns, kind=item.kind, weight=item.weight)
    label = item.source if item.config is None else f"{item.source} {item.config}"
    return Source(label, None, item.source, item.config, item.split, columns, item.kind, item.weight)


def gather(
    recipe: Recipe, sources: Sequence[Source], others: Sequence[Source], encoder: Encoder, evaluated: bool
) -> list[Gathered]:
    """Read and encode every source. Where `others`, of the other side, name the same place, each takes its part."""
    places = {source.place for source in others}
    total = sum(source.weight for source in sources)
    found = []
    for source in sources:
        both = source.place in places
        longest = None if source.path else CHARACTERS_PER_TOKEN * recipe.texts.calibration_long_row_tokens
        share = source.weight / total
        if evaluated:
            # A document a row; where one in eight is taken, half as many again for luck.
            count = math.ceil(recipe.texts.evaluation_rows * share) * (12 if both else 1)
            limit = Limit(documents=count, longest_characters=longest)
            seed = None
        else:
            characters = (
                layout_of(recipe, encoder.adapter).tokens * recipe.texts.calibration_pool * CHARACTERS_PER_TOKEN * share
            )
            picture = CHARACTERS_PER_TOKEN * encoder.adapter.image_token_count() if encoder.adapter.has_vision else 0
            limit = Limit(None, math.ceil(characters * (8 / 7 if both else 1)), picture, longest)
            seed = recipe.texts.calibration_seed
        read = read_source(source, limit, seed)
        documents = split_by_digest(read.documents, evaluated) if both else read.documents
        if not documents:
            raise InputError(
                f"{source.label} serves for calibration and evaluation both, and its {len(read.documents)} documents "
                "are too few to be split: give texts of their own for each"
            )
        found.append(_encoded(source, documents, read, encoder, alone=len(sources) == 1))
    return found


def _encoded(source: Source, documents: list[Document], read: Found, encoder: Encoder, alone: bool) -> Gathered:
    """Rows of the documents that the model can take. The user's own must all be such; the embedded and public texts
    serve any model: pictures only one that can see, conversations only one with a chat template."""
    left_out, reason = read.left_out, read.reason
    if source.lenient or source.label == "demo":
        sees, chats = encoder.adapter.has_vision, bool(encoder.tokenizer.chat_template)
        fitting = [d for d in documents if (sees or not d.images) and (chats or d.text is not None)]
        if not fitting and alone:
            encoder.encode_all(documents)  # says why
        if source.label != "demo" and len(fitting) < len(documents):
            left_out += len(documents) - len(fitting)
            reason = reason or "the model has no vision tower or no chat template"
        documents = fitting
    rows = encoder.encode_all(documents, skip_unusable=source.lenient)
    if len(rows) < len(documents):
        left_out += len(documents) - len(rows)
        reason = reason or "the model cannot take them"
    return Gathered(source, documents, rows, left_out, reason)


def prepare_texts(
    model: Model, recipe: Recipe, calibration: Path | None, evaluation: Path | None, needs_calibration: bool
) -> RunTexts:
    """Read, check and tokenise both sets of texts; refuse a document that is in both."""
    encoder = Encoder(model.path, model.adapter)
    ours = sources_of(recipe.texts.calibration, "calibration", calibration, recipe.folder)
    theirs = sources_of(recipe.texts.evaluation, "evaluation", evaluation, recipe.folder)
    evaluated = gather(recipe, theirs, ours, encoder, evaluated=True)
    rows = [row for part in evaluated for row in part.rows]
    unlike = distinct(rows)
    used = document_rows(unlike, recipe.texts.evaluation_row_tokens, recipe.texts.evaluation_rows)
    facts = {"evaluation": facts_of(evaluated, used)}
    warnings = _left_out(evaluated, "evaluation")
    kept, given = facts["evaluation"]["tokens"], facts["evaluation"]["tokens_given"]
    if evaluation is not None and kept < MOST_IS_UNUSED * given:
        warnings.append(
            f"only {kept:,} of the {given:,} tokens of {evaluation.name} are evaluated: a document gives one row of at "
            f"most {recipe.texts.evaluation_row_tokens} tokens, {recipe.texts.evaluation_rows} rows in all. Split long "
            "documents, or raise evaluation_row_tokens or evaluation_rows in the recipe"
        )
    if len(unlike) < len(rows):
        warnings.append(f"{len(rows) - len(unlike)} of the evaluation texts repeat others and are left out")
    if calibration is not None and not calibration.exists():
        raise InputError(f"the texts {calibration} do not exist")  # a misspelt name is a mistake, needed or not
    if not needs_calibration:
        return RunTexts([], used, facts, warnings, {})
    calibrated = gather(recipe, ours, theirs, encoder, evaluated=False)
    refuse_shared([d for part in calibrated for d in part.documents], [d for part in evaluated for d in part.documents])
    packed, wanted = packed_rows(recipe, model.adapter, calibrated)
    facts["calibration"] = facts_of(calibrated, packed)
    warnings += _left_out(calibrated, "calibration") + _short_shares(calibrated, facts["calibration"])
    both = sorted({source.label for source in ours} & {s.label for s in theirs if s.place in {o.place for o in ours}})
    if both:
        warnings.append(
            f"{', '.join(both)}: named for calibration and evaluation both, so one document in eight, by its digest, "
            "is evaluated and the others calibrate"
        )
    return RunTexts(packed, used, facts, warnings, wanted)


def calibration_documents(model: Model, recipe: Recipe, calibration: Path | None, encoder: Encoder) -> list[Document]:
    """The calibration texts of a recipe, before they are packed; none that it evaluates on."""
    ours = sources_of(recipe.texts.calibration, "calibration", calibration, recipe.folder)
    theirs = sources_of(recipe.texts.evaluation, "evaluation", None, recipe.folder)
    return [d for part in gather(recipe, ours, theirs, encoder, evaluated=False) for d in part.documents]


def packed_rows(recipe: Recipe, adapter: Adapter, gathered: list[Gathered]) -> tuple[list[Row], dict[int, int]]:
    """(rows of the pool, how many rows of each length are wanted of them)."""
    layout, seed = layout_of(recipe, adapter), recipe.texts.calibration_seed
    weights = [part.source.weight for part in gathered]
    chosen = mixed([part.rows for part in gathered], weights, round(layout.tokens * layout.pool), seed)
    rows = pack(chosen, layout, seed)
    short, long = layout.counts(sum(len(row.tokens) for row in chosen))
    have = Counter(len(row.tokens) for row in rows)
    wanted = {layout.row_tokens: short} | ({layout.long_row_tokens: long} if long else {})
    return rows, {length: min(count, have[length]) for length, count in wanted.items() if have[length]}


def facts_of(gathered: list[Gathered], rows: list[Row]) -> dict[str, Any]:
    """What the record says of texts: what was given, and what of it the rows hold."""
    documents = [d for part in gathered for d in part.documents]
    labels = list(dict.fromkeys(part.source.label for part in gathered))
    return {
        "source": ", ".join(labels),
        "digest": _digest(d.digest.encode() for d in documents),
        "documents": len(documents),
        "tokens_given": sum(len(row.tokens) for part in gathered for row in part.rows),
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
            for part in gathered
        ],
    } | row_facts(rows)


def row_facts(rows: list[Row]) -> dict[str, Any]:
    """What the record says of rows as a model reads them."""
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
    """SHA-256 of parts whose bounds count."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()


def _left_out(gathered: list[Gathered], which: str) -> list[str]:
    return [
        f"{part.left_out} {which} rows of {part.source.label} cannot be used and are left out ({part.reason})"
        for part in gathered
        if part.left_out > SHORT_BY * (part.left_out + len(part.rows))
    ]


def _short_shares(gathered: list[Gathered], facts: dict[str, Any]) -> list[str]:
    """Sources of a mixture that were too short for their weight."""
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
