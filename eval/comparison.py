"""A report against a baseline: is it worse by more than the tolerance, beyond noise?

The same documents and items are compared as pairs (regression.py). A record without its documents gives no pairs: means
are then compared with their standard errors, which finds less, and a note says so. Records that measure different
things are refused (reports.py).
"""

from dataclasses import dataclass

from ..core.errors import InputError, input_error
from ..core.record.flips import TaskFlips
from ..core.record.kl import DocumentKl, KlSummary
from ..core.record.schema import Record
from ..core.record.verdict import BASELINE, Check
from .intervals import FEW_DOCUMENTS
from .regression import Exceedance, ratio_exceeds, share_rise_exceeds, unpaired_ratio_exceeds, unpaired_rise_exceeds
from .reports import refuse_unlike, tasks

# A 95 % interval is this many standard errors to each side.
_HALF_INTERVAL = 1.96


@dataclass(frozen=True)
class Tolerances:
    """How much worse than the baseline a run may be: relative for the mean KL, plain differences of shares otherwise.

    benchmarks/gate_power.py shows what the defaults find, and what others would.
    """

    kl_mean: float = 0.01
    same_top1: float = 0.002
    flip_rate: float = 0.01


@dataclass(frozen=True)
class _Sums:
    """Over one document: its tokens, the sum of their KL, and how many have the same top-1."""

    tokens: int = 0
    kl: float = 0.0
    same: float = 0.0


@dataclass(frozen=True)
class _Change:
    """A figure now and before, and what the test found. `documents`: how many pairs; None for an unpaired test."""

    now: float
    before: float
    found: Exceedance
    documents: int | None

    @property
    def how(self) -> str:
        return f"{self.documents} documents as pairs" if self.documents else "unpaired"


def check_baseline(
    report: Record, baseline: Record, tolerances: Tolerances, across_dtypes: bool = False
) -> tuple[list[Check], list[str]]:
    """(checks, notes). Raises InputError for records that do not measure the same thing (with `across_dtypes` they may
    have been computed in different dtypes), and for those that cannot be compared."""
    refuse_unlike(report, baseline, across_dtypes)
    checks: list[Check] = []
    notes = _dtype_notes(report, baseline)
    if report.kl is not None and baseline.kl is not None:
        pairs = _pairs(report.kl, baseline.kl)
        if pairs is None:
            checks = _unpaired(report.kl, baseline.kl, tolerances)
            notes.append(
                "one of the two holds no documents: means are compared unpaired, which is wider and finds less"
            )
        else:
            checks = _paired(pairs, tolerances)
        if report.kl.documents < FEW_DOCUMENTS:
            notes.append(f"{report.kl.documents} documents: too few for the comparison to mean much")
    now, before = tasks(report), tasks(baseline)
    checks += [_check_flips(now[name], before[name], tolerances) for name in before]
    notes += [f"the task {name} is not in the baseline: not compared" for name in now if name not in before]
    if not checks:
        raise InputError("there is nothing to compare: the baseline holds neither KL nor a task. Measure one of them")
    device, old_device = report.machine.device, baseline.machine.device
    if device is not None and old_device is not None and device != old_device:
        notes.append(
            f"measured on {device}, the baseline on {old_device}: a difference of the devices falls on all documents"
        )
    return checks, notes


def _dtype_notes(report: Record, baseline: Record) -> list[str]:
    """A note where the two were not computed in one dtype for sure."""
    now, before = report.measured_dtype, baseline.measured_dtype
    if now == before and now is not None:
        return []
    if now is None or before is None:
        which = "the report" if now is None else "the baseline"
        both = "the two" if now is before is None else which
        return [f"the compute dtype of {both} is not recorded: a difference of dtypes would fall on all documents"]
    return [f"computed in {now}, the baseline in {before}: the difference of the dtypes falls on all documents"]


def _pairs(report: KlSummary, baseline: KlSummary) -> list[tuple[_Sums, _Sums]] | None:
    """(now, before) of every document, matched by digest; None where one of the two holds no documents."""
    now, before = _by_digest(report.by_document), _by_digest(baseline.by_document)
    if not now or not before:
        return None
    nothing = _Sums()
    unlike = [d for d in {*now, *before} if now.get(d, nothing).tokens != before.get(d, nothing).tokens]
    if unlike:
        raise input_error(
            f"{len(unlike)} documents of the report and the baseline differ in their tokens:",
            sorted(unlike)[:8],
            "Their evaluation digests agree, so one of the two files is damaged: make it anew.",
        )
    return [(now[digest], before[digest]) for digest in sorted(now)]


def _by_digest(documents: tuple[DocumentKl, ...]) -> dict[str, _Sums]:
    """A text that stands there twice is one document."""
    found: dict[str, _Sums] = {}
    for d in documents:
        assert d.digest is not None, "read_report refuses such a record"
        assert d.same_top1 is not None, "read_report refuses such a record"
        old = found.get(d.digest, _Sums())
        kl, same = old.kl + d.tokens * d.kl_mean_nats, old.same + d.tokens * d.same_top1
        found[d.digest] = _Sums(old.tokens + d.tokens, kl, same)
    return {digest: sums for digest, sums in found.items() if sums.tokens}


def _paired(pairs: list[tuple[_Sums, _Sums]], tolerances: Tolerances) -> list[Check]:
    if len(pairs) < 2:
        raise InputError("one document cannot be compared: noise shows between documents only")
    tokens = [now.tokens for now, _ in pairs]
    total, documents = sum(tokens), len(pairs)
    kl_now, kl_before = ([sums.kl for sums in side] for side in zip(*pairs, strict=True))
    same_now, same_before = ([sums.same for sums in side] for side in zip(*pairs, strict=True))
    kl = ratio_exceeds(kl_now, kl_before, 1 + tolerances.kl_mean)
    fallen = [before - now for now, before in zip(same_now, same_before, strict=True)]
    top1 = ratio_exceeds(fallen, tokens, tolerances.same_top1)
    return [
        _check_kl(_Change(sum(kl_now) / total, sum(kl_before) / total, kl, documents), tolerances.kl_mean),
        _check_top1(_Change(sum(same_now) / total, sum(same_before) / total, top1, documents), tolerances.same_top1),
    ]


def _unpaired(now: KlSummary, before: KlSummary, tolerances: Tolerances) -> list[Check]:
    mean_now, mean_before = now.kl_mean_nats, before.kl_mean_nats
    error_now, error_before = now.kl_standard_error_nats, before.kl_standard_error_nats
    if error_now is None or error_before is None:
        raise InputError(
            "the report and the baseline cannot be compared: without documents, and without the standard error of "
            "both, nothing tells what is noise. Measure on more than one document"
        )
    kl = unpaired_ratio_exceeds(mean_now, error_now, mean_before, error_before, 1 + tolerances.kl_mean)
    checks = [_check_kl(_Change(mean_now, mean_before, kl, None), tolerances.kl_mean)]
    half_now, half_before = _top1_error(now), _top1_error(before)
    if half_now is not None and half_before is not None:
        assert now.same_top1 is not None, "read_report refuses such a record"
        assert before.same_top1 is not None, "read_report refuses such a record"
        top1 = unpaired_rise_exceeds(
            1 - now.same_top1, half_now, 1 - before.same_top1, half_before, tolerances.same_top1
        )
        checks.append(_check_top1(_Change(now.same_top1, before.same_top1, top1, None), tolerances.same_top1))
    return checks


def _top1_error(kl: KlSummary) -> float | None:
    """The standard error of the same top-1, from its interval."""
    if kl.same_top1_low is None or kl.same_top1_high is None:
        return None
    return (kl.same_top1_high - kl.same_top1_low) / 2 / _HALF_INTERVAL


def _check_kl(change: _Change, tolerance: float) -> Check:
    now, before, found = change.now, change.before, change.found
    rise = found.value - 1 if before > 0 else (0.0 if now == 0 else None)
    low, high = (None if end is None else end - 1 for end in (found.low, found.high))
    span = "" if low is None or high is None else f", 90 % interval {low:+.1%} to {high:+.1%}"
    moved = "from no KL at all" if rise is None else f"{rise:+.1%}{span}"
    word = "more than" if found.exceeds else "not shown to be more than"
    return Check(
        name="kl_mean_nats",
        kind=BASELINE,
        passed=not found.exceeds,
        measured=now,
        allowed=before * (1 + tolerance),
        said=f"{now:.5f} nats, was {before:.5f} ({moved}; {change.how}): {word} the tolerance of {tolerance:.1%}",
        low=low,
        high=high,
        before=before,
        change=rise,
        tolerance=tolerance,
        p_value=found.p_value,
        paired=change.documents is not None,
    )


def _check_top1(change: _Change, tolerance: float) -> Check:
    """The test is of the fall; the check tells the change of the share, so the sign is turned."""
    now, before, found = change.now, change.before, change.found
    low, high = (None if end is None else 0.0 - end for end in (found.high, found.low))  # 0.0 - 0.0 has no sign
    span = "" if low is None or high is None else f", 90 % interval {low * 100:+.2f} to {high * 100:+.2f}"
    word = "a fall of more than" if found.exceeds else "no fall shown of more than"
    return Check(
        name="same_top1",
        kind=BASELINE,
        passed=not found.exceeds,
        measured=now,
        allowed=before - tolerance,
        said=f"{now:.2%}, was {before:.2%} ({(now - before) * 100:+.2f} points{span}; {change.how}): {word} the "
        f"tolerance of {tolerance * 100:.2f} points",
        low=low,
        high=high,
        before=before,
        change=now - before,
        tolerance=tolerance,
        p_value=found.p_value,
        paired=change.documents is not None,
    )


def _check_flips(now: TaskFlips, before: TaskFlips, tolerances: Tolerances) -> Check:
    """The share of items that the quantized model answers differently, compared item by item."""
    # Two items may have one id: sorting keeps their order.
    sides = [sorted(task.answers, key=lambda answer: str(answer.id)) for task in (now, before)]
    ids = [[answer.id for answer in side] for side in sides]
    if not ids[0] or ids[0] != ids[1]:
        raise InputError(
            f"the task {now.task} cannot be compared item by item: report and baseline must hold the same answers. "
            "Make them anew with `onecard flips`"
        )
    changed = [[answer.reference != answer.quantized for answer in side] for side in sides]
    items = len(changed[0])
    shares = [sum(side) / items for side in changed]
    tolerance = tolerances.flip_rate
    found = share_rise_exceeds(changed[0], changed[1], tolerance)
    low, high = found.low or 0.0, found.high or 0.0
    word = "of more than" if found.exceeds else "not shown to be more than"
    return Check(
        name=f"flip_rate {now.task}",
        kind=BASELINE,
        passed=not found.exceeds,
        measured=shares[0],
        allowed=shares[1] + tolerance,
        said=f"{now.task}: {shares[0]:.2%} of {items:,} answers changed, was {shares[1]:.2%} ({found.value * 100:+.2f} "
        f"points, 90 % interval {low * 100:+.2f} to {high * 100:+.2f}; as pairs): a rise {word} the tolerance of "
        f"{tolerance * 100:.2f} points",
        low=low,
        high=high,
        before=shares[1],
        change=found.value,
        tolerance=tolerance,
        p_value=found.p_value,
        paired=True,
    )
