"""A report against a baseline: is it worse by more than the tolerance, beyond noise?

The same documents and items are compared as pairs (eval/regression.py). A record without its documents gives no pairs:
then means are compared with their standard errors, which is wider, and said so. That both measure the same thing is
settled before (baseline.refuse_unlike).
"""

from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError, input_error
from ..core.verdict import BASELINE, Check
from .baseline import tasks
from .intervals import FEW_DOCUMENTS
from .regression import Exceedance, ratio_exceeds, share_rise_exceeds, unpaired_ratio_exceeds, unpaired_rise_exceeds

# A 95 % interval is this many standard errors to each side.
_HALF_INTERVAL = 1.96


@dataclass(frozen=True)
class Tolerances:
    """How much worse than the baseline a run may be. The mean KL's is relative, the others plain differences of shares.

    benchmarks/gate_power.py shows what the defaults find, and what others would.
    """

    kl_mean: float = 0.01
    same_top1: float = 0.002
    flip_rate: float = 0.01


def check_baseline(
    report: dict[str, Any], baseline: dict[str, Any], tolerances: Tolerances
) -> tuple[list[Check], list[str]]:
    """Checks and notes. The two were found to measure the same thing (baseline.refuse_unlike)."""
    checks, notes = [], []
    if report["kl"]:
        pairs = _pairs(report, baseline)
        checks = _unpaired(report["kl"], baseline["kl"], tolerances) if pairs is None else _paired(pairs, tolerances)
        if pairs is None:
            notes.append(
                "one of the two holds no documents: means are compared unpaired, which is wider and finds less"
            )
        documents = report["kl"].get("documents") or 0
        if documents < FEW_DOCUMENTS:
            notes.append(f"{documents} documents: too few for the comparison to mean much")
    now, before = tasks(report), tasks(baseline)
    checks += [_flips(now[name], before[name], tolerances) for name in before]
    notes += [f"the task {name} is not in the baseline: not compared" for name in now if name not in before]
    devices = [(record.get("machine") or {}).get("device") for record in (report, baseline)]
    if None not in devices and devices[0] != devices[1]:
        notes.append(
            f"measured on {devices[0]}, the baseline on {devices[1]}: what that changes falls on all documents"
        )
    return checks, notes


# Sums over one document: KL of this run and of the baseline, same top-1 of both, tokens.
_Pair = tuple[float, float, float, float, int]


def _pairs(report: dict[str, Any], baseline: dict[str, Any]) -> list[_Pair] | None:
    """One entry a document, matched by digest; None where one of the two holds none."""
    sides = [_by_digest(record["kl"].get("by_document") or []) for record in (report, baseline)]
    if not all(sides):
        return None
    now, before = sides
    unlike = [digest for digest in {*now, *before} if now.get(digest, (0,))[0] != before.get(digest, (0,))[0]]
    if unlike:
        raise input_error(
            f"{len(unlike)} documents of the report and the baseline differ in their tokens:",
            sorted(unlike)[:8],
            "Their evaluation digests agree, so one of the two files is damaged: make it anew.",
        )
    return [(now[d][1], before[d][1], now[d][2], before[d][2], now[d][0]) for d in sorted(now)]


def _by_digest(documents: list[dict[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """(tokens, sum of KL, tokens with the same top-1) a document. A text that stands there twice is one."""
    found: dict[str, tuple[int, float, float]] = {}
    for d in documents:
        tokens, kl, same = found.get(d["digest"], (0, 0.0, 0.0))
        own = d["tokens"]
        found[d["digest"]] = (tokens + own, kl + own * d["kl_mean_nats"], same + own * d["same_top1"])
    return {digest: entry for digest, entry in found.items() if entry[0]}


def _paired(pairs: list[_Pair], tolerances: Tolerances) -> list[Check]:
    if len(pairs) < 2:
        raise InputError("one document cannot be compared with a baseline: what is noise shows between documents only")
    now, before, same_now, same_before, tokens = (list(column) for column in zip(*pairs, strict=True))
    total = sum(tokens)
    kl = ratio_exceeds(now, before, 1 + tolerances.kl_mean)
    fallen = [b - n for n, b in zip(same_now, same_before, strict=True)]
    top1 = ratio_exceeds(fallen, tokens, tolerances.same_top1)
    return [
        _kl_check(sum(now) / total, sum(before) / total, kl, tolerances, len(pairs)),
        _top1_check(sum(same_now) / total, sum(same_before) / total, top1, tolerances, len(pairs)),
    ]


def _unpaired(now: dict[str, Any], before: dict[str, Any], tolerances: Tolerances) -> list[Check]:
    error_now, error_before = (kl.get("kl_standard_error_nats") for kl in (now, before))
    if error_now is None or error_before is None:
        raise InputError(
            "the report and the baseline cannot be compared: without documents, and without the standard error of "
            "both, nothing tells what is noise. Measure on more than one document"
        )
    kl = unpaired_ratio_exceeds(
        now["kl_mean_nats"], error_now, before["kl_mean_nats"], error_before, 1 + tolerances.kl_mean
    )
    checks = [_kl_check(now["kl_mean_nats"], before["kl_mean_nats"], kl, tolerances, None)]
    if all(side.get(key) is not None for side in (now, before) for key in ("same_top1_low", "same_top1_high")):
        half = [(side["same_top1_high"] - side["same_top1_low"]) / 2 / _HALF_INTERVAL for side in (now, before)]
        top1 = unpaired_rise_exceeds(
            1 - now["same_top1"], half[0], 1 - before["same_top1"], half[1], tolerances.same_top1
        )
        checks.append(_top1_check(now["same_top1"], before["same_top1"], top1, tolerances, None))
    return checks


def _kl_check(now: float, before: float, found: Exceedance, tolerances: Tolerances, documents: int | None) -> Check:
    tolerance = tolerances.kl_mean
    change = found.value - 1 if before > 0 else (0.0 if now == 0 else None)
    low, high = (None if end is None else end - 1 for end in (found.low, found.high))
    how = f"{documents} documents as pairs" if documents else "unpaired"
    span = "" if low is None or high is None else f", 90 % interval {low:+.1%} to {high:+.1%}"
    moved = "from no KL at all" if change is None else f"{change:+.1%}{span}"
    word = "more than" if found.exceeds else "not shown to be more than"
    said = f"{now:.5f} nats, was {before:.5f} ({moved}; {how}): {word} the tolerance of {tolerance:.1%}"
    return Check(
        "kl_mean_nats",
        BASELINE,
        not found.exceeds,
        now,
        before * (1 + tolerance),
        said,
        low,
        high,
        before,
        change,
        tolerance,
        found.p_value,
        documents is not None,
    )


def _top1_check(now: float, before: float, found: Exceedance, tolerances: Tolerances, documents: int | None) -> Check:
    """`found` is of the fall, `change` of the share: its sign is turned."""
    tolerance = tolerances.same_top1
    low, high = (None if end is None else 0.0 - end for end in (found.high, found.low))  # 0.0 - 0.0 has no sign
    how = f"{documents} documents as pairs" if documents else "unpaired"
    span = "" if low is None or high is None else f", 90 % interval {low * 100:+.2f} to {high * 100:+.2f}"
    word = "a fall of more than" if found.exceeds else "no fall shown of more than"
    said = (
        f"{now:.2%}, was {before:.2%} ({(now - before) * 100:+.2f} points{span}; {how}): {word} the tolerance of "
        f"{tolerance * 100:.2f} points"
    )
    return Check(
        "same_top1",
        BASELINE,
        not found.exceeds,
        now,
        before - tolerance,
        said,
        low,
        high,
        before,
        now - before,
        tolerance,
        found.p_value,
        documents is not None,
    )


def _flips(now: dict[str, Any], before: dict[str, Any], tolerances: Tolerances) -> Check:
    """The share of items whose answer is another than the original's, item by item."""
    # Two items may have one id: sorting keeps their order.
    sides = [sorted(task.get("answers") or [], key=lambda answer: str(answer["id"])) for task in (now, before)]
    ids = [[answer["id"] for answer in side] for side in sides]
    if not ids[0] or ids[0] != ids[1]:
        raise InputError(
            f"the task {now['task']} cannot be compared item by item: report and baseline must hold the same answers. "
            "Make them anew with `onecard flips`"
        )
    changed = [[answer["reference"] != answer["quantized"] for answer in side] for side in sides]
    items = len(changed[0])
    shares = [sum(side) / items for side in changed]
    tolerance = tolerances.flip_rate
    found = share_rise_exceeds(changed[0], changed[1], tolerance)
    low, high = found.low or 0.0, found.high or 0.0
    word = "of more than" if found.exceeds else "not shown to be more than"
    said = (
        f"{now['task']}: {shares[0]:.2%} of {items:,} answers changed, was {shares[1]:.2%} "
        f"({found.value * 100:+.2f} points, 90 % interval {low * 100:+.2f} to {high * 100:+.2f}; as pairs): "
        f"a rise {word} the tolerance of {tolerance * 100:.2f} points"
    )
    return Check(
        f"flip_rate {now['task']}",
        BASELINE,
        not found.exceeds,
        shares[0],
        shares[1] + tolerance,
        said,
        low,
        high,
        shares[1],
        found.value,
        tolerance,
        found.p_value,
        True,
    )
