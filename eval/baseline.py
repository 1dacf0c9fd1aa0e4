"""The verb `baseline`: freezes a report for later comparisons.

A baseline is a record without what a comparison does not need: it holds no text of the evaluation, no errors of
weights, no times, and of the machine only its device. It is small and safe to keep beside the code. What no gate could
compare with is refused here, and not only when the next report comes.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..core.errors import InputError
from ..core.json_text import json_text
from ..core.outputs import refuse_unwritable
from ..core.record.reading import check_record, file_of
from ..core.record.schema import Record
from .comparison import Tolerances, check_baseline
from .reports import read_report, tasks

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
    # An older record of a run has its dtype in its identity, which a baseline does not keep.
    dtype = {} if record.measured_dtype is None else {"compute_dtype": record.measured_dtype}
    return frozen | {name: _without_folder(frozen[name]) for name in ("model", "checkpoint")} | dtype


def _refuse_useless(frozen: Record, name: Path) -> None:
    """Raises InputError for a baseline that no gate could use. Whether one can is seen by comparing it with itself."""
    try:
        check_baseline(frozen, frozen, Tolerances())
    except InputError as error:
        raise InputError(f"{name} cannot serve as a baseline, since no gate could use it: {error}") from None


def freeze(name: Path, out: Path) -> dict[str, Any]:
    """Write the baseline of the report `name` into `out`. Returns the JSON line for scripts. Raises InputError."""
    refuse_unwritable({"the baseline": out})
    if out.absolute() == file_of(name).absolute():
        raise InputError(f"the baseline would take the place of the record {out}: name another file")
    record = read_report(name)
    frozen = _frozen(record)
    _refuse_useless(check_record(frozen, str(name)), name)
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
