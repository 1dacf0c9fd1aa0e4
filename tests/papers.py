"""The papers of an emitted folder: its record, SHA256SUMS and model card, read, changed on purpose and drawn."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babies import edit_json
from command_line import run_onecard
from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sums_text

CARD_ARGUMENTS = ("--base-model", "somebody/baby", "--license", "apache-2.0")


def record_of(folder: Path) -> dict[str, Any]:
    """The record in a folder's onecard.json."""
    record: dict[str, Any] = json.loads((folder / "onecard.json").read_text())
    return record


def draw_card(folder: Path, *arguments: object) -> str:
    """The README that `card` writes into a folder."""
    result = run_onecard("card", folder, *(arguments or CARD_ARGUMENTS))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return (folder / "README.md").read_text()


def resum(folder: Path) -> None:
    """Makes SHA256SUMS anew over those of its files that exist."""
    names = [name for name in read_sums(folder / SUMS_NAME) if (folder / name).is_file()]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / SUMS_NAME).write_text(sums_text(digests))


def edit_record(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes onecard.json and makes SHA256SUMS anew."""
    edit_json(folder / "onecard.json", change)
    resum(folder)
