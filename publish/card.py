"""A model card from a folder's record, later measurements of it, its licence and its headers.

The card goes into the folder as README.md, together with the notice that a Llama licence asks for, unless one is there.
"""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import files
from ..checkpoint.inspect import inspect
from ..checkpoint.side_files import TERMS
from ..checkpoint.source import open_folder
from ..core.errors import InputError, input_error
from ..core.file_names import RECORD_NAME
from ..core.layout import CARD_MARK, CARD_NAME
from ..core.outputs import refuse_unwritable
from ..core.record.reading import UnfinishedError, read_record
from ..core.record.schema import Record
from ..report.licence import NOTICE_LINE, NOTICE_NAME, Licence, has_notice, is_licence_file, licence_of
from ..report.model_card import digest_of, render
from ..report.model_card_words import CardFacts


@dataclass(frozen=True)
class Wishes:
    """What the user adds to the record for a card."""

    # The original's hub id.
    base_model: str | None = None
    # The licence's hub id, and its name if the hub has no id for it.
    licence: str | None = None
    licence_name: str | None = None
    # Later records of the same files.
    records: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A card and what goes with it."""

    text: str
    # What NOTICE must hold; None if there is one, or none is asked for.
    notice: str | None
    licence: Licence | None
    # What contradicts the licence.
    contradictions: list[str]
    record: Record


def terms(folder: Path) -> dict[str, str]:
    """Name -> text of the files that hold licence terms. All of them are published, so links that leave the folder are
    not followed."""
    home = folder.resolve()
    found = {
        path for pattern in TERMS for path in folder.glob(pattern) if path.is_file() and path.resolve().parent == home
    }
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in sorted(found)}


def finished_record(folder: Path) -> Record:
    """onecard.json of a finished, verified run. Raises InputError that says what is missing."""
    if not (folder / RECORD_NAME).is_file():
        raise InputError(f"{folder} has no {RECORD_NAME}: only checkpoints that onecard made have a record to draw on")
    try:
        record = read_record(folder / RECORD_NAME)
        finished = (folder / "config.json").is_file()
    except UnfinishedError:
        finished = False
    if not finished:
        raise InputError(
            f"{folder} is not finished: go on with `onecard quantize` and --resume, or export it again with --overwrite"
        )
    if record.command != "quantize":
        raise InputError(f"{folder / RECORD_NAME} is of `onecard {record.command}`, and must be of quantize")
    if record.kl is None:
        raise InputError(f"{folder} is not verified: its record holds no KL divergence. Quantize it anew")
    return record


def with_evidence(record: Record, folder: Path, records: tuple[Path, ...]) -> Record:
    """The record with what verify or flips found later of the same files and the same original. Raises InputError."""
    problems = []
    for path in records:
        try:
            later = read_record(path)
        except UnfinishedError:
            problems.append(f"{path} is of a run that has not finished")
            continue
        if later.checkpoint is None or later.checkpoint.digest != open_folder(folder).digest:
            problems.append(f"{path} is of other files")
        elif later.model.digest != record.model.digest:
            problems.append(f"{path} is of another original")
        else:
            record = _with_later(record, later)
    if problems:
        raise input_error(f"not all records are of {folder}:", problems, "Measure it again, and name those records.")
    return record


def _with_later(record: Record, later: Record) -> Record:
    found: dict[str, object] = {key: value for key in ("flips", "gate") if (value := getattr(later, key)) is not None}
    if later.kl is not None:
        found |= {"kl": later.kl, "texts": record.texts | {"evaluation": later.texts["evaluation"]}}
        if record.export is not None:  # until now the record had its parent's KL
            found["export"] = record.export.model_copy(update={"measured": True})
    return record.model_copy(update=found)


def draw(checkpoint: str, wishes: Wishes, name: str | None = None) -> Drawn:
    """Draw the card of a finished folder; `name` is what it will be called. Raises InputError."""
    folder = Path(checkpoint)
    record = with_evidence(finished_record(folder), folder, wishes.records)
    if record.plan is None:
        raise InputError(f"the record of {folder} lacks what a card is drawn from (plan): make it anew")
    texts = terms(folder)
    base = wishes.base_model or record.model.hub.id
    found, contradictions = licence_of(wishes.licence, wishes.licence_name, record.model.card, texts, base)
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
    except (KeyError, TypeError) as error:  # a recipe, texts or figures that lack something
        raise InputError(
            f"the record of {folder} lacks what a card is drawn from ({type(error).__name__}: {error}): make it anew"
        ) from error
    # Half a character, of a file's name perhaps, is spelled with a backslash, as in the record.
    text = text.encode(errors="backslashreplace").decode()
    return Drawn(text, f"{NOTICE_LINE}\n" if wanted else None, found, contradictions, record)


def write(drawn: Drawn, folder: Path, out: Path | None = None, overwrite: bool = False) -> list[Path]:
    """README.md and, where one is asked for, NOTICE into `folder`; or the card alone into `out`. Returns what was
    written. Raises InputError rather than replace a card that onecard did not draw."""
    target = out or folder / CARD_NAME
    refuse_unwritable({"the card": target})
    if target.is_file() and not overwrite and CARD_MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise InputError(
            f"{target} was not drawn by onecard: replace it with --overwrite, or name another file with -o"
        )
    files.write_bytes(target, drawn.text.encode())
    if out is not None or drawn.notice is None:
        return [target]
    notice = folder / NOTICE_NAME
    before = notice.read_text(encoding="utf-8") if notice.is_file() else ""
    files.write_bytes(notice, (before + drawn.notice).encode())
    return [target, notice]
