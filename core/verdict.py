"""Words of the gate: one check, and all of them with what was checked. Plain values, so that a record can hold them.

Whoever draws a verdict (card, JSON, JUnit, job summary) reads these and nothing else.
"""

from dataclasses import asdict, dataclass
from typing import Any

LIMIT, BASELINE = "limit", "baseline"


@dataclass(frozen=True)
class Check:
    """One question and its answer. `kind`: against a limit, or against a baseline.

    `measured` is this run's figure, `allowed` the limit, or against a baseline the worst that it might have been. `low`
    and `high` bound the measured figure (against a limit: its 95 % interval) or the change (against a baseline: 90 %,
    each end 95 % one-sided). `before`, `change`, `tolerance` and `p_value` are a baseline's; `change` and `tolerance`
    are relative for the mean KL (0.1: a tenth more) and plain differences for shares. `said` is for people.
    """

    name: str
    kind: str
    passed: bool
    measured: float
    allowed: float
    said: str
    low: float | None = None
    high: float | None = None
    before: float | None = None
    change: float | None = None
    tolerance: float | None = None
    p_value: float | None = None
    paired: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """All checks of a report, and what has to be known beside them."""

    report: str
    baseline: str | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        """For the record and for the JSON line."""
        return {
            "passed": self.passed,
            "report": self.report,
            "baseline": self.baseline,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }
