"""What a model card says in sentences: gate, limits, widths, licence, and which files an export's KL is of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.record.kl import KlSummary
from ..core.record.schema import PlanSummary, Record
from ..core.record.verdict import Verdict
from ..core.scheme import GRIDS
from ..core.units import counted
from .card import few_bits
from .card_tables import code, words
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
# The formats of conversion/export.py as a card calls them.
FORMATS = {
    "compressed-tensors": "compressed-tensors `pack-quantized`",
    "gptq": "that of GPTQ, version 1 (AutoGPTQ's, GPTQModel's)",
    "gptq-v2": "that of GPTQ, version 2 (GPTQModel's)",
    "gguf": "GGUF (llama.cpp's)",
    "bf16": "dense: bf16 weights that stand for the integer codes they were made from",
    "bitsandbytes": "that of bitsandbytes, every expert a matrix of its own",
    "bnb-nf4": "that of bitsandbytes, every expert a matrix of its own",
}
# Below this many documents an interval says little.
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class CardFacts:
    """What a card is drawn from."""

    name: str
    # onecard.json, with what later measurements added.
    record: Record
    # SHA-256 of onecard.json as it lies in the folder.
    record_digest: str
    # Parameters and widths by role, as `onecard inspect` gives them.
    roles: Mapping[str, Any]
    vision: bool
    base_model: str | None
    licence: Licence | None
    # The name of the licence's text in the folder.
    licence_file: str | None

    @property
    def plan(self) -> PlanSummary:
        assert self.record.plan is not None
        return self.record.plan

    @property
    def kl(self) -> KlSummary:
        assert self.record.kl is not None
        return self.record.kl


def stored_as(record: Record) -> str:
    """The format of the files beside a record: what they were exported to, or the recipe's."""
    return record.export.format if record.export else str(record.recipe.get("format", "compressed-tensors"))


def parent_of(record: Record) -> str:
    """The format of the files that an export's KL was measured on; empty if it was measured on these files, as in a run
    whose recipe names the format."""
    export = record.export
    if export is None or export.made_from is None or export.measured:
        return ""
    return export.made_from.get("format", "dense")


def differs_from_parent(record: Record) -> str:
    """How an export differs from the files that its KL was measured on."""
    if stored_as(record) == "bnb-nf4":
        return "NF4 rounds anew, on top of what is measured here: these files are further from the original."
    return "The integer codes are the same in both; scales or products may be rounded otherwise."


def gate_words(gate: Verdict | None, parent: str) -> str:
    """Whether the files, or the `parent` files that they were exported from, pass; empty without a gate."""
    if gate is None:
        return ""
    if gate.passed and parent:
        return (
            f"The {parent} files that they were exported from pass the gate of their recipe (`gate` in `onecard.json`)."
        )
    if gate.passed:
        return "They pass the gate of their recipe (`gate` in `onecard.json`)."
    failed = [f"- {words(f'{check.name}: {check.said}')}" for check in gate.failed]
    return "\n".join([f"**{FAILED_GATE}**", *(["", *failed] if failed else [])])


def limits(facts: CardFacts) -> list[str]:
    """What a reader must know before trusting the figures, a sentence or two each."""
    recipe, kl, fallbacks = facts.record.recipe, facts.kl, facts.record.fallbacks
    found = ["The divergence is measured on the texts named above. It differs on other texts, languages and tasks."]
    if kl.documents < FEW_DOCUMENTS:
        found.append(f"Only {counted(kl.documents, 'document')} were evaluated: the intervals mean little.")
    if recipe["method"] == "rtn":
        found.append("Rounded to nearest, without calibration.")
    elif recipe["method"] in GRIDS:
        found.append("Quantized by bitsandbytes' own functions, without calibration.")
    elif recipe.get("scale_search") and recipe.get("signed_scales"):
        found.append(
            "Some scales are negative. Readers that multiply code and scale are right; kernels that assume positive "
            "scales are not."
        )
    if not recipe["symmetric"]:
        found.append("Asymmetric: transformers drops the zero points of experts when it stacks them, and refuses.")
    if facts.vision:
        found.append("Images were evaluated as one tile each; the vision tower is unchanged.")
    if fallbacks.get("experts_in_all"):
        found.append(
            f"Of {fallbacks['experts_in_all']:,} experts the one with the fewest calibration rows had "
            f"{fallbacks['least_rows_of_an_expert']:,}; {fallbacks['experts_without_rows']:,} had none, "
            f"{fallbacks['experts_starved']:,} fewer than the recipe asks for. Matrices that needed more damping: "
            f"{fallbacks['damping_raised']:,}; that could not be factored: {fallbacks['diagonal_fallbacks']:,}."
        )
    found.append("Whatever the original does wrong, these files do as well.")
    return found


def scheme_words(facts: CardFacts) -> str:
    """Which roles were quantized to which width: a width once, with all roles that have it."""
    by_width: dict[str, list[str]] = {}
    for role, said in facts.roles.items():
        widths = [width for width in few_bits(facts.plan) if width in said["widths"]]
        if widths:
            by_width.setdefault(", ".join(widths), []).append(ROLES.get(role, role))
    return "; ".join(f"{' and '.join(roles)} in {width}" for width, roles in by_width.items())


def mixed_widths(record: Record) -> str:
    """For `bits: fit`: that widths are mixed, and how they were chosen. Empty for other recipes."""
    allocation = record.allocation
    if allocation is None:
        return ""
    widths = len({unit.width for unit in allocation.units})
    return (
        f"Widths are mixed: each of {counted(len(allocation.units), 'unit')} (what an engine fuses) has one of "
        f"{counted(widths, 'width')}, chosen so that the predicted divergence is least within the budget. Predicted: "
        f"{allocation.predicted_kl_nats:.4g} nats a token."
    )


def licence_words(facts: CardFacts) -> str:
    if facts.licence is None:
        return "Not known: ask whoever published the original."
    called = facts.licence.name or facts.licence.id
    where = f" Its text is in {code(facts.licence_file)}." if facts.licence_file else ""
    return f"That of the original: {code(called)}.{where}"
