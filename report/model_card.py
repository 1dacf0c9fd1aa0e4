"""The model card, README.md of a published folder: drawn from the record, with the metadata that the hub reads.

Measured figures carry their intervals and the digest of the texts; what was not measured is said. Names, warnings and
recipes come from users and from other people's files, so whatever is no word of ours is escaped for Markdown. The
metadata are built and read back by huggingface_hub's own classes, without network.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.errors import InputError
from ..core.layout import CARD_MARK
from ..core.scheme import GRIDS
from ..core.units import counted, size
from . import licence as licences
from .card import few_bits
from .card_tables import base_name, code, flips, kinds, measured, provenance, words
from .engines import engines
from .licence import Licence

FAILED_GATE = "These files did NOT pass the gate of their recipe, and were published all the same."
ROLES = {
    "expert": "routed experts",
    "shared_expert": "shared expert",
    "mlp": "dense MLPs",
    "attention": "attention",
    "router": "routers",
    "embedding": "embeddings",
    "head": "head",
    "norm": "norms",
    "vision": "vision tower and projector",
}


# What a format of export.py is called on a card.
FORMATS = {
    "compressed-tensors": "compressed-tensors `pack-quantized`",
    "gptq": "that of GPTQ, version 1 (AutoGPTQ's, GPTQModel's)",
    "gptq-v2": "that of GPTQ, version 2 (GPTQModel's)",
    "gguf": "GGUF (llama.cpp's)",
    "bf16": "dense: bf16 weights that stand for the integer codes they were made from",
    "bitsandbytes": "that of bitsandbytes, every expert a matrix of its own",
    "bnb-nf4": "that of bitsandbytes, every expert a matrix of its own",
}


def stored_as(record: dict[str, Any]) -> str:
    """The format of the files that a record lies beside: what they were exported to, or the recipe's."""
    return str((record.get("export") or {}).get("format") or record["recipe"].get("format", "compressed-tensors"))


@dataclass(frozen=True)
class CardFacts:
    """What a card is drawn from. `record`: onecard.json, with what later measurements added. `record_digest`: SHA-256
    of onecard.json as it lies there. `roles`, `vision`: of inspection.py. `licence_file`: its name in the folder."""

    name: str
    record: dict[str, Any]
    record_digest: str
    roles: Mapping[str, Any]
    vision: bool
    base_model: str | None
    licence: Licence | None
    licence_file: str | None


def parent_of(record: dict[str, Any]) -> str:
    """The format of the files that an export's KL was measured on; empty if it was measured on these files, as that of
    a run whose recipe names the format is."""
    export = record.get("export") or {}
    return "" if "from" not in export or export.get("measured") else str(export["from"].get("format", "dense"))


def _parent_differs(record: dict[str, Any]) -> str:
    if stored_as(record) == "bnb-nf4":
        return "NF4 rounds anew, on top of what is measured here: these files are further from the original."
    return "The integer codes are the same in both; scales or products may be rounded otherwise."


def mark(record_digest: str) -> str:
    """The line that says which record a card was drawn from."""
    return f"{CARD_MARK}{record_digest[:16]} -->"


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's front matter. Raises InputError for ids that the hub would not take."""
    front = facts.record["model"].get("card") or {}
    bits = sorted({width.partition(" ")[0] for width in few_bits(facts.record["plan"])})
    vision = facts.vision
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
        language=front.get("language"),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if vision else "text-generation",
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
    """What the hub, or a reader who looks for the original and the licence, would miss in a card's metadata."""
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


def _gate(gate: dict[str, Any], parent: str) -> str:
    if not gate:
        return ""
    if gate.get("passed") and parent:
        return (
            f"The {parent} files that they were exported from pass the gate of their recipe (`gate` in `onecard.json`)."
        )
    if gate.get("passed"):
        return "They pass the gate of their recipe (`gate` in `onecard.json`)."
    failed = [words(f"{c.get('name')}: {c.get('said')}") for c in gate.get("checks") or [] if not c.get("passed")]
    return "\n".join([f"**{FAILED_GATE}**", *(["", *(f"- {what}" for what in failed)] if failed else [])])


def _limits(facts: CardFacts) -> list[str]:
    record, recipe = facts.record, facts.record["recipe"]
    kl, fallbacks = record["kl"], record.get("fallbacks") or {}
    limits = ["The divergence is measured on the texts named above. On other texts, languages and tasks it is another."]
    if kl.get("documents", 0) < 20:
        limits.append(f"Only {counted(kl.get('documents', 0), 'document')} were evaluated: the intervals mean little.")
    if recipe["method"] == "rtn":
        limits.append("Rounded to nearest, without calibration.")
    elif recipe["method"] in GRIDS:
        limits.append("Quantized by bitsandbytes' own functions, without calibration.")
    elif recipe.get("scale_search") and recipe.get("signed_scales"):
        limits.append(
            "Some scales are negative. Readers that multiply code and scale are right; kernels that take the sign of a "
            "scale for granted are not."
        )
    if not recipe["symmetric"]:
        limits.append("Asymmetric: transformers drops the zero points of experts when it stacks them, and refuses.")
    if facts.vision:
        limits.append("Images went in as one tile each; the vision tower is as it was.")
    if fallbacks.get("experts_in_all"):
        limits.append(
            f"Of {fallbacks['experts_in_all']:,} experts the one with the fewest calibration rows had "
            f"{fallbacks['least_rows_of_an_expert']:,}; {fallbacks['experts_without_rows']:,} had none, "
            f"{fallbacks['experts_starved']:,} fewer than the recipe asks for. Matrices that needed more damping: "
            f"{fallbacks['damping_raised']:,}; that could not be factored: {fallbacks['diagonal_fallbacks']:,}."
        )
    limits.append("Whatever the original does wrong, these files do as well.")
    return limits


def _scheme(facts: CardFacts) -> str:
    """Roles by the widths that they were quantized to: a width once, with all that has it."""
    by_width: dict[str, list[str]] = {}
    for role, said in facts.roles.items():
        widths = [width for width in few_bits(facts.record["plan"]) if width in said["widths"]]
        if widths:
            by_width.setdefault(", ".join(widths), []).append(ROLES.get(role, role))
    return "; ".join(f"{' and '.join(roles)} in {width}" for width, roles in by_width.items())


def _mixed(facts: CardFacts) -> str:
    """Of `bits: fit`: that there is no one scheme, and by what the widths were chosen."""
    allocation = facts.record.get("allocation") or {}
    if not allocation:
        return ""
    widths = len({unit["width"] for unit in allocation["units"]})
    return (
        f"Widths are mixed: each of {counted(len(allocation['units']), 'unit')} (what an engine fuses) has one of "
        f"{counted(widths, 'width')}, chosen so that the predicted divergence is least within the budget. Predicted: "
        f"{allocation['predicted_kl_nats']:.4g} nats a token."
    )


def _licence_words(facts: CardFacts) -> str:
    if facts.licence is None:
        return "Not known: ask whoever published the original."
    called = facts.licence.name or facts.licence.id
    where = f" Its text is in {code(facts.licence_file)}." if facts.licence_file else ""
    return f"That of the original: {code(called)}.{where}"


def _context(facts: CardFacts) -> dict[str, Any]:
    """The template's words."""
    record, plan, kl = facts.record, facts.record["plan"], facts.record["kl"]
    recipe_yaml = yaml.safe_dump(
        {key: value for key, value in record["recipe"].items() if key != "digest"}, sort_keys=False, allow_unicode=True
    )
    longest = max((len(run) for run in re.findall(r"`+", recipe_yaml)), default=0)
    texts, interval = record["texts"]["evaluation"], kl.get("interval") or {}
    level = f"{interval.get('level', 0.95):.0%}"
    base = facts.base_model or base_name(record["model"]["name"])
    note = (
        f"Intervals: {interval['method']}, {interval['documents']} documents."
        if interval
        else ("Intervals treat a document as one draw.")
    )
    return {
        "title": facts.name,
        "llama4": facts.licence is not None and facts.licence.is_llama4,
        "built_with": licences.BUILT_WITH,
        "base": base,
        "base_model": facts.base_model,
        "scheme": _scheme(facts),
        "mixed": _mixed(facts),
        "onecard": record["onecard"],
        "emitted": size(plan["emitted_bytes"]),
        "source": size(plan["source_bytes"]),
        "bits_per_weight": f"{plan['bits_per_weight']:.3f}",
        "quantized_bits": f"{plan['quantized_bits_per_weight']:.3f}",
        "quantized_share": f"{plan['quantized_share']:.1%}",
        "gate": _gate(record.get("gate") or {}, parent_of(record)),
        "evaluation": words(
            f"{', '.join(base_name(s['source']) for s in texts['sources'])}: {counted(kl['documents'], 'document')}, "
            f"{counted(kl['tokens'], 'predicted token')}"
        ),
        "measured": measured(kl),
        "parent": parent_of(record),
        "parent_differs": _parent_differs(record),
        "exported": (record.get("export") or {}).get("format"),
        "level": level,
        "interval_note": note,
        "rows_digest": texts["rows_digest"],
        "kinds": kinds(kl),
        "flips": flips(record.get("flips") or {}),
        "flips_digests": ", ".join(
            f"{code(s['task'])} {code(s['digest'])}" for s in (record.get("flips") or {}).get("tasks", [])
        ),
        "stored": [
            (ROLES.get(role, role), f"{said['parameters']:,}", ", ".join(said["widths"]))
            for role, said in facts.roles.items()
        ],
        "format": FORMATS.get(stored_as(record), stored_as(record)),
        "engines": engines(
            record["model"]["family"], facts.roles, record["recipe"]["symmetric"], record["versions"], stored_as(record)
        ),
        "command_model": code(base).strip("`"),
        "provenance": provenance(record),
        "fence": "`" * max(3, longest + 1),
        "recipe": recipe_yaml,
        "limits": _limits(facts),
        "warnings": record["warnings"],
        "notice": licences.NOTICE_LINE,
        "notice_name": licences.NOTICE_NAME,
        "licence_file": facts.licence_file or "LICENSE",
        "policy_url": licences.POLICY_URL,
        "eu_restriction": licences.EU_RESTRICTION,
        "licence_words": _licence_words(facts),
        "mark": mark(facts.record_digest),
    }


def digest_of(record_bytes: bytes) -> str:
    """What `mark` names."""
    return hashlib.sha256(record_bytes).hexdigest()
