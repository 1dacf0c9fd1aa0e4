"""The gate: a report against limits, and against a frozen baseline, with an answer that a CI can trust.

A limit is held against the measured figure, not against an end of its interval: the same files on the same texts then
always get the same answer. The interval stands beside it, and a note says when it reaches over the limit. What comes
of a baseline is in comparison.py; reports that measure different things are never compared (baseline.py).
"""

from pathlib import Path
from typing import Any

from ..core.errors import InputError, LimitError, input_error
from ..core.limits import named_limits
from ..core.verdict import LIMIT, Check, Verdict
from ..recipe import Recipe, recorded_limits
from .baseline import read_report, refuse_unlike
from .comparison import Tolerances, check_baseline


def run_gate(
    report_name: Path,
    baseline_name: Path | None,
    limits: dict[str, float] | None,
    tolerances: Tolerances,
) -> Verdict:
    """Read, refuse or judge. `limits` of None: those of the report's own recipe. Raises InputError."""
    report = read_report(report_name)
    baseline = None if baseline_name is None else read_report(baseline_name)
    limits = (
        limits
        if limits is not None
        else recorded_limits(f"the recipe in the record {report_name}", report.get("recipe") or {})
    )
    if baseline is None and not limits:
        raise InputError(
            f"there is nothing to hold {report_name} against: its recipe, or the file of limits, names no limit. Add "
            "--limits FILE or --baseline BASELINE"
        )
    if baseline is not None:
        refuse_unlike(report, baseline)
    checks = check_limits(report, limits)
    notes: list[str] = []
    if baseline is not None:
        against, notes = check_baseline(report, baseline, tolerances)
        checks += against
        if not limits:
            notes.append("no limits were looked at: the report names none (one of `verify` or `flips` never does)")
    name = None if baseline_name is None else str(baseline_name)
    return Verdict(str(report_name), name, tuple(checks), (*_reaching(checks), *notes))


def refuse_too_large(emitted_bytes: int, recipe: Recipe) -> None:
    """Raises LimitError. The bytes are known before any weight is read, so this limit costs nothing."""
    if recipe.limits.max_emitted_bytes is not None and emitted_bytes > recipe.limits.max_emitted_bytes:
        raise LimitError(
            f"the plan emits {emitted_bytes:,} bytes, and the recipe allows {recipe.limits.max_emitted_bytes:,} "
            "(max_emitted_bytes): quantize more, in larger groups, or allow more. Nothing was written"
        )


def gate_of_run(record: dict[str, Any], name: str, recipe: Recipe) -> dict[str, Any]:
    """The record's `gate`: a finished run against its recipe's limits."""
    limits = named_limits(recipe.limits.model_dump())
    notes = []
    if "fail_below_expert_rows" in limits and measured(record)["fail_below_expert_rows"] is None:
        del limits["fail_below_expert_rows"]
        notes.append("fail_below_expert_rows: the run took no statistics of experts, and none could starve")
    checks = check_limits(record, limits)
    return Verdict(name, None, tuple(checks), (*_reaching(checks), *notes)).to_json()


def refuse_failed(record: dict[str, Any], out: str) -> None:
    """Raises LimitError for a finished run that did not keep its recipe's limits."""
    failed = [f"  - {check['name']}: {check['said']}" for check in record["gate"]["checks"] if not check["passed"]]
    if failed:
        lines = [
            "the checkpoint does not keep the limits of its recipe:",
            *failed,
            f"It is finished and kept in {out}, and its record says that it failed. Quantize better, or judge it by "
            "other limits: onecard gate --limits FILE",
        ]
        raise LimitError("\n".join(lines))


def measured(record: dict[str, Any]) -> dict[str, tuple[float, float | None, float | None] | None]:
    """What each limit is held against: (figure, low, high of its 95 % interval); None if the record does not tell."""
    kl = record.get("kl") or {}
    flips = (record.get("flips") or {}).get("all")
    rows = [count for block in record.get("blocks") or [] for count in block.get("expert_rows") or []]
    fallbacks = record.get("fallbacks") or {}
    quantized_here = record.get("command") == "quantize"
    bytes_ = (record.get("plan") or {}).get("emitted_bytes")

    def figure(value: Any, low: Any = None, high: Any = None) -> tuple[float, float | None, float | None] | None:
        return None if value is None else (value, low, high)

    return {
        "max_kl_mean_nats": figure(kl.get("kl_mean_nats"), kl.get("kl_low_nats"), kl.get("kl_high_nats")),
        "max_kl_p99_nats": figure(kl.get("kl_p99_nats")),
        "min_same_top1": figure(kl.get("same_top1"), kl.get("same_top1_low"), kl.get("same_top1_high")),
        "max_flip_rate": None if not flips else figure(*(flips["changed"].get(k) for k in ("share", "low", "high"))),
        "max_emitted_bytes": figure(bytes_),
        "fail_below_expert_rows": figure(min(rows, default=None)),
        # A run that takes no statistics (round-to-nearest) has no matrix that could fall back.
        "max_fallbacks": figure(fallbacks.get("diagonal_fallbacks", 0 if quantized_here else None)),
    }


def check_limits(record: dict[str, Any], limits: dict[str, float]) -> list[Check]:
    """A check for every limit. Raises InputError for limits whose figure the record does not hold."""
    figures = measured(record)
    missing = [f"{name}: the record holds no such figure" for name in limits if figures[name] is None]
    if missing:
        raise input_error(
            "these limits cannot be judged:",
            missing,
            "Coverage and fallbacks stand in a record of `quantize`, flips in one of `flips` or of a recipe that asks "
            "for them. Name the record that has them, or take the limits away.",
        )
    checks = []
    for name, limit in limits.items():
        value, low, high = figures[name] or (0.0, None, None)
        least = name.startswith(("min_", "fail_below_"))
        passed = value >= limit if least else value <= limit
        word = ("at least" if least else "at most") if passed else ("less than" if least else "more than")
        said = f"{_said(name, value)}{_between(name, low, high)}, {word} {_said(name, limit)}"
        checks.append(Check(name, LIMIT, passed, value, limit, said, low, high))
    return checks


def _reaching(checks: list[Check]) -> list[str]:
    """Notes on limits that are kept by the measured figure, but not by all of its interval."""
    found = []
    for check in checks:
        if check.kind != LIMIT or not check.passed or check.low is None or check.high is None:
            continue
        over = check.low < check.allowed if check.name.startswith("min_") else check.high > check.allowed
        if over:
            found.append(f"{check.name} is kept by the measured figure; its 95 % interval reaches over the limit")
    return found


def _said(name: str, value: float) -> str:
    if name.endswith("_nats"):
        return f"{value:.5f} nats"
    if name in ("min_same_top1", "max_flip_rate"):
        return f"{value:.2%}"
    return f"{value:,}"


def _between(name: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 %: {_said(name, low)} to {_said(name, high)})"
