"""Reports as the gate reads them, and the verb `baseline`, which freezes one for later comparisons.

A report is a record of `quantize`, `verify` or `flips` (a JSON file, or a checkpoint folder with its onecard.json), or
a baseline. A baseline is a record without what a comparison does not need: it holds no text of the evaluation, no
errors of weights, no times, and of the machine only its device. It is small and safe to keep beside the code.

Two reports that measure different things are refused, with every reason at once: a gate that compares them is worse
than none.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..core.errors import InputError, input_error
from ..core.json_text import json_text
from ..core.outputs import refuse_unwritable
from ..core.record.flips import TaskFlips
from ..core.record.reading import file_of, read_record
from ..core.record.schema import SCHEMA_VERSION, Record

# What a baseline keeps of a record, as pydantic's `include` and `exclude`. worst_tokens hold the evaluation's text.
_KEPT: Any = {
    **dict.fromkeys(("command", "onecard", "model", "checkpoint", "versions", "schema_version"), True),
    "texts": {"evaluation": {"rows_digest", "rows", "tokens"}},
    "plan": {"emitted_bytes"},
    "kl": True,
    "flips": {"all": True, "tasks": True},
    "recipe": {"name", "method", "digest"},
    "machine": {"device"},
    "template_date": True,
}
_LEFT_OUT: Any = {
    "kl": {
        **dict.fromkeys(("worst_tokens", "histogram", "by_position", "by_confidence", "by_kind"), True),
        "changed_routes_by_block": True,
        "by_document": {"__all__": {"source", "nll_reference", "nll_quantized"}},
    },
    "flips": {"tasks": {"__all__": {"answers": {"__all__": {"right", "margin_reference", "margin_quantized"}}}}},
}


def read_report(name: Path) -> Record:
    """The record that `name` is or holds, with all that a comparison needs. Raises InputError."""
    record = read_record(name)
    if name.is_dir() and not (name / "config.json").exists():
        raise InputError(f"{name} is not finished: go on with `onecard quantize … --resume`")
    if record.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"the record {name} has schema version {record.schema_version}, and the gate reads {SCHEMA_VERSION}: make "
            "it anew with this version, or use the onecard that wrote it"
        )
    problems = _lacking(record)
    if problems:
        raise input_error(f"the record {name} cannot be used:", problems, "Make it anew with `onecard verify`.")
    return record


def _lacking(record: Record) -> list[str]:
    """What a gate needs beyond what every record has."""
    kl, flips = record.kl, record.flips
    if kl is None and flips is None:
        return ["it holds no measurement, neither KL nor flips"]
    # A section may be empty, but every record that the gate reads was written with it.
    needed: dict[str, object] = {name: record.model_fields_set & {name} or None for name in ("texts", "plan")}
    if flips is not None:
        needed["flips.tasks"] = flips.model_fields_set & {"tasks"} or None
    if kl is not None:
        needed |= {"texts": record.texts or None, "kl.kl_p99_nats": kl.kl_p99_nats, "kl.same_top1": kl.same_top1}
        for number, document in enumerate(kl.by_document):
            needed[f"kl.by_document.{number}.digest"] = document.digest
            needed[f"kl.by_document.{number}.same_top1"] = document.same_top1
    found = [f"{place}: Field required" for place, value in needed.items() if value is None]
    return found[:8] + ([f"and {len(found) - 8} more"] if len(found) > 8 else [])


def evaluation_digest(record: Record) -> str | None:
    """The digest of the token rows that were evaluated."""
    return record.texts["evaluation"].rows_digest if "evaluation" in record.texts else None


def refuse_unlike(report: Record, baseline: Record) -> None:
    """Raises InputError unless the two measure the same thing: same original, same evaluation rows, same items."""
    problems = []

    def same(what: str, now: object, before: object) -> None:
        if now != before:
            problems.append(f"{what}: {_short(now)}, and the baseline's is {_short(before)}")

    same("the original model", report.model.digest, baseline.model.digest)
    same("its family", report.model.family, baseline.model.family)
    same("its number of blocks", report.model.blocks, baseline.model.blocks)
    if report.kl is not None and baseline.kl is not None:
        same("the evaluation rows", evaluation_digest(report), evaluation_digest(baseline))
        same("the number of tokens", report.kl.tokens, baseline.kl.tokens)
        same("the number of documents", report.kl.documents, baseline.kl.documents)
    elif report.kl is not baseline.kl:
        problems.append("KL is measured in only one of the two")
    now, before = tasks(report), tasks(baseline)
    for name in before:
        if name not in now:
            problems.append(f"the task {name}: only the baseline has it")
            continue
        same(f"the digest of the task {name}", now[name].digest, before[name].digest)
        same(f"the shots of the task {name}", now[name].shots, before[name].shots)
        same(f"the items of the task {name}", now[name].items, before[name].items)
    now_told, told = report.template_date, baseline.template_date
    rows_differ = evaluation_digest(report) != evaluation_digest(baseline)
    if now_told is not None and told is not None and (rows_differ or report.flips is not None):
        same("the date that the chat template was told (pin it with --date, or template_date)", now_told, told)
    if problems:
        raise input_error(
            "the report and the baseline do not measure the same thing:",
            problems,
            "Measure with the baseline's model, texts and tasks, or freeze another baseline with `onecard baseline`.",
        )


def tasks(record: Record) -> dict[str, TaskFlips]:
    """The tasks of a record's flips, by name."""
    return {} if record.flips is None else {task.task: task for task in record.flips.tasks}


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _without_folder(facts: dict[str, Any]) -> dict[str, Any]:
    """A baseline is passed on, so of a local path it keeps the last part; a hub id stays whole."""
    path = Path(str(facts.get("name", "")))
    return facts | {"name": path.name} if path.is_absolute() or str(facts.get("name", "")).startswith(".") else facts


def _frozen(record: Record) -> dict[str, Any]:
    """What a baseline holds, in one order whatever the record holds, so that freezing it again changes nothing."""
    kept = record.model_dump(mode="json", by_alias=True, exclude_unset=True, include=_KEPT, exclude=_LEFT_OUT)
    sections: dict[str, Any] = {name: {} for name, part in _KEPT.items() if part is not True} | {
        "checkpoint": {},
        "kl": {},
    }
    frozen = sections | {name: value for name, value in kept.items() if value is not None}
    frozen["texts"] = {"evaluation": {}} | frozen["texts"]
    return frozen | {name: _without_folder(frozen[name]) for name in ("model", "checkpoint")}


def freeze(name: Path, out: Path) -> dict[str, Any]:
    """Write the baseline of the report `name` into `out`. Returns the JSON line for scripts. Raises InputError."""
    refuse_unwritable({"the baseline": out})
    if out.absolute() == file_of(name).absolute():
        raise InputError(f"the baseline would take the place of the record {out}: name another file")
    record = read_report(name)
    frozen = _frozen(record)
    frozen["baseline"] = {"digest": sha256(json_text(frozen, sort_keys=True).encode()).hexdigest()}
    files.write_json(out, frozen)
    return {
        "baseline": str(out),
        "digest": frozen["baseline"]["digest"],
        "kl_mean_nats": record.kl.kl_mean_nats if record.kl else None,
        "documents": record.kl.documents if record.kl else None,
        "paired": bool(record.kl and record.kl.by_document),
        "tasks": list(tasks(record)),
    }
