"""Licences of what is published: which one it is, and what Llama 4's asks of whoever passes the weights on.

The words are those of the Llama 4 Community License Agreement (effective 5 April 2025), sections 1.b.i, iii and iv, and
of the Llama 4 Acceptable Use Policy, which is a part of it. Licence id, licence text or base model tell whether it
applies; the architecture does not, since somebody else may have trained it from scratch. This is a check list and no
legal advice.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LLAMA4 = "llama4"
NOTICE_NAME = "NOTICE"
NOTICE_LINE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)
BUILT_WITH = "Built with Llama"
EU_RESTRICTION = (
    "With respect to any multimodal models included in Llama 4, the rights granted under Section 1(a) of the Llama 4 "
    "Community License Agreement are not being granted to you if you are an individual domiciled in, or a company with "
    "a principal place of business in, the European Union. This restriction does not apply to end users of a product "
    "or service that incorporates any such multimodal models."
)
POLICY_URL = "https://www.llama.com/llama4/use-policy"
LICENCE_URL = "https://github.com/meta-llama/llama-models/blob/main/models/llama4/LICENSE"
_LLAMA4_TITLE = re.compile(r"llama\s+4\s+community\s+license\s+agreement", re.IGNORECASE)
# How the texts of common licences begin; any other text is `other`.
_TITLES = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0"),
    "mit": re.compile(r"\s*(The )?MIT License|\s*Copyright[^\n]*\n\s*\n?Permission is hereby granted, free of charge"),
}


@dataclass(frozen=True)
class Licence:
    """What a model card's metadata say: `id` is the hub's (`other` with a name and a link for one that it lacks)."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def is_llama4(self) -> bool:
        return LLAMA4 in (self.id.lower(), (self.name or "").lower())


def is_licence_file(name: str) -> bool:
    return name.lower().startswith(("license", "licence"))


def holds_llama4(texts: Mapping[str, str]) -> bool:
    """Whether a licence file among `texts` (name -> text) is the Llama 4 Community License Agreement."""
    return any(is_licence_file(name) and _LLAMA4_TITLE.search(text) for name, text in texts.items())


def is_llama4_id(base_model: str | None) -> bool:
    return bool(re.match(r"meta-llama/llama-4", base_model or "", re.IGNORECASE))


def licence_of(
    given: str | None,
    given_name: str | None,
    front: Mapping[str, Any],
    texts: Mapping[str, str],
    base_model: str | None,
) -> tuple[Licence | None, list[str]]:
    """(licence, contradictions). The first of these decides: what the user gave (a hub id, or a name for a licence that
    the hub lacks), the source's own metadata, the licence files, the base model. None if none of them says anything."""
    found: Licence | None = None
    files = sorted(name for name in texts if is_licence_file(name))
    if given is not None:
        found = Licence("other", LLAMA4, "LICENSE") if given.lower() == LLAMA4 else Licence(given)
    elif isinstance(front.get("license"), str):
        found = Licence(front["license"], front.get("license_name"), front.get("license_link"))
    elif files:
        found = _by_text(files[0], texts[files[0]])
    # The base model says more than a text that is not recognised.
    if is_llama4_id(base_model) and (found is None or (found.id == "other" and found.name is None)):
        found = Licence("other", LLAMA4, "LICENSE")
    if given_name is not None:
        found = Licence("other", given_name, files[0] if files else None)
    metas = holds_llama4(texts) or is_llama4_id(base_model)
    if found is not None and metas and not found.is_llama4:
        why = "the folder holds the Llama 4 Community License" if holds_llama4(texts) else f"{base_model} is Meta's"
        return found, [f"the licence is said to be {found.name or found.id}, and {why}"]
    return found, []


def _by_text(name: str, text: str) -> Licence:
    if _LLAMA4_TITLE.search(text):
        return Licence("other", LLAMA4, name)
    for licence_id, title in _TITLES.items():
        if title.match(text):
            return Licence(licence_id)
    return Licence("other", link=name)


def has_notice(texts: Mapping[str, str]) -> bool:
    """Whether a notice file holds Meta's line, line breaks forgiven."""
    wanted = " ".join(NOTICE_LINE.split())
    return any(name.lower().startswith("notice") and wanted in " ".join(t.split()) for name, t in texts.items())


def unmet_terms(repo: str, texts: Mapping[str, str], card: str) -> list[str]:
    """What the Llama 4 licence asks for and is missing from the repository's name, the files beside the weights
    (name -> text) or the model card."""
    name, flat = repo.rpartition("/")[2], " ".join(card.replace("\n>", "\n").split())
    checks = {
        f'the name of a model made from Llama must begin with "Llama", and {name} does not (section 1.b.i): name '
        f"it Llama-..., as {repo.rpartition('/')[0] or 'owner'}/Llama-{name}": name.startswith("Llama"),
        "a copy of the licence must go with the weights (section 1.b.i): put Meta's LICENSE into the folder, from "
        f"the original or {LICENCE_URL}": holds_llama4(texts),
        f'a notice file must say "{NOTICE_LINE}" (section 1.b.iii): `onecard card` writes it': has_notice(texts),
        f'"{BUILT_WITH}" must be displayed (section 1.b.i): the model card lacks it': BUILT_WITH in flat,
        "the model card must repeat that no rights are granted in the European Union for multimodal models (Acceptable "
        "Use Policy): it lacks that paragraph": EU_RESTRICTION in flat,
    }
    return [problem for problem, met in checks.items() if not met]
