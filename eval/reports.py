"""Reports as the gate reads them, and which two of them measure the same thing.

A report is a record of `quantize`, `verify` or `flips` (a JSON file, or a checkpoint folder with its onecard.json), or
a baseline (baseline.py).

Two reports that measure different things are refused, with every reason at once: a gate that compares them is worse
than none.
"""

from pathlib import Path

from ..core.errors import InputError, input_error
from ..core.record.flips import TaskFlips
from ..core.record.reading import read_record
from ..core.record.schema import SCHEMA_VERSION, Record


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
    # What says that two reports measure the same thing must be there: nothing would differ from nothing.
    # A section may be empty, but every record that the gate reads was written with it.
    needed: dict[str, object] = {name: record.model_fields_set & {name} or None for name in ("texts", "plan")}
    needed["model.digest"] = record.model.digest
    if flips is not None:
        needed["flips.tasks"] = flips.model_fields_set & {"tasks"} or None
        needed |= {f"flips.tasks.{number}.digest": task.digest for number, task in enumerate(flips.tasks)}
    if kl is not None:
        needed |= {"texts": record.texts or None, "texts.evaluation.rows_digest": evaluation_digest(record)}
        needed |= {"kl.kl_p99_nats": kl.kl_p99_nats, "kl.same_top1": kl.same_top1}
        for number, document in enumerate(kl.by_document):
            needed[f"kl.by_document.{number}.digest"] = document.digest
            needed[f"kl.by_document.{number}.same_top1"] = document.same_top1
    found = [f"{place}: Field required" for place, value in needed.items() if value is None]
    return found[:8] + ([f"and {len(found) - 8} more"] if len(found) > 8 else [])


def evaluation_digest(record: Record) -> str | None:
    """The digest of the token rows that were evaluated."""
    return record.texts["evaluation"].rows_digest if "evaluation" in record.texts else None


def refuse_unlike(report: Record, baseline: Record, across_dtypes: bool = False) -> None:
    """Raises InputError unless the two measure the same thing: same original, same evaluation rows, same items, and the
    same compute dtype unless `across_dtypes`."""
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
    if None not in (report.measured_dtype, baseline.measured_dtype) and not across_dtypes:
        same("the compute dtype", report.measured_dtype, baseline.measured_dtype)
    now, before = tasks(report), tasks(baseline)
    for name in before:
        if name not in now:
            problems.append(f"the task {name}: only the baseline has it")
            continue
        same(f"the digest of the task {name}", now[name].digest, before[name].digest)
        same(f"the shots of the task {name}", now[name].shots, before[name].shots)
        same(f"the items of the task {name}", now[name].items, before[name].items)
    dates = (report.template_date, baseline.template_date)
    if None not in dates and (report.flips is not None or evaluation_digest(report) != evaluation_digest(baseline)):
        same("the date that the chat template was told (pin it with --date, or template_date)", *dates)
    if problems:
        raise input_error(
            "the report and the baseline do not measure the same thing:",
            problems,
            "Measure with the baseline's model, texts, tasks and dtype, or freeze another baseline with `onecard "
            "baseline`. Two dtypes are compared with --across-dtypes.",
        )


def tasks(record: Record) -> dict[str, TaskFlips]:
    """The tasks of a record's flips, by name."""
    return {} if record.flips is None else {task.task: task for task in record.flips.tasks}


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
