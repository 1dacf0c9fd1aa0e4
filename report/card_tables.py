"""The tables of a model card as rows of words. Words that are not ours are escaped for Markdown."""

import re
from collections.abc import Callable
from pathlib import PurePath

from ..core import units
from ..core.record.flips import FlipSummary, Share
from ..core.record.kl import KlSummary
from ..core.record.schema import Record

NOT_MEASURED = "not measured"


def words(value: object) -> str:
    """Foreign text inside a line of Markdown: no markup, no HTML, no line ends."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|<>#~])", lambda m: {"<": "&lt;", ">": "&gt;"}.get(m[1], "\\" + m[1]), flat)


def code(value: object) -> str:
    """Foreign text as inline code."""
    flat = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`"


def _figure(value: float | None, digits: int = 4) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def _percent(share: float | None) -> str:
    return units.percent(share, absent=NOT_MEASURED)


def _between(low: float | None, high: float | None, show: Callable[[float], str] = _figure) -> str:
    return units.between(low, high, show, absent="")


def measured(kl: KlSummary) -> list[tuple[str, str, str]]:
    """Rows of (what, value, interval), of what the record holds."""
    mean = "mean KL(original \\|\\| these files), nats"
    rows = [
        (mean, _figure(kl.kl_mean_nats), _between(kl.kl_low_nats, kl.kl_high_nats)),
        ("KL, median, nats", _figure(kl.kl_median_nats), ""),
        ("KL, p90, nats", _figure(kl.kl_p90_nats), ""),
        ("KL, p95, nats", _figure(kl.kl_p95_nats), ""),
        ("KL, p99, nats", _figure(kl.kl_p99_nats), ""),
        ("KL, p99.9, nats", _figure(kl.kl_p999_nats), ""),
        ("KL, largest, nats", _figure(kl.kl_max_nats), ""),
        ("mean reverse KL, nats", _figure(kl.reverse_kl_mean_nats), ""),
        ("same top-1", _percent(kl.same_top1), _between(kl.same_top1_low, kl.same_top1_high, _percent)),
        ("overlap of the top 5", _percent(kl.top5_overlap), ""),
        ("change of the true token's probability, mean", _figure(kl.delta_p_mean), ""),
        ("the same, root mean square", _figure(kl.delta_p_rms), ""),
        ("perplexity, original", _figure(kl.perplexity_reference, 5), ""),
        ("perplexity, these files", _figure(kl.perplexity_quantized, 5), ""),
        (
            "ratio of the perplexities",
            _figure(kl.perplexity_ratio, 5),
            _between(kl.perplexity_ratio_low, kl.perplexity_ratio_high),
        ),
        ("tokens sent to other experts, a layer", _percent(kl.changed_routes), ""),
    ]
    if kl.floor is not None:
        name = f"floor: mean KL(original in float32 \\|\\| original in {kl.floor.compute_dtype}), nats"
        rows.insert(1, (name, _figure(kl.floor.kl_mean_nats), _between(kl.floor.kl_low_nats, kl.floor.kl_high_nats)))
    return [row for row in rows if row[1] != NOT_MEASURED]


def kinds(kl: KlSummary) -> list[tuple[str, ...]]:
    """Rows of (kind, tokens, mean KL, interval, same top-1): texts like calibration and others, and then each kind."""
    return [
        (
            k.label,
            f"{k.tokens:,}",
            _figure(k.kl_mean_nats),
            _between(k.kl_low_nats, k.kl_high_nats),
            _percent(k.same_top1),
        )
        for k in (*kl.by_likeness, *kl.by_kind)
    ]


def flips(found: FlipSummary | None) -> list[tuple[str, ...]]:
    """One row for each task, and one for all together where there are several."""

    def share(value: Share) -> str:
        return f"{_percent(value.share)} ({_between(value.low, value.high, _percent)})"

    if found is None:
        return []
    return [
        (
            task.task if task.shots is None else f"{task.task}, {task.shots}-shot",
            f"{task.items:,}",
            share(task.accuracy_reference),
            share(task.accuracy_quantized),
            share(task.changed),
            share(task.right_to_wrong),
            share(task.wrong_to_right),
            _figure(task.mcnemar_p, 3),
        )
        for task in (*found.tasks, *([found.all] if len(found.tasks) > 1 else []))
    ]


def base_name(name: str) -> str:
    """A hub id or file name; of a path on the maker's machine only its last part, since cards are published."""
    return name if not PurePath(name).is_absolute() and ".." not in name else PurePath(name).name


def provenance(record: Record) -> list[tuple[str, str]]:
    """Rows of (what, digest or version)."""
    model = record.model
    rows = [
        ("revision of the original", model.hub.revision),
        ("digest of the original", model.digest),
        ("digest of the recipe", record.recipe["digest"]),
    ]
    for which in ("calibration", "evaluation"):
        texts = record.texts.get(which)
        if texts is not None:
            rows.append((f"{which} texts", ", ".join(base_name(s.source) for s in texts.sources)))
            rows.append((f"digest of the {which} documents", texts.digest))
            rows.append((f"digest of the {which} rows", texts.rows_digest))
    rows += [(f"version of {name}", version) for name, version in sorted(record.versions.items())]
    return [(what, value) for what, value in rows if value is not None]
