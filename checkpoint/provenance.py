"""Where a source comes from: its hub id and revision from its folder, and the licence from its README.

Only a few keys of the README's front matter are taken, and only plain words. The rest is the publisher's own text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

# Keys of a source's front matter that the model card of a quantized copy repeats.
CARRIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Looser than the hub's own rule for ids; it only keeps control characters and long texts out.
_WORD = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty if there is none or it cannot be read."""
    found = _FRONT.match(text)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return dict(values) if isinstance(values, dict) else {}


def source_card(folder: Path) -> dict[str, Any]:
    """The CARRIED_KEYS of a source's README whose values are words or lists of words."""
    try:
        values = front_matter((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and _WORD.fullmatch(value) is not None

    return {
        key: values[key]
        for key in CARRIED_KEYS
        if is_word(values.get(key)) or (isinstance(values.get(key), list) and all(map(is_word, values[key])))
    }


def hub_origin(folder: Path) -> dict[str, str]:
    """{"id", "revision"} of a folder in the hub's cache (models--owner--name/snapshots/revision); otherwise empty."""
    resolved = folder.resolve()
    home, kind = resolved.parent.parent.name, resolved.parent.name
    if kind != "snapshots" or not home.startswith("models--"):
        return {}
    return {"id": home.removeprefix("models--").replace("--", "/"), "revision": resolved.name}
