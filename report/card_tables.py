"""The tables of a model card, rows of words, and the escaping of what is no word of ours for Markdown."""

import re
from pathlib import PurePath
from typing import Any


def words(value: object) -> str:
    """Text of others inside a line of Markdown: no markup, no HTML, no line ends."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|<>#~])", lambda m: {"<": "&lt;", ">": "&gt;"}.get(m[1], "\\" + m[1]), flat)


def code(value: object) -> str:
    """Text of others as inline code."""
    flat = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`"


def figure(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:.{digits}g}"


def between(low: float | None, high: float | None, show: Any = figure) -> str:
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.2%}"


def measured(kl: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (what, value, interval), of what the record holds."""
    get = kl.get
    rows = [
        (
            "mean KL(original \\|\\| these files), nats",
            figure(get("kl_mean_nats")),
            between(get("kl_low_nats"), get("kl_high_nats")),
        )
    ]
    for key, what in {
        "kl_median_nats": "median",
        "kl_p90_nats": "p90",
        "kl_p95_nats": "p95",
        "kl_p99_nats": "p99",
        "kl_p999_nats": "p99.9",
        "kl_max_nats": "largest",
    }.items():
        rows.append((f"KL, {what}, nats", figure(get(key)), ""))
    rows.append(("mean reverse KL, nats", figure(get("reverse_kl_mean_nats")), ""))
    rows.append(
        ("same top-1", percent(get("same_top1")), between(get("same_top1_low"), get("same_top1_high"), percent))
    )
    rows.append(("overlap of the top 5", percent(get("top5_overlap")), ""))
    rows.append(("change of the true token's probability, mean", figure(get("delta_p_mean")), ""))
    rows.append(("the same, root mean square", figure(get("delta_p_rms")), ""))
    rows.append(("perplexity, original", figure(get("perplexity_reference"), 5), ""))
    rows.append(("perplexity, these files", figure(get("perplexity_quantized"), 5), ""))
    rows.append(
        (
            "ratio of the perplexities",
            figure(get("perplexity_ratio"), 5),
            between(get("perplexity_ratio_low"), get("perplexity_ratio_high")),
        )
    )
    rows.append(("tokens sent to other experts, a layer", percent(get("changed_routes")), ""))
    return [row for row in rows if row[1] != "not measured"]


def kinds(kl: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of (kind, tokens, mean KL, interval, same top-1)."""
    return [
        (
            k["label"],
            f"{k['tokens']:,}",
            figure(k["kl_mean_nats"]),
            between(k["kl_low_nats"], k["kl_high_nats"]),
            percent(k["same_top1"]),
        )
        for k in kl.get("by_kind") or []
    ]


def flips(said: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a task, and one for all of them where there are several."""

    def share(value: dict[str, Any]) -> str:
        return f"{value['share']:.2%} ({between(value['low'], value['high'], percent)})"

    summaries = [*said.get("tasks", []), *([said["all"]] if len(said.get("tasks", [])) > 1 else [])]
    keys = ("accuracy_reference", "accuracy_quantized", "changed", "right_to_wrong", "wrong_to_right")
    return [
        (
            f"{s['task']}, {s['shots']}-shot" if s.get("shots") is not None else str(s["task"]),
            f"{s['items']:,}",
            *(share(s[key]) for key in keys),
            figure(s.get("mcnemar_p"), 3),
        )
        for s in summaries
    ]


def base_name(name: str) -> str:
    """A path of the maker's machine is nobody's business."""
    return name if not PurePath(name).is_absolute() and ".." not in name else PurePath(name).name


def provenance(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of (what, digest or version)."""
    hub = record["model"].get("hub") or {}
    rows = [("revision of the original", hub["revision"])] if hub.get("revision") else []
    rows += [
        ("digest of the original", record["model"]["digest"]),
        ("digest of the recipe", record["recipe"]["digest"]),
    ]
    for which in ("calibration", "evaluation"):
        texts = record["texts"].get(which)
        if texts:
            rows.append((f"{which} texts", ", ".join(base_name(s["source"]) for s in texts["sources"])))
            rows.append((f"digest of the {which} documents", texts["digest"]))
            rows.append((f"digest of the {which} rows", texts["rows_digest"]))
    return rows + [(f"version of {name}", version) for name, version in sorted(record["versions"].items())]
