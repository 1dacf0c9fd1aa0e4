"""The gate: a report against limits and against a frozen baseline, with an answer that a CI can trust.

A limit is compared with the measured figure, not with an end of its interval: the same files on the same texts then
always get the same answer. The interval is shown beside it, and a note says when it reaches over the limit. The
comparison with a baseline is in comparison.py; reports that measure different things are refused (reports.py).
"""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError, LimitError, input_error
from ..core.limits import named_limits
from ..core.record.schema import Record
from ..core.record.verdict import LIMIT, Check, Verdict, verdict_of
from ..recipe import Recipe, recorded_limits
from .comparison import Tolerances, check_baseline
from .reports import read_report


@dataclass(frozen=True)
class Measurement:
    """A figure and the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


def run_gate(
    report_name: Path,
    baseline_name: Path | None,
    limits: dict[str, float] | None,
    tolerances: Tolerances,
    across_dtypes: bool = False,
) -> Verdict:
    """Read both, then refuse or judge. `limits` of None: those of the report's own recipe. `across_dtypes`: compare
    although the two were computed in different dtypes. Raises InputError."""
    report = read_report(report_name)
    baseline = None if baseline_name is None else read_report(baseline_name)
    if limits is None:
        limits = recorded_limits(f"the recipe in the record {report_name}", report.recipe)
    if baseline is None and not limits:
        raise InputError(
            f"there is nothing to compare {report_name} with: its recipe, or the file of limits, names no limit. Add "
            "--limits FILE or --baseline BASELINE"
        )
    against: list[Check] = []
    notes: list[str] = []
    if baseline is not None:
        against, notes = check_baseline(report, baseline, tolerances, across_dtypes)
    checks = check_limits(report, limits) + against
    if baseline is not None and not limits:
        notes.append("no limits were looked at: the report names none (one of `verify` or `flips` never does)")
    name = None if baseline_name is None else str(baseline_name)
    return verdict_of(str(report_name), name, checks, [*_reaching(checks), *notes])


def refuse_too_large(emitted_bytes: int, recipe: Recipe) -> None:
    """Raises LimitError. The bytes are known before any weight is read, so this limit costs nothing."""
    if recipe.limits.max_emitted_bytes is not None and emitted_bytes > recipe.limits.max_emitted_bytes:
        raise LimitError(
            f"the plan emits {emitted_bytes:,} bytes, and the recipe allows {recipe.limits.max_emitted_bytes:,} "
            "(max_emitted_bytes): quantize more, in larger groups, or allow more. Nothing was written"
        )


def gate_of_run(record: Record, name: str, recipe: Recipe) -> Verdict:
    """The record's `gate`: a finished run against its recipe's limits."""
    limits = named_limits(recipe.limits.model_dump())
    notes = []
    if "fail_below_expert_rows" in limits and measurements(record)["fail_below_expert_rows"] is None:
        del limits["fail_below_expert_rows"]
        notes.append("fail_below_expert_rows: the run took no statistics of experts, and none could starve")
    checks = check_limits(record, limits)
    return verdict_of(name, None, checks, [*_reaching(checks), *notes])


def refuse_failed(record: Record, out: str) -> None:
    """Raises LimitError for a finished run that broke its recipe's limits."""
    failed = [f"  - {check.name}: {check.said}" for check in record.gate.failed] if record.gate else []
    if failed:
        lines = [
            "the checkpoint breaks the limits of its recipe:",
            *failed,
            f"It is finished and kept in {out}, and its record says that it failed. Quantize better, or judge it by "
            "other limits: onecard gate --limits FILE",
        ]
        raise LimitError("\n".join(lines))


def measurements(record: Record) -> dict[str, Measurement | None]:
    """The figure that each limit is compared with; None where the record does not hold it."""
    kl, changed = record.kl, record.flips.all.changed if record.flips else None
    rows = [count for block in record.blocks for count in block.expert_rows]
    # A run that takes no statistics (round-to-nearest) has no matrix that could fall back.
    fallbacks = record.fallbacks.get("diagonal_fallbacks", 0 if record.command == "quantize" else None)

    def figure(value: float | None, low: float | None = None, high: float | None = None) -> Measurement | None:
        return None if value is None else Measurement(value, low, high)

    return {
        "max_kl_mean_nats": figure(kl.kl_mean_nats, kl.kl_low_nats, kl.kl_high_nats) if kl else None,
        "max_kl_p99_nats": figure(kl.kl_p99_nats) if kl else None,
        "min_same_top1": figure(kl.same_top1, kl.same_top1_low, kl.same_top1_high) if kl else None,
        "max_flip_rate": figure(changed.share, changed.low, changed.high) if changed else None,
        "max_emitted_bytes": figure(record.plan.emitted_bytes) if record.plan else None,
        "fail_below_expert_rows": figure(min(rows, default=None)),
        "max_fallbacks": figure(fallbacks),
    }


def check_limits(record: Record, limits: dict[str, float]) -> list[Check]:
    """One check a limit. Raises InputError where the record does not hold what a limit is about."""
    figures = measurements(record)
    missing = [f"{name}: the record holds no such figure" for name in limits if figures[name] is None]
    if missing:
        raise input_error(
            "these limits cannot be judged:",
            missing,
            "Coverage and fallbacks are in a record of `quantize`; flips are in one of `flips`, or of a recipe that "
            "asks for them. Name the record that has them, or drop the limits.",
        )
    return [_check_limit(name, figure, limit) for name, limit in limits.items() if (figure := figures[name])]


def _check_limit(name: str, figure: Measurement, limit: float) -> Check:
    is_least = name.startswith(("min_", "fail_below_"))
    passed = figure.value >= limit if is_least else figure.value <= limit
    word = ("at least" if is_least else "at most") if passed else ("less than" if is_least else "more than")
    return Check(
        name=name,
        kind=LIMIT,
        passed=passed,
        measured=figure.value,
        allowed=limit,
        said=f"{_said(name, figure.value)}{_interval_said(name, figure)}, {word} {_said(name, limit)}",
        low=figure.low,
        high=figure.high,
        # Of a baseline alone; a record holds them all the same.
        before=None,
        change=None,
        tolerance=None,
        p_value=None,
        paired=None,
    )


def _reaching(checks: list[Check]) -> list[str]:
    """Notes on limits that the measured figure keeps, but not all of its interval."""
    found = []
    for check in checks:
        if check.kind != LIMIT or not check.passed:
            continue
        if check.low is None or check.high is None or check.allowed is None:
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


def _interval_said(name: str, figure: Measurement) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f" (95 %: {_said(name, figure.low)} to {_said(name, figure.high)})"
