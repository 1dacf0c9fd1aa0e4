"""SHA256SUMS: the digest of every file that a run puts into OUT, in the format of coreutils' sha256sum.

`sha256sum -c SHA256SUMS` checks a downloaded folder without this package. The file is written just before config.json,
whose digest is taken from the bytes to come: config.json must stay the last file, so that an unfinished folder cannot
be loaded. SHA256SUMS covers neither itself nor README.md, which people edit on the hub.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..core.errors import InputError, ResourceError, input_error
from ..core.file_names import is_own_name
from . import files

SUMS_NAME = "SHA256SUMS"
# A digest, then a space and '*' (binary) or two spaces (text). Outside Windows the two mean the same.
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
# How sha256sum escapes these characters in a name. Such a line begins with a backslash.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def sha256_file(path: Path) -> str:
    """A file's digest, 64 hexadecimal digits. Raises ResourceError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ResourceError(f"{path} could not be read ({error}): fix that and run the same command again") from error


def read_back_digest(path: Path) -> str:
    """The digest of a file that was just written: as the system holds it in RAM, and as the disk gives it back after
    that was let go, where the system does so. Raises ResourceError when the two differ."""
    held = sha256_file(path)
    files.let_go(path)
    if sha256_file(path) != held:
        raise ResourceError(
            f"{path}: the disk does not give back what was written. It is damaged, or another program writes there. "
            "Mend that, and start anew with --overwrite"
        )
    return held


def sums_text(digests: Mapping[str, str]) -> str:
    """The lines of SHA256SUMS, sorted by name."""
    lines = []
    for name in sorted(digests):
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if escaped == name else chr(92)}{digests[name]}  {escaped}\n")
    return "".join(lines)


def read_sums(path: Path) -> dict[str, str]:
    """Name -> digest. Raises InputError with every line that sha256sum did not write or that leaves the folder."""
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
                problems.append(f"line {number} is not in the format of sha256sum")
            continue
        name = found[3]
        if found[1]:
            name = re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], name)
        if not is_own_name(name):
            problems.append(f"line {number} names {name!r}, which is no file of the folder")
        elif name in digests:
            problems.append(f"line {number} names {name} for the second time")
        digests[name] = found[2]
    if not digests and not problems:
        problems.append("it is empty")
    if problems:
        raise input_error(f"{path} is damaged:", problems, "Fetch it again.")
    return digests


def write_sums(
    folder: Path, names: Iterable[str], unwritten: Mapping[str, bytes], known: Mapping[str, str] | None = None
) -> None:
    """Write SHA256SUMS of the files `names` in `folder`. `unwritten`: the bytes of those that are not written yet;
    `known`: the digests of those that need not be read again."""
    digests = {name: digest for name, digest in (known or {}).items() if name in names}
    for name in set(names) - {SUMS_NAME} - digests.keys():
        given = unwritten.get(name)
        digests[name] = sha256_file(folder / name) if given is None else hashlib.sha256(given).hexdigest()
    files.write_bytes(folder / SUMS_NAME, sums_text(digests).encode())
