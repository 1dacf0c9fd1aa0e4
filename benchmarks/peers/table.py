"""Results -> what people read: a line a job while it runs, one markdown table a model, and the picture (plot.py).

`python benchmarks/peers/table.py build/peers/results-test.json docs/peers` writes docs/peers.md and docs/peers.svg.
"""

import json
import sys
from pathlib import Path
from typing import Any

import plot

HEAD = (
    "peer",
    "group",
    "experts int4",
    "stored bytes",
    "bits/weight",
    "linear bits",
    "mean KL (95 %)",
    "median",
    "p99",
    "same top-1",
    "changed routes",
    "of the best other tool",
    "seconds",
    "peak RSS MB",
    "versions",
)


def _versions(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in row.get("versions", {}).items())


def _note(row: dict[str, Any]) -> str:
    """What the reader must know of a row beside its figures."""
    found = row["weights"]
    notes = []
    if row["status"] != "ok":
        notes.append(f"{row['status']}: relative error {found['error_max']:.2f} at {found['error_max_at']}")
    if found["all_zero"]:
        notes.append(f"{len(found['all_zero'])} matrices stored as zeros")
    if found["other_matrices_int4"] < found["other_matrices"]:
        notes.append(f"{found['other_matrices_int4']} of {found['other_matrices']} other matrices int4")
    return f" ({'; '.join(notes)})" if notes else ""


def whole(row: dict[str, Any]) -> bool:
    """Whether every linear weight of the blocks is stored in four bits, or as zeros."""
    found = row["weights"]
    low = found["expert_matrices_int4"] + found["other_matrices_int4"] + len(found["all_zero"])
    return bool(low == found["expert_matrices"] + found["other_matrices"])


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The mean KL of a row of ours over the least of another tool's, in the same groups, that takes no fewer bytes;
    where all of ours is in four bits, of those of which that is true too."""
    if not row["peer"].startswith("onecard") or "kl" not in row:
        return ""
    others = [
        other
        for other in rows
        if "kl" in other
        and not other["peer"].startswith(("onecard", "rtn"))
        and (other["model"], other["group"]) == (row["model"], row["group"])
        and other["stored_bytes"] >= row["stored_bytes"]
        and (whole(other) or not whole(row))
    ]
    if not others:
        return ""
    least = min(others, key=lambda other: other["kl"]["kl_mean_nats"])
    return f"{row['kl']['kl_mean_nats'] / least['kl']['kl_mean_nats']:.3f} of {least['peer']}"


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
    peak = f"{row['peak_rss_bytes'] / 1e6:.0f}" if "peak_rss_bytes" in row else ""
    if "kl" not in row:
        said = row.get("error", row["status"]).replace("|", "/").replace("\n", " ")
        said = said if len(said) <= 300 else said[:300] + " ..."
        return [row["peer"], str(row["group"]), f"{row['status']}: `{said}`", *[""] * 9, seconds, peak, _versions(row)]
    kl, weights = row["kl"], row["weights"]
    return [
        row["peer"] + _note(row),
        str(row["group"]),
        f"{weights['expert_matrices_int4']} of {weights['expert_matrices']}",
        f"{row['stored_bytes']:,}",
        f"{row['bits_per_weight']:.2f}",
        f"{row['linear_bits_per_weight']:.2f}",
        f"{kl['kl_mean_nats']:.5f} ({kl['kl_low_nats']:.5f} to {kl['kl_high_nats']:.5f})",
        f"{kl['kl_median_nats']:.5f}",
        f"{kl['kl_p99_nats']:.4f}",
        f"{kl['same_top1']:.2%}",
        f"{kl['changed_routes']:.2%}",
        beside(row, rows),
        seconds,
        peak,
        _versions(row),
    ]


def line(row: dict[str, Any]) -> str:
    """One job, for the terminal."""
    shown = cells(row, [])
    tail = (
        f", weight error {row['weights']['error_mean']:.3f} (most {row['weights']['error_max']:.3f})"
        if "kl" in row
        else ""
    )
    return f"{row['model']} " + " | ".join(cell for cell in shown[:-1] if cell) + tail


PREFACE = """# Beside other tools: all rows

Written by `python benchmarks/peers/table.py` from what `make peers` measured; what the columns mean and what is missing
stands in [benchmarks.md](benchmarks.md#beside-other-tools). "Of the best other tool": of the mean KL of the tool with
the least, among those in groups of that size in no fewer bytes (and, beside a row of ours that is all int4, all int4
too).
"""


def markdown(rows: list[dict[str, Any]]) -> str:
    out = [PREFACE]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        measured = next((row for row in own if "kl" in row), None)
        out.append(f"### {model}\n")
        if measured:
            kl = measured["kl"]
            out.append(f"The {measured['set']} set: {kl['documents']} documents, {kl['tokens']:,} predicted tokens.\n")
        out.append("| " + " | ".join(HEAD) + " |")
        out.append("|---" * len(HEAD) + "|")
        out += ["| " + " | ".join(cells(row, own)) + " |" for row in own]
        out.append("")
    return "\n".join(out)


def write(results: Path, stem: Path) -> None:
    rows = json.loads(results.read_text())
    stem.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    stem.with_suffix(".svg").write_text(plot.svg(rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
