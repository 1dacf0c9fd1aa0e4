"""The figures of the real model that the documents show: docs/results/real.json.

real.py writes whole results to build/, which git ignores. `python benchmarks/real.py keep` puts the test rows of the
jobs with their default options into the file, in place of older ones; update_docs.py makes the tables of it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from table import least_in_bold, table

from . import documents, judging

KEPT = Path(__file__).resolve().parent.parent.parent / "docs" / "results" / "real.json"
# A job's peer -> what the tables call it, in their order.
SHOWN = {
    "onecard-best": "onecard `best`",
    "onecard-balanced": "onecard `balanced`",
    "onecard-fast": "onecard `fast`",
    "auto-round": "auto-round, 200 steps",
    "llmcompressor-gptq": "llm-compressor GPTQ",
}
# What ours are measured by.
BESIDE = "auto-round"
KINDS = (judging.HOME, *documents.AWAY)


@dataclass(frozen=True)
class KeptRow:
    """One peer in one group size: mean KL in nats by kind, and for home its interval over documents and the share of
    equal top-1; None where that was not kept."""

    peer: str
    group: int
    kl: dict[str, float]
    low: float | None
    high: float | None
    same_top1: float
    stored_bytes: int
    cpu_seconds: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> "KeptRow":
        """From a result of real.py."""
        home = found["kl"][judging.HOME]
        return cls(
            peer=found["peer"],
            group=found["group"],
            kl={kind: round(found["kl"][kind]["kl_mean_nats"], 5) for kind in KINDS},
            low=round(home["kl_low_nats"], 5),
            high=round(home["kl_high_nats"], 5),
            same_top1=round(home["same_top1"], 5),
            stored_bytes=found["stored_bytes"],
            cpu_seconds=round(found["cpu_seconds"]),
        )


def read_kept() -> list[KeptRow]:
    return [KeptRow(**row) for row in json.loads(KEPT.read_text())]


def keep(results: Path) -> None:
    """Raises FileNotFoundError without results."""
    new = [
        KeptRow.of(found)
        for found in json.loads(results.read_text())
        if "error" not in found and not found["changed"] and found.get("texts", "home") == "home"
    ]
    told = {(row.peer, row.group) for row in new}
    old = [row for row in (read_kept() if KEPT.exists() else []) if (row.peer, row.group) not in told]
    order = {peer: place for place, peer in enumerate(SHOWN)}
    rows = sorted(old + new, key=lambda row: (-row.group, order.get(row.peer, len(order))))
    KEPT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def short(group: int) -> str:
    """README.md: mean KL by kind, the least of each in bold."""
    rows = [row for row in read_kept() if row.group == group and row.peer in SHOWN]
    cells = zip(rows, least_in_bold([[row.kl[kind] for kind in KINDS] for row in rows], 4), strict=True)
    body = [[SHOWN[row.peer], *figures] for row, figures in cells]
    return table(("mean KL, nats", "texts like calibration", *documents.AWAY), body)


def whole() -> str:
    """docs/benchmarks.md: every row, and ours over the other tool."""
    rows = read_kept()
    body = []
    for row in rows:
        interval = f" ({row.low:.4f} to {row.high:.4f})" if row.low is not None else ""
        means = [f"{row.kl[kind]:.4f}" for kind in KINDS]
        more = [f"{row.same_top1:.2%}", f"{row.stored_bytes:,}", f"{row.cpu_seconds:,.0f}"]
        body.append([SHOWN.get(row.peer, row.peer), str(row.group), means[0] + interval, *means[1:], *more])
        beside = [other for other in rows if (other.peer, other.group) == (BESIDE, row.group)]
        if row.peer.startswith("onecard-") and beside:
            ratios = [f"{row.kl[kind] / beside[0].kl[kind]:.2f}" for kind in KINDS]
            costs = [
                f"{row.stored_bytes / beside[0].stored_bytes:.3f}",
                f"{row.cpu_seconds / beside[0].cpu_seconds:.2f}",
            ]
            body.append([f"over {SHOWN[BESIDE]}", str(row.group), *ratios, "", *costs])
    head = ("", "group", *KINDS, "same top-1, home", "stored bytes", "CPU seconds")
    return table(head, body)
