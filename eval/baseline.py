"""Reports as the gate reads them, and a frozen one to be compared with: the verb `baseline`.

A report is a record of `quantize`, `verify` or `flips` (a JSON file, or a checkpoint folder with its onecard.json), or
a baseline. A baseline is a record without what a comparison does not need: no text of the evaluation, no weights'
errors, no time and no machine's name but its device. It is small, and safe to keep beside the code.

Whatever cannot be compared is refused, with every reason at once: a gate that compares the wrong things is worse than
none.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..checkpoint import files
from ..core.errors import InputError, input_error
from ..core.file_names import RECORD_NAME
from ..report.record import SCHEMA_VERSION

# Of a record's `kl`, what a baseline does without: worst_tokens hold the evaluation's text.
_LEFT_OUT = ("worst_tokens", "histogram", "by_position", "by_confidence", "by_kind", "changed_routes_by_block")
_OF_TEXTS = ("rows_digest", "rows", "tokens")
_OF_DOCUMENT = ("document", "digest", "kind", "tokens", "kl_mean_nats", "same_top1")
_OF_ANSWER = ("id", "reference", "quantized")
_KEPT = ("command", "onecard", "model", "checkpoint", "texts", "plan", "versions", "kl", "flips", "schema_version")


def _file_of(name: Path) -> Path:
    return name / RECORD_NAME if name.is_dir() else name


def read_report(name: Path) -> dict[str, Any]:
    """The record that `name` is or holds. Raises InputError where there is none that this version understands."""
    path = _file_of(name)
    if not path.is_file():
        made = "`onecard quantize` and `onecard verify --record FILE` write one"
        raise InputError(f"{name} holds no record: name a checkpoint folder with {RECORD_NAME}, or a record. {made}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the record {path} cannot be read ({error}): make it anew") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is no record of onecard: it holds no keys")
    version = record.get("schema_version")
    begun = version is None and set(record) == {"files"}
    if begun or (name.is_dir() and not (name / "config.json").exists()):
        raise InputError(f"{name} is not finished: go on with `onecard quantize … --resume`")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the record {path} has schema version {version}, and this onecard reads {SCHEMA_VERSION}: make it anew "
            "with this version, or use the one that made it"
        )
    problems = _problems(record)
    if problems:
        raise input_error(f"the record {path} cannot be used:", problems, "Make it anew with `onecard verify`.")
    return {"kl": {}, "flips": {}} | record


class _Read(BaseModel):
    """What the gate reads must be sound; it does not look at the rest."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


class _Document(_Read):
    digest: str
    tokens: int
    kl_mean_nats: float
    same_top1: float


class _Kl(_Read):
    tokens: int
    documents: int
    kl_mean_nats: float
    kl_p99_nats: float
    same_top1: float
    kl_standard_error_nats: float | None = None
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    same_top1_low: float | None = None
    same_top1_high: float | None = None
    by_document: list[_Document] = []


class _Share(_Read):
    share: float
    low: float | None = None
    high: float | None = None


class _Answer(_Read):
    id: str | int
    reference: int
    quantized: int


class _Changed(_Read):
    changed: _Share


class _Task(_Changed):
    task: str
    answers: list[_Answer] = []


class _Flips(_Read):
    all: _Changed
    tasks: list[_Task]


class _Block(_Read):
    expert_rows: list[int] | None = None


class _Plan(_Read):
    emitted_bytes: int | None = None


class _Evaluation(_Read):
    rows_digest: str | None = None


class _Texts(_Read):
    evaluation: _Evaluation = _Evaluation()


class _Machine(_Read):
    device: str | None = None


class _Record(_Read):
    model: dict[str, Any]
    texts: _Texts
    plan: _Plan
    kl: _Kl | None
    flips: _Flips | None
    recipe: dict[str, Any] | None = None
    blocks: list[_Block] = []
    fallbacks: dict[str, int] = {}
    machine: _Machine | None = None


def _problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record, as far as the gate reads it."""
    if not record.get("kl") and not record.get("flips"):
        return ["it holds no measurement, neither KL nor flips"]
    try:
        # What was not measured is an empty object in a record.
        _Record.model_validate(record | {key: record.get(key) or None for key in ("kl", "flips")})
    except ValidationError as error:
        found = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return found[:8] + ([f"and {len(found) - 8} more"] if len(found) > 8 else [])
    return []


def evaluation_digest(record: dict[str, Any]) -> str | None:
    digest = record["texts"].get("evaluation", {}).get("rows_digest")
    return None if digest is None else str(digest)


def refuse_unlike(report: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Raises InputError unless the two measure the same thing: same original, same evaluation rows, same items."""
    problems = []

    def same(what: str, now: Any, before: Any) -> None:
        if now != before:
            problems.append(f"{what}: {_short(now)}, and the baseline's is {_short(before)}")

    for key, what in (
        ("digest", "the original model"),
        ("family", "its family"),
        ("vocabulary", "its vocabulary"),
        ("blocks", "its number of blocks"),
    ):
        same(what, report["model"].get(key), baseline["model"].get(key))
    if bool(report["kl"]) != bool(baseline["kl"]):
        problems.append("KL is measured in only one of the two")
    elif report["kl"]:
        same("the evaluation rows", evaluation_digest(report), evaluation_digest(baseline))
        for key in ("tokens", "documents"):
            same(f"the number of {key}", report["kl"].get(key), baseline["kl"].get(key))
    now, before = tasks(report), tasks(baseline)
    for name in before:
        if name not in now:
            problems.append(f"the task {name}: it was answered for the baseline alone")
            continue
        for key in ("digest", "shots", "items"):
            same(f"the {key} of the task {name}", now[name].get(key), before[name].get(key))
    if problems:
        raise input_error(
            "the report and the baseline do not measure the same thing:",
            problems,
            "Measure with the baseline's model, texts and tasks, or freeze another baseline with `onecard baseline`.",
        )


def tasks(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of a record's flips, by name."""
    return {str(task["task"]): task for task in (record.get("flips") or {}).get("tasks", [])}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _without_folder(facts: dict[str, Any]) -> dict[str, Any]:
    """A local folder's place is nobody's business; a hub id is its name."""
    path = Path(str(facts.get("name", "")))
    return facts | {"name": path.name} if path.is_absolute() or str(facts.get("name", "")).startswith(".") else facts


def freeze(name: Path, out: Path) -> dict[str, Any]:
    """Write the baseline of the report `name` into `out`; returns what scripts get. Raises InputError."""
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"the baseline {out} cannot be written: name a file in a folder that exists")
    if out.absolute() == _file_of(name).absolute():
        raise InputError(f"the baseline would take the place of the record {out}: name another file")
    record = read_report(name)
    frozen = {key: record[key] for key in _KEPT if key in record}
    frozen |= {key: _without_folder(frozen[key] or {}) for key in ("model", "checkpoint") if key in frozen}
    texts = record["texts"].get("evaluation", {})
    frozen["texts"] = {"evaluation": {key: texts[key] for key in _OF_TEXTS if key in texts}}
    frozen["plan"] = {"emitted_bytes": record["plan"].get("emitted_bytes")}
    frozen["kl"] = {key: value for key, value in record["kl"].items() if key not in _LEFT_OUT}
    if "by_document" in frozen["kl"]:
        documents = frozen["kl"]["by_document"]
        frozen["kl"]["by_document"] = [{key: d[key] for key in _OF_DOCUMENT if key in d} for d in documents]
    flips = record.get("flips") or {}
    answered = [
        task | {"answers": [{key: a[key] for key in _OF_ANSWER} for a in task.get("answers", [])]}
        for task in flips.get("tasks", [])
    ]
    frozen["flips"] = flips | {"tasks": answered} if flips else {}
    recipe = record.get("recipe") or {}
    frozen["recipe"] = {key: recipe[key] for key in ("name", "method", "digest") if key in recipe}
    frozen["machine"] = {"device": (record.get("machine") or {}).get("device")}
    frozen["baseline"] = {"digest": sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()}
    files.write_json(out, frozen)
    return {
        "baseline": str(out),
        "digest": frozen["baseline"]["digest"],
        "kl_mean_nats": frozen["kl"].get("kl_mean_nats"),
        "documents": frozen["kl"].get("documents"),
        "paired": bool(frozen["kl"].get("by_document")),
        "tasks": list(tasks(frozen)),
    }
