"""Prepares the texts of a run: from a recipe's sources, or the user's files, to the rows that a model reads.

Calibration and evaluation share no document. When both name the same file or the same split of a data set, one document
in eight is evaluated, chosen by its digest, and the others calibrate. The record says so.
"""

import datetime as dates
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Model
from ..core.errors import InputError, input_error
from ..core.recipe_groups import Texts, TextSource
from ..core.rows import Row
from ..core.units import counted
from ..models.adapter import Adapter, Role
from ..models.known import demo_folder
from ..recipe import Recipe
from .columns import Columns
from .documents import Document, refuse_shared
from .folders import SUFFIXES, WANTED
from .packing import RowLayout, document_heads, document_rows, mixed, pack
from .source import ReadLimit, Source, SourceDocuments
from .sources import read_source, split_by_digest
from .text_facts import (
    Gathered,
    facts_of,
    left_out_warnings,
    reading_notes,
    repeated_calibration,
    repeated_warnings,
    short_share_warnings,
    unfit_warnings,
)
from .tokens import Encoder

# The user's own evaluation texts get a warning when less than this share of their tokens is evaluated.
MOST_IS_UNUSED = 0.1
# Characters that are read for each wanted token. A token of English has about four, of code three: there is text to
# spare.
CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class RunTexts:
    """The token rows of a run."""

    # Empty when the method needs no calibration.
    calibration: list[Row]
    evaluation: list[Row]
    # The record's `texts`.
    facts: dict[str, Any]
    warnings: list[str]
    # Row length -> how many calibration rows of it the run uses. Fewer than there are: `calibration` is a pool.
    wanted: dict[int, int]
    # The documents that gave the evaluation rows.
    documents: tuple[Document, ...] = ()
    # The date that the chat template was told, if it asks for one.
    date: dates.date | None = None

    @property
    def is_pool(self) -> bool:
        """Whether a balancing pass must choose among the calibration rows."""
        return sum(self.wanted.values()) < len(self.calibration)


def calibration_rows(recipe: Recipe, adapter: Adapter) -> int:
    """How many rows a run calibrates on: calibration_rows, or fewer by calibration_rows_per_input."""
    if not recipe.texts.calibration_rows_per_input:
        return recipe.texts.calibration_rows
    sites = [site for block in range(adapter.n_blocks) for site in adapter.sites(block)]
    inputs = max(site.in_features for site in sites if site.role is Role.EXPERT)
    tokens = recipe.texts.calibration_rows_per_input * inputs * adapter.n_experts / adapter.top_k
    wanted = max(tokens, recipe.texts.calibration_least_tokens) / recipe.texts.calibration_row_tokens
    return min(recipe.texts.calibration_rows, math.ceil(wanted))


def layout_of(recipe: Recipe, adapter: Adapter) -> RowLayout:
    """The calibration rows that a recipe asks for."""
    return RowLayout(
        calibration_rows(recipe, adapter),
        recipe.texts.calibration_row_tokens,
        recipe.texts.calibration_long_share,
        recipe.texts.calibration_long_row_tokens,
        recipe.texts.calibration_pool,
    )


def sources_of(texts: Texts, which: str, override: Path | None, folder: Path) -> list[Source]:
    """The sources of `texts`, or the user's own `override`. Relative paths of a recipe start at `folder`."""
    if override is not None:
        return [Source(override.name, override, splits=WANTED[which])]
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
        splits = (item.split,) if "split" in item.model_fields_set else WANTED[which]
        return Source(item.source, path, columns=columns, kind=item.kind, weight=item.weight, splits=splits)
    label = item.source if item.config is None else f"{item.source} {item.config}"
    return Source(label, None, item.source, item.config, item.split, columns, item.kind, item.weight)


def gather(
    recipe: Recipe, sources: Sequence[Source], others: Sequence[Source], encoder: Encoder, evaluated: bool
) -> list[Gathered]:
    """Reads and encodes every source. `others` are the sources of the other set: a place in both is split in two.

    Raises InputError for unusable texts, ResourceError when a data set cannot be fetched.
    """
    places = {source.place for source in others}
    total = sum(source.weight for source in sources)
    found = []
    for source in sources:
        both, share = source.place in places, source.weight / total
        if evaluated:
            limit, seed = _evaluation_limit(recipe, source, share, both), None
        else:
            limit = _calibration_limit(recipe, encoder.adapter, source, share, both)
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


def _longest(recipe: Recipe, source: Source) -> int | None:
    """The characters at which a text of a data set is cut; the user's own files are never cut."""
    return None if source.path else CHARACTERS_PER_TOKEN * recipe.texts.calibration_long_row_tokens


def _evaluation_limit(recipe: Recipe, source: Source, share: float, split: bool) -> ReadLimit:
    """A document gives a row. Of a split source one document in eight is evaluated: half as many again are read, in
    case the digests fall badly."""
    count = math.ceil(recipe.texts.evaluation_rows * share) * (12 if split else 1)
    return ReadLimit(documents=count, longest_characters=_longest(recipe, source))


def _calibration_limit(recipe: Recipe, adapter: Adapter, source: Source, share: float, split: bool) -> ReadLimit:
    """Characters for the source's share of the tokens. Of a split source seven documents in eight calibrate."""
    tokens = layout_of(recipe, adapter).tokens * recipe.texts.calibration_pool * share
    characters = math.ceil(tokens * CHARACTERS_PER_TOKEN * (8 / 7 if split else 1))
    picture = CHARACTERS_PER_TOKEN * adapter.image_token_count() if adapter.has_vision else 0
    return ReadLimit(None, characters, picture, _longest(recipe, source))


def _encoded(
    source: Source, documents: list[Document], read: SourceDocuments, encoder: Encoder, alone: bool
) -> Gathered:
    """The rows of a source's documents. Raises InputError.

    The user's own texts must all be usable. Embedded and public texts serve every model: pictures are left out for a
    model without a vision tower, conversations for one without a chat template.
    """
    left_out, reason = read.left_out, read.reason
    sees, chats, demo = encoder.adapter.has_vision, bool(encoder.tokenizer.chat_template), source.label == "demo"
    fitting = [
        d for d in documents if not (demo or d.borrowed) or ((sees or not d.images) and (chats or d.text is not None))
    ]
    if not fitting and alone:
        encoder.encode_all(documents)  # raises with the reasons
    if not demo and len(fitting) < len(documents):
        left_out += len(documents) - len(fitting)
        reason = reason or "the model has no vision tower or no chat template"
    rows, problems = encoder.encode_usable(fitting)
    reason = reason or next(iter(problems), "")
    return Gathered(source, fitting, rows, left_out + len(problems), reason, read)


def prepare_texts(
    model: Model,
    recipe: Recipe,
    calibration: Path | None,
    evaluation: Path | None,
    needs_calibration: bool,
    date: dates.date | None = None,
) -> RunTexts:
    """Reads, checks and tokenizes both sets of texts. `calibration` and `evaluation` replace the recipe's.

    `date` is what a chat template that asks for it is told; None: the recipe's date, or today.

    Raises InputError for unusable texts and for a document that is in both sets, ResourceError when a data set cannot
    be fetched.
    """
    encoder = Encoder(model.path, model.adapter, date or recipe.texts.template_date)
    ours = sources_of(recipe.texts.calibration, "calibration", calibration, recipe.folder)
    theirs = sources_of(recipe.texts.evaluation, "evaluation", evaluation, recipe.folder)
    evaluated = gather(recipe, theirs, ours, encoder, evaluated=True)
    rows = [row for part in evaluated for row in part.rows]
    row_tokens = recipe.texts.evaluation_row_tokens
    used = document_rows(rows, row_tokens, recipe.texts.evaluation_rows)
    facts = {"evaluation": facts_of(evaluated, used)}
    warnings = left_out_warnings(evaluated, "evaluation") + reading_notes(evaluated, "evaluation")
    if evaluation is not None:
        warnings += _unused_warnings(recipe, evaluation.name, facts["evaluation"])
    heads = document_heads(rows, row_tokens)
    warnings += unfit_warnings(len(rows) - len(heads), row_tokens) + repeated_warnings(heads, used, row_tokens)
    if calibration is not None and not calibration.exists():
        # Refused even where the method needs no calibration: the name is mistyped.
        raise InputError(f"the texts {calibration} do not exist")
    if not needs_calibration:
        return RunTexts([], used, facts, warnings, {}, _documents_of(used, evaluated), encoder.template.date)
    calibrated = gather(recipe, ours, theirs, encoder, evaluated=False)
    refuse_shared([d for part in calibrated for d in part.documents], [d for part in evaluated for d in part.documents])
    _refuse_seen(used, [row for part in calibrated for row in part.rows], row_tokens)
    packed, wanted = packed_rows(recipe, model.adapter, calibrated)
    facts["calibration"] = facts_of(calibrated, packed)
    warnings += left_out_warnings(calibrated, "calibration") + short_share_warnings(calibrated, facts["calibration"])
    warnings += reading_notes(calibrated, "calibration") + repeated_calibration(facts["calibration"])
    both = sorted({source.label for source in ours} & {s.label for s in theirs if s.place in {o.place for o in ours}})
    if both:
        warnings.append(
            f"{', '.join(both)}: named for calibration and evaluation both, so one document in eight, by its digest, "
            "is evaluated and the others calibrate"
        )
    return RunTexts(packed, used, facts, warnings, wanted, _documents_of(used, evaluated), encoder.template.date)


def _refuse_seen(evaluated: list[Row], calibrating: list[Row], row_tokens: int) -> None:
    """Raises InputError for evaluation rows that calibration texts begin with: texts may differ behind the cut."""
    seen = {head.digest: head.document for head in document_heads(calibrating, row_tokens)}
    shared = [
        f"{row.document} begins as {seen[row.digest]} of the calibration texts"
        for row in evaluated
        if row.digest in seen
    ]
    if shared:
        raise input_error(
            f"{counted(len(shared), 'evaluation row')} of {row_tokens:,} tokens stand in the calibration texts, too:",
            shared[:20],
            "Raise evaluation_row_tokens in the recipe, or remove them from one of the two: KL must be measured on "
            "texts that calibration never saw.",
        )


def _documents_of(rows: list[Row], gathered: list[Gathered]) -> tuple[Document, ...]:
    """The documents that gave these rows, one a document."""
    names = {row.document for row in rows}
    return tuple(document for part in gathered for document in part.documents if document.id in names)


def _unused_warnings(recipe: Recipe, name: str, facts: dict[str, Any]) -> list[str]:
    """A warning when the user's own evaluation texts are much longer than what is evaluated of them."""
    kept, given = facts["tokens"], facts["tokens_given"]
    if kept >= MOST_IS_UNUSED * given:
        return []
    return [
        f"only {kept:,} of the {given:,} tokens of {name} are evaluated: a document gives one row of at "
        f"most {recipe.texts.evaluation_row_tokens} tokens, {recipe.texts.evaluation_rows} rows in all. Split long "
        "documents, or raise evaluation_row_tokens or evaluation_rows in the recipe"
    ]


def calibration_documents(
    model: Model, recipe: Recipe, calibration: Path | None, encoder: Encoder
) -> tuple[list[Document], list[str]]:
    """(the calibration documents of a recipe, unpacked, without those that it evaluates on; what is told of the
    reading)."""
    ours = sources_of(recipe.texts.calibration, "calibration", calibration, recipe.folder)
    theirs = sources_of(recipe.texts.evaluation, "evaluation", None, recipe.folder)
    found = gather(recipe, ours, theirs, encoder, evaluated=False)
    told = left_out_warnings(found, "calibration") + reading_notes(found, "calibration")
    return [document for part in found for document in part.documents], told


def packed_rows(recipe: Recipe, adapter: Adapter, gathered: list[Gathered]) -> tuple[list[Row], dict[int, int]]:
    """(packed rows, row length -> how many of them the run uses)."""
    layout, seed = layout_of(recipe, adapter), recipe.texts.calibration_seed
    weights = [part.source.weight for part in gathered]
    chosen = mixed([part.rows for part in gathered], weights, round(layout.tokens * layout.pool), seed)
    rows = pack(chosen, layout, seed)
    short, long = layout.counts(sum(len(row.tokens) for row in chosen))
    have = Counter(len(row.tokens) for row in rows)
    wanted = {layout.row_tokens: short} | ({layout.long_row_tokens: long} if long else {})
    return rows, {length: min(count, have[length]) for length, count in wanted.items() if have[length]}
