"""The model card, README.md of a published folder: drawn from the record, with the metadata that the hub reads.

Measured figures carry their intervals and the digest of the texts; what was not measured is said. Names, warnings and
recipes come from users and from other people's files, so whatever is no word of ours is escaped for Markdown. The
words of its sections are in model_card_words.py, its tables in card_tables.py.
"""

import hashlib
import re
from importlib import resources
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.errors import InputError
from ..core.layout import CARD_MARK
from ..core.units import counted, size
from . import licence as licences
from .card import few_bits
from .card_tables import base_name, code, flips, kinds, measured, provenance, words
from .engines import engines
from .model_card_words import (
    FORMATS,
    ROLES,
    CardFacts,
    differs_from_parent,
    gate_words,
    licence_words,
    limits,
    mixed_widths,
    parent_of,
    scheme_words,
    stored_as,
)


def mark(record_digest: str) -> str:
    """The line that says which record a card was drawn from."""
    return f"{CARD_MARK}{record_digest[:16]} -->"


def digest_of(record_bytes: bytes) -> str:
    """The digest of onecard.json, which `mark` names."""
    return hashlib.sha256(record_bytes).hexdigest()


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's front matter, built by huggingface_hub's own classes without network. Raises InputError for ids that
    the hub would refuse."""
    bits = sorted({width.partition(" ")[0] for width in few_bits(facts.plan)})
    more: dict[str, Any] = {}
    if facts.base_model is not None:
        try:
            validate_repo_id(facts.base_model)
            assert facts.base_model.count("/") == 1
        except (HFValidationError, AssertionError):
            raise InputError(
                f"the base model {facts.base_model!r} is no hub id: give --base-model owner/name"
            ) from None
        more = {"base_model": facts.base_model, "base_model_relation": "quantized"}
    if facts.licence is not None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", facts.licence.id):
            raise InputError(
                f"the licence {facts.licence.id!r} is no id of the hub, such as apache-2.0: give --license"
            )
        more |= {"license": facts.licence.id, "license_name": facts.licence.name, "license_link": facts.licence.link}
    tags = [
        "quantized",
        *bits,
        *(f"{word.lstrip('intf')}-bit" for word in bits),
        stored_as(facts.record),
        "moe",
        "onecard",
    ]
    return ModelCardData(
        **more,
        language=facts.record.model.card.get("language"),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if facts.vision else "text-generation",
        tags=tags,
    )


def render(facts: CardFacts) -> str:
    """The whole README.md. Raises InputError when its metadata would not be valid."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: the filters escape
    )
    environment.filters |= {"words": words, "code": code}
    template = environment.from_string(
        (resources.files(__package__) / "model_card.md.jinja").read_text(encoding="utf-8")
    )
    data = metadata(facts)
    text = f"---\n{data.to_yaml()}\n---\n\n{template.render(_context(facts))}"
    read_back = ModelCard(text).data.to_dict()
    assert read_back == data.to_dict(), "the metadata come back as they were"
    return text


def card_problems(text: str) -> list[str]:
    """What a card's metadata lack for the hub, or for a reader who looks for the original and the licence."""
    try:
        data = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [f"the model card's metadata cannot be read ({type(error).__name__})"]
    problems = []
    if not isinstance(data.get("base_model"), str | list):
        problems.append("the model card names no base_model: give --base-model owner/name")
    elif data.get("base_model_relation") != "quantized":
        problems.append("the model card's base_model_relation is not `quantized`")
    if not isinstance(data.get("license"), str):
        problems.append("the model card names no license: give --license")
    elif data["license"] == "other" and not data.get("license_name"):
        problems.append("the model card's license is `other` and has no license_name: give --license-name")
    return problems


def _context(facts: CardFacts) -> dict[str, Any]:
    """The template's words."""
    base = facts.base_model or base_name(facts.record.model.name)
    return {
        "title": facts.name,
        "base": base,
        "base_model": facts.base_model,
        "command_model": code(base).strip("`"),
        "onecard": facts.record.onecard,
        "warnings": facts.record.warnings,
        "mark": mark(facts.record_digest),
        **_of_sizes(facts),
        **_of_measurement(facts),
        **_of_recipe(facts),
        **_of_licence(facts),
    }


def _of_sizes(facts: CardFacts) -> dict[str, Any]:
    record, plan = facts.record, facts.plan
    form = stored_as(record)
    runs_it = engines(record.model.family or "", facts.roles, record.recipe["symmetric"], record.versions, form)
    return {
        "scheme": scheme_words(facts),
        "mixed": mixed_widths(record),
        "emitted": size(plan.emitted_bytes),
        "source": size(plan.source_bytes or 0),
        "bits_per_weight": f"{plan.bits_per_weight:.3f}",
        "quantized_bits": f"{plan.quantized_bits_per_weight:.3f}",
        "quantized_share": f"{plan.quantized_share:.1%}",
        "stored": [
            (ROLES.get(role, role), f"{said['parameters']:,}", ", ".join(said["widths"]))
            for role, said in facts.roles.items()
        ],
        "format": FORMATS.get(form, form),
        "engines": runs_it,
    }


def _of_measurement(facts: CardFacts) -> dict[str, Any]:
    record, kl = facts.record, facts.kl
    texts = record.texts["evaluation"]
    level, note = 0.95, "Intervals treat a document as one draw."
    if kl.interval is not None:
        level = kl.interval.level
        note = f"Intervals: {kl.interval.method}, {kl.interval.documents} documents."
    tasks = record.flips.tasks if record.flips else ()
    parent = parent_of(record)
    return {
        "gate": gate_words(record.gate, parent),
        "evaluation": words(
            f"{', '.join(base_name(s.source) for s in texts.sources)}: {counted(kl.documents, 'document')}, "
            f"{counted(kl.tokens, 'predicted token')}"
        ),
        "measured": measured(kl),
        "parent": parent,
        "parent_differs": differs_from_parent(record),
        "level": f"{level:.0%}",
        "interval_note": note,
        "rows_digest": texts.rows_digest,
        "kinds": kinds(kl),
        "flips": flips(record.flips),
        "flips_digests": ", ".join(f"{code(task.task)} {code(task.digest)}" for task in tasks),
        "limits": limits(facts),
    }


def _of_recipe(facts: CardFacts) -> dict[str, Any]:
    record = facts.record
    fields = {key: value for key, value in record.recipe.items() if key != "digest"}
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return {
        "recipe": text,
        "fence": "`" * max(3, longest + 1),
        "exported": record.export.format if record.export else None,
        "provenance": provenance(record),
    }


def _of_licence(facts: CardFacts) -> dict[str, Any]:
    return {
        "llama4": facts.licence is not None and facts.licence.is_llama4,
        "built_with": licences.BUILT_WITH,
        "notice": licences.NOTICE_LINE,
        "notice_name": licences.NOTICE_NAME,
        "licence_file": facts.licence_file or "LICENSE",
        "policy_url": licences.POLICY_URL,
        "eu_restriction": licences.EU_RESTRICTION,
        "licence_words": licence_words(facts),
    }
