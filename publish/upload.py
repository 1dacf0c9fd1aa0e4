"""Publishing a finished folder on the hub: what is refused, what is sent, and a transfer that can be resumed.

Everything is decided before a byte is sent, and all refusals are listed at once. Shards are uploaded one by one without
a commit, and what the hub holds already is not sent again. One commit then shows all files together, so nobody can
download half a checkpoint or a mixture of two. Only the files that the record names are sent, with the card and the
licence terms. huggingface_hub handles the token; this file neither asks for it nor keeps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..checkpoint.checksums import SUMS_NAME, read_sums
from ..checkpoint.provenance import front_matter
from ..core.errors import InputError, OnecardError, ResourceError, input_error
from ..core.file_names import RECORD_NAME
from ..core.layout import CARD_MARK, CARD_NAME
from ..core.rows import Step
from ..report.licence import Licence, holds_llama4, is_llama4_id, unmet_terms
from ..report.model_card import card_problems, digest_of, mark
from ..report.model_card_words import FAILED_GATE, parent_of
from .card import Drawn, Wishes, draw, finished_record, terms, write
from .check import check

WEIGHTS = ".safetensors"


@dataclass
class Publication:
    """What would be sent to `repo`."""

    folder: Path
    repo: str
    # Name -> bytes.
    files: dict[str, int] = field(default_factory=dict)
    # The card, if it is still to be written.
    drawn: Drawn | None = None
    # Why nothing will be sent.
    refused: list[str] = field(default_factory=list)
    # What would have been refused without --force.
    forced: list[str] = field(default_factory=list)
    # Names of files in the folder that are not sent.
    left: list[str] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": str(self.folder),
            "repo": self.repo,
            "files": self.files,
            "bytes": sum(self.files.values()),
            "card": "to be written" if self.drawn else "there" if CARD_NAME in self.files else "not looked at",
            "refused": self.refused,
            "forced": self.forced,
            "not_sent": self.left,
        }

    def refuse(self) -> None:
        """Raises InputError with every reason not to publish."""
        if self.refused:
            raise input_error(
                f"{self.folder} is not published as {self.repo}:",
                self.refused,
                "Mend these and run the same command again; --dry-run shows what is left.",
            )


def prepare(checkpoint: str, repo: str, wishes: Wishes, force: bool = False, step: Step | None = None) -> Publication:
    """Check everything, without network and without writing. Raises InputError if there is no such folder."""
    folder = Path(checkpoint)
    found = Publication(folder, repo)
    if not folder.is_dir():
        raise InputError(f"{checkpoint} is no folder: name a checkpoint that lies on this machine")
    try:
        validate_repo_id(repo)
        assert repo.count("/") == 1
    except (HFValidationError, AssertionError):
        found.refused.append(f"{repo!r} is no id of a repository: name it as owner/name")
    try:
        finished_record(folder)
    except InputError as error:
        found.refused.append(str(error))
        return found
    checked = check(checkpoint, step)
    found.refused += checked.problems
    found.refused += [f"not checked: {what}" for what in checked.unchecked]
    if checked.sound and not checked.unchecked:
        _card(found, wishes, force)
        _files(found)
    return found


def _card(found: Publication, wishes: Wishes, force: bool) -> None:
    """Check the card that is there, or draw one; then the gate and the terms of the licence."""
    path, digest = found.folder / CARD_NAME, digest_of((found.folder / RECORD_NAME).read_bytes())
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    try:
        drawn = draw(str(found.folder), wishes, found.repo.rpartition("/")[2])
    except InputError as error:
        found.refused.append(str(error))
        return
    given = wishes != Wishes()
    if before is None or (CARD_MARK in before and given):
        found.drawn, text = drawn, drawn.text
    else:
        text = before
        if CARD_MARK in before and mark(digest) not in before:
            found.refused.append(f"{CARD_NAME} was drawn from another record: draw it anew with `onecard card`")
        elif given:
            found.refused.append(f"{CARD_NAME} was not drawn by onecard: write into it what the options say")
    found.refused += drawn.contradictions + card_problems(text)
    if parent_of(drawn.record):
        found.refused.append(
            f"its KL was measured on the {parent_of(drawn.record)} files that it was exported from: measure these with "
            "`onecard verify ORIGINAL FOLDER --record verify.json`, and add --record verify.json"
        )
    gate = drawn.record.gate
    if (gate is not None and not gate.passed) or FAILED_GATE in text:
        failed = "its gate failed: the record says which limits"
        found.forced += [failed] if force else []
        found.refused += [] if force else [f"{failed}; --force publishes it, and the card says so"]
        if force and FAILED_GATE not in text:
            found.refused.append(f'{CARD_NAME} must say: "{FAILED_GATE}"')
    texts = terms(found.folder)
    front = front_matter(text)
    said = Licence(str(front.get("license")), str(front.get("license_name")))
    names = front.get("base_model")
    bases = names if isinstance(names, list) else [names]
    metas = said.is_llama4 or holds_llama4(texts) or any(is_llama4_id(str(name)) for name in bases)
    if metas or (drawn.licence is not None and drawn.licence.is_llama4):
        if found.drawn is not None and found.drawn.notice is not None:
            texts["NOTICE"] = texts.get("NOTICE", "") + found.drawn.notice
        found.refused += unmet_terms(found.repo, texts, text)


def _files(found: Publication) -> None:
    """What is sent: the files of the run, the card, the licence terms."""
    names = {*read_sums(found.folder / SUMS_NAME), SUMS_NAME, *terms(found.folder)}
    sizes = {name: (found.folder / name).stat().st_size for name in names}
    if (found.folder / CARD_NAME).is_file():
        sizes[CARD_NAME] = (found.folder / CARD_NAME).stat().st_size
    if found.drawn is not None:
        sizes[CARD_NAME] = len(found.drawn.text.encode())
        if found.drawn.notice is not None:
            sizes["NOTICE"] = sizes.get("NOTICE", 0) + len(found.drawn.notice.encode())
    found.files = dict(sorted(sizes.items()))
    sent = {name.partition("/")[0] for name in sizes}
    found.left = sorted(path.name for path in found.folder.iterdir() if path.name not in sent)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Errors of the hub and the network become one message, without addresses, which may hold a signature."""
    again = "Run the same command again: what has been sent is not sent twice"
    try:
        yield
    except OnecardError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise InputError(
                f"the hub does not let this token write to {repo} (status {status}): log in with `hf auth login` and a "
                "token that may write there"
            ) from None
        raise ResourceError(f"the hub answered with status {status} while {repo} was sent. {again}") from None
    except ValueError as error:  # the hub's own words on a card's metadata
        raise InputError(f"the hub refuses what was sent to {repo}: {_without_token(str(error))}") from None
    except Exception as error:  # the HTTP library and the uploader raise kinds of their own
        cause = error.__cause__
        what = f"status {cause.response.status_code}" if isinstance(cause, HfHubHTTPError) else type(error).__name__
        raise ResourceError(f"{repo} could not be sent ({what}). {again}") from None


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text


def send(found: Publication, private: bool, step: Step) -> dict[str, Any]:
    """Write the card if it is still to be written, and send everything. Returns the address and the commit.

    Raises InputError when the repository cannot be written to or holds other weights, ResourceError for the network.
    """
    found.refuse()
    if get_token() is None:
        raise InputError("there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
    if found.drawn is not None:
        write(found.drawn, found.folder)
    sums = read_sums(found.folder / SUMS_NAME)
    api = HfApi(library_name="onecard", library_version=__version__)
    with _hub_errors(found.repo):
        step.begin("ask for the repository")
        api.create_repo(found.repo, private=private or None, exist_ok=True)
        remote = {item.path: item for item in api.list_repo_tree(found.repo, recursive=True) if hasattr(item, "size")}
        old = {name for name in remote if name.endswith(WEIGHTS)}
        if old and RECORD_NAME not in remote:
            raise InputError(f"{found.repo} holds weights that onecard did not put there: name another repository")
        additions = []
        for name in found.files:
            blob = getattr(remote.get(name), "lfs", None)
            if blob is not None and blob.sha256 == sums.get(name):
                continue
            addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(found.folder / name))
            additions.append(addition)
            if name.endswith(WEIGHTS):
                step.begin(f"send {name}")
                api.preupload_lfs_files(found.repo, additions=[addition], free_memory=False)
        step.begin("commit")
        version = finished_record(found.folder).onecard
        deletions = [CommitOperationDelete(path_in_repo=name) for name in sorted(old - found.files.keys())]
        info = api.create_commit(
            found.repo,
            operations=[*additions, *deletions],
            commit_message=f"Checkpoint made with onecard {version}",
        )
        step.begin("compare")
        there = {item.path: item for item in api.list_repo_tree(found.repo, recursive=True) if hasattr(item, "size")}
    wrong = [name for name, size in found.files.items() if name not in there or there[name].size != size]
    wrong += [
        name
        for name, digest in sums.items()
        if name not in wrong and there[name].lfs is not None and there[name].lfs.sha256 != digest
    ]
    if wrong:
        raise ResourceError(
            f"{found.repo} does not hold what was sent ({', '.join(wrong)}): run the same command again"
        )
    return {"url": f"{api.endpoint}/{found.repo}", "commit": info.oid}
