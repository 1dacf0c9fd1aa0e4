"""SHA256SUMS: the digest of every file that a run put into OUT, in the format of coreutils' sha256sum.

`sha256sum -c SHA256SUMS` checks a downloaded folder without this package. The file is written before config.json, whose
digest is taken from the bytes that are about to be written: config.json stays the last file, so that a folder which is
not finished cannot be loaded. It does not cover itself, nor README.md, which people edit on the hub.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..core.errors import InputError, ResourceError, input_error
from . import files

SUMS_NAME = "SHA256SUMS"
# A digest, then a blank and '*' (binary) or two blanks (text; the same to sha256sum on this side of Windows).
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
# sha256sum writes a name with these so, and begins the line with a backslash.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def sha256_file(path: Path) -> str:
    """The digest of a file, 64 hexadecimal digits. Raises ResourceError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ResourceError(f"{path} could not be read ({error}): mend that and run the same command again") from error


def sums_text(digests: Mapping[str, str]) -> str:
    """The lines of SHA256SUMS, sorted by name."""
    lines = []
    for name in sorted(digests):
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if escaped == name else chr(92)}{digests[name]}  {escaped}\n")
    return "".join(lines)


def read_sums(path: Path) -> dict[str, str]:
    """Name -> digest. Raises InputError listing every line that is none of sha256sum's or that leaves the folder."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch it again") from None
    digests: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if not found:
            if line:
                problems.append(f"line {number} is no line of sha256sum")
            continue
        name = found[3]
        if found[1]:
            name = re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], name)
        if "/" in name or name in (".", ".."):
            problems.append(f"line {number} names {name!r}, which is no file of the folder")
        elif name in digests:
            problems.append(f"line {number} names {name} for the second time")
        digests[name] = found[2]
    if not digests and not problems:
        problems.append("it is empty")
    if problems:
        raise input_error(f"{path} is damaged:", problems, "Fetch it again.")
    return digests


def write_sums(folder: Path, names: Iterable[str], unwritten: Mapping[str, bytes]) -> None:
    """SHA256SUMS of the files `names` in `folder`. `unwritten` holds the bytes of those that are still to come."""
    digests = {}
    for name in set(names) - {SUMS_NAME}:
        given = unwritten.get(name)
        digests[name] = sha256_file(folder / name) if given is None else hashlib.sha256(given).hexdigest()
    files.write_bytes(folder / SUMS_NAME, sums_text(digests).encode())
