"""A record's `gate`: a run against limits and a baseline. Cards, JUnit and job summaries are drawn from this alone."""

from .part import Many, Number, RecordPart

LIMIT, BASELINE = "limit", "baseline"


class Check(RecordPart):
    """One question and its answer. `kind`: against a limit, or against a baseline.

    `measured` is this run's figure. `allowed` is the limit; against a baseline, the worst figure that would still pass.
    `low` and `high` bound the measured figure (against a limit: its 95 % interval) or the change (against a baseline:
    90 %, each end 95 % one-sided). The other figures exist against a baseline only. `change` and `tolerance` are
    relative for the mean KL (0.1 is a tenth more) and plain differences for shares. `said` is a sentence for people.
    """

    name: str
    kind: str | None = None
    passed: bool
    measured: Number | None = None
    allowed: Number | None = None
    said: str = ""
    low: Number | None = None
    high: Number | None = None
    before: Number | None = None
    change: Number | None = None
    tolerance: Number | None = None
    p_value: Number | None = None
    paired: bool | None = None


class Verdict(RecordPart):
    """All checks of a report, and notes on what they leave open."""

    passed: bool
    report: str = ""
    baseline: str | None = None
    checks: Many[Check] = ()
    notes: Many[str] = ()

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def verdict_of(report: str, baseline: str | None, checks: list[Check], notes: list[str]) -> Verdict:
    """The verdict that these checks come to: it passes when all of them do."""
    passed = all(check.passed for check in checks)
    return Verdict(passed=passed, report=report, baseline=baseline, checks=tuple(checks), notes=tuple(notes))
