"""A record as one self-contained HTML page: verdict first, then every figure with its table.

plotly's script lies in the page, so nothing is fetched; a content security policy lets no request leave it and no
other script run than the two that are inlined here, whatever a text of a model or of data says. Text is escaped by the
template (jinja2, autoescape); charts are data in JSON blocks. The same record gives the same bytes; nothing is
measured here.
"""

import base64
import hashlib
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..core.record.schema import Record
from .page.allocation import allocation_section
from .page.answers import flips_section
from .page.experts import coverage_section, errors_sections
from .page.fit import fit_section
from .page.headline import headline, width
from .page.parts import Section, plain
from .page.provenance import gate_section, provenance_section
from .page.quality import kl_sections
from .page.texts import documents_section, tokens_section
from .page.weights import bytes_section, widths_section

# Near the head of every page: what tells a report from a file of somebody else's.
GENERATOR = "onecard report"
# What a full record has, by section; a page says which of them it lacks.
SECTIONS = {
    "gate": "a gate",
    "bytes": "bytes",
    "kl": "KL",
    "position": "KL by position",
    "kind": "KL by kind",
    "confidence": "KL by confidence",
    "coverage": "calibration rows of experts",
    "origin": "errors of blocks",
    "experts": "errors of experts",
    "tokens": "worst tokens",
    "documents": "documents",
    "flips": "flips",
    "widths": "widths",
}


def sections(record: Record) -> list[Section]:
    """What the record has something to say on, in the order of the page."""
    found = [
        *gate_section(record),
        *bytes_section(record),
        *fit_section(record),
        *allocation_section(record),
        *kl_sections(record),
        *coverage_section(record),
        *errors_sections(record),
        *tokens_section(record),
        *documents_section(record),
        *flips_section(record),
        *widths_section(record),
    ]
    have = {section.key for section in found}
    absent = [words for key, words in SECTIONS.items() if key not in have]
    return [*found, provenance_section(record, absent)]


def render(record: Record) -> str:
    """The whole page."""
    folder = resources.files(f"{__package__}.page")
    style, script, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.j2")
    )
    scripts = [_inline(get_plotlyjs()), _inline(script)]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(template).render(
        generator=f"{GENERATOR} {record.onecard}",
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'; script-src " + " ".join(f"'sha256-{_digest(text)}'" for text in scripts),
        style=Markup(style),
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
        record=record,
        width=width(record),
        headline=headline(record),
        sections=sections(record),
    )


def _shown(value: Any) -> Any:
    """What the template puts in: of plain texts, no character that turns a line round or hides a part of it."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def facts(record: Record, page: str) -> dict[str, Any]:
    """What the JSON line says of a page."""
    made = sections(record)
    return {
        "bytes": len(page.encode()),
        "sections": [section.key for section in made],
        "figures": sum(len(section.figures) for section in made),
    }


def is_report(head: bytes) -> bool:
    """Whether a file that begins so was made here, and may be replaced."""
    return f'<meta name="generator" content="{GENERATOR} '.encode() in head


def _inline(script: str) -> str:
    """A script as it stands between its tags; one that could end them early would be a fault of the package."""
    assert "</script" not in script.lower()
    assert "<!--" not in script
    return f"\n{script.strip()}\n"


def _digest(script: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
