"""Rows of the comparison in words: one line a job while it runs, and one markdown table a model.

`python benchmarks/update_docs.py` puts the tables into docs/peers.md, docs/benchmarks.md and README.md, and draws
docs/peers.svg (plot.py). run.py writes the same beside its results.
"""

from pathlib import Path

import plot
from rows import PeerRow

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


def _versions(row: PeerRow) -> str:
    return ", ".join(f"{name} {number}" for name, number in row.versions.items())


def _note(row: PeerRow) -> str:
    """Remarks on a row, in brackets."""
    notes = [] if row.status == "ok" else [f"{row.status}: {row.said}"]
    if row.weights and row.weights.zeros:
        notes.append(f"{row.weights.zeros} matrices stored as zeros")
    if row.weights and row.weights.others_int4 < row.weights.others:
        notes.append(f"{row.weights.others_int4} of {row.weights.others} other matrices int4")
    return f" ({'; '.join(notes)})" if notes else ""


def cells(row: PeerRow) -> list[str]:
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    peak = "" if row.peak_rss_mb is None else f"{row.peak_rss_mb}"
    if row.weights is None or row.kl_mean_nats is None:
        said = row.said.replace("|", "/").replace("\n", " ")
        said = said if len(said) <= 300 else said[:300] + " ..."
        return [row.peer, str(row.group), f"{row.status}: `{said}`", *[""] * 9, seconds, peak, _versions(row)]
    return [
        row.peer + _note(row),
        str(row.group),
        f"{row.weights.experts_int4} of {row.weights.experts}",
        f"{row.stored_bytes:,}",
        f"{row.bits_per_weight:.2f}",
        f"{row.linear_bits_per_weight:.2f}",
        f"{row.kl_mean_nats:.5f} ({row.kl_low_nats:.5f} to {row.kl_high_nats:.5f})",
        f"{row.kl_median_nats:.5f}",
        f"{row.kl_p99_nats:.4f}",
        f"{row.same_top1:.2%}",
        f"{row.changed_routes:.2%}",
        row.beside,
        seconds,
        peak,
        _versions(row),
    ]


def line(row: PeerRow) -> str:
    """One job, for the terminal."""
    return f"{row.model} " + " | ".join(cell for cell in cells(row)[:-1] if cell)


def table(head: tuple[str, ...], body: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def least_in_bold(body: list[list[float]], digits: int) -> list[list[str]]:
    """Figures in words, the least of each column in bold."""
    least = [min(column) for column in zip(*body, strict=True)]
    said = [[f"{x:.{digits}f}" for x in row] for row in body]
    return [
        [f"**{words}**" if x == low else words for words, x, low in zip(cells, row, least, strict=True)]
        for cells, row in zip(said, body, strict=True)
    ]


def markdown(rows: list[PeerRow]) -> str:
    """Every row, a table a model."""
    out = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        measured = next((row for row in own if row.kl_mean_nats is not None), None)
        out.append(f"### {model}\n")
        if measured:
            out.append(
                f"The {measured.set} set: {measured.documents} documents, {measured.tokens:,} predicted tokens.\n"
            )
        out.append(table(HEAD, [cells(row) for row in own]) + "\n")
    return "\n".join(out)


def write(rows: list[PeerRow], stem: Path) -> None:
    """The tables and the picture of a run, beside its results."""
    stem.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    stem.with_suffix(".svg").write_text(plot.svg(rows), encoding="utf-8")
