"""A record as one self-contained HTML page: verdict first, then every figure with its table.

The page holds plotly's script, so it fetches nothing. A content security policy blocks every request and every script
but the two that are inlined here, whatever the texts of models and data say. The template escapes text (jinja2,
autoescape); charts are data in JSON blocks. The same record gives the same bytes, and nothing is measured here.
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

# Near the head of every page: it tells a report from somebody else's file.
GENERATOR = "onecard report"
# The sections of a full record; a page names those that it lacks.
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
    """The sections that the record has figures for, in the order of the page."""
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
    """What the template puts in: plain text without characters that turn a line round or hide a part of it."""
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
    """Whether the beginning of a file is that of a report, which may be replaced."""
    return f'<meta name="generator" content="{GENERATOR} '.encode() in head


def _inline(script: str) -> str:
    """A script as it stands between its tags. One that could end them early is a bug of ours."""
    assert "</script" not in script.lower()
    assert "<!--" not in script
    return f"\n{script.strip()}\n"


def _digest(script: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
