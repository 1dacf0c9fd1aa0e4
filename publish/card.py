"""What a model card is drawn from: the folder's record, what was measured of it later, its licence and its headers.

The card goes into the folder as README.md, and with it the notice that a Llama licence asks for, unless one is there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..checkpoint.inspect import inspect
from ..checkpoint.source import open_folder
from ..core.errors import InputError, input_error
from ..core.file_names import RECORD_NAME
from ..core.layout import CARD_MARK, CARD_NAME
from ..report.licence import NOTICE_LINE, NOTICE_NAME, Licence, has_notice, is_licence_file, licence_of
from ..report.model_card import CardFacts, digest_of, render
from ..report.reading import check_record

# What may hold terms: read as text, and published beside the weights.
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "notice*", "USE_POLICY*")


@dataclass(frozen=True)
class Wishes:
    """What the user says of a card beside the record: hub ids of the original and of its licence, the licence's name
    when the hub has no id for it, and later records of the same files."""

    base_model: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    records: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A card and what belongs to it. `notice`: what NOTICE must hold, None when there is one or none is asked for.
    `contradictions`: of the licence."""

    text: str
    notice: str | None
    licence: Licence | None
    contradictions: list[str]
    record: dict[str, Any]


def terms(folder: Path) -> dict[str, str]:
    """Name -> text of the files that hold licence terms. A link that leaves the folder is none of it, since all that is
    found is published."""
    home = folder.resolve()
    found = {
        path for pattern in TERMS for path in folder.glob(pattern) if path.is_file() and path.resolve().parent == home
    }
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in sorted(found)}


def read_record(path: Path) -> dict[str, Any]:
    """A record of ours, or the beginnings of one. Raises InputError for other files, damaged records and other schema
    versions."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        begun = record.get("schema_version") is None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise InputError(f"{path} is no record of onecard: name one that quantize, verify or flips wrote") from None
    if not begun:
        check_record(record, str(path))
    return dict(record)


def finished_record(folder: Path) -> dict[str, Any]:
    """onecard.json of a finished, verified run. Raises InputError that says which of these it is not."""
    if not (folder / RECORD_NAME).is_file():
        raise InputError(f"{folder} has no {RECORD_NAME}: only checkpoints that onecard made have a record to draw on")
    record = read_record(folder / RECORD_NAME)
    if record.get("schema_version") is None or not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not finished: go on with `onecard quantize` and --resume, or export it again with --overwrite"
        )
    if record.get("command") != "quantize":
        raise InputError(f"{folder / RECORD_NAME} is of `onecard {record.get('command')}`, and must be of quantize")
    if not isinstance((record.get("kl") or {}).get("kl_mean_nats"), int | float):
        raise InputError(f"{folder} is not verified: its record holds no KL divergence. Quantize it anew")
    return record


def with_evidence(record: dict[str, Any], folder: Path, records: tuple[Path, ...]) -> dict[str, Any]:
    """The record with what verify or flips found later of the same files and the same original."""
    problems = []
    for path in records:
        later = read_record(path)
        if later.get("schema_version") is None:
            problems.append(f"{path} is of a run that has not finished")
            continue
        if (later.get("checkpoint") or {}).get("digest") != open_folder(folder).digest:
            problems.append(f"{path} is of other files")
            continue
        if later["model"].get("digest") != record["model"]["digest"]:
            problems.append(f"{path} is of another original")
            continue
        found = {key: later[key] for key in ("kl", "flips", "gate") if later.get(key)}
        if "kl" in found:
            found["texts"] = record["texts"] | {"evaluation": later["texts"]["evaluation"]}
            if record.get("export"):  # its own record has the parent's KL
                found["export"] = record["export"] | {"measured": True}
        record = record | found
    if problems:
        raise input_error(f"not all records are of {folder}:", problems, "Measure it again, and name those records.")
    return record


def draw(checkpoint: str, wishes: Wishes, name: str | None = None) -> Drawn:
    """Draw the card of a finished folder; `name` is what it will be called. Raises InputError."""
    folder = Path(checkpoint)
    record = with_evidence(finished_record(folder), folder, wishes.records)
    texts = terms(folder)
    base = wishes.base_model or (record["model"].get("hub") or {}).get("id")
    front = record["model"].get("card") or {}
    found, contradictions = licence_of(wishes.licence, wishes.licence_name, front, texts, base)
    headers = inspect(str(folder.absolute()))  # a folder called `demo` is not the embedded model
    facts = CardFacts(
        name=name or folder.resolve().name,
        record=record,
        record_digest=digest_of((folder / RECORD_NAME).read_bytes()),
        roles=headers["roles"],
        vision=headers["vision"],
        base_model=base,
        licence=found,
        licence_file=next((file for file in texts if is_licence_file(file)), None),
    )
    wanted = found is not None and found.is_llama4 and not has_notice(texts)
    try:
        text = render(facts)
    except (KeyError, TypeError, AttributeError) as error:  # of recipe and texts, which a record holds as they come
        raise InputError(
            f"the record of {folder} lacks what a card is drawn from ({type(error).__name__}: {error}): make it anew"
        ) from error
    return Drawn(text, f"{NOTICE_LINE}\n" if wanted else None, found, contradictions, record)


def write(drawn: Drawn, folder: Path, out: Path | None = None, overwrite: bool = False) -> list[Path]:
    """README.md and, where one is asked for, NOTICE into `folder`; or the card alone into `out`. Returns what was
    written. Raises InputError rather than replace a card that onecard did not draw."""
    target = out or folder / CARD_NAME
    if target.is_file() and not overwrite and CARD_MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise InputError(
            f"{target} was not drawn by onecard: replace it with --overwrite, or name another file with -o"
        )
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(f"{target} must be a file in a folder that exists")
    files.write_bytes(target, drawn.text.encode())
    if out is not None or drawn.notice is None:
        return [target]
    notice = folder / NOTICE_NAME
    before = notice.read_text(encoding="utf-8") if notice.is_file() else ""
    files.write_bytes(notice, (before + drawn.notice).encode())
    return [target, notice]
