"""SHA256SUMS made anew: what somebody does who changes an emitted folder on purpose."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babies import edit_json
from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sums_text


def resum(folder: Path) -> None:
    """SHA256SUMS anew over the files that it names and that are there."""
    names = [name for name in read_sums(folder / SUMS_NAME) if (folder / name).is_file()]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / SUMS_NAME).write_text(sums_text(digests))


def edit_record(folder: Path, change: Callable[[Any], None]) -> None:
    """Change onecard.json, and make SHA256SUMS anew."""
    edit_json(folder / "onecard.json", change)
    resum(folder)
