"""A row of the comparison as the documents show it, and the file that keeps all rows: docs/results/peers.json.

run.py writes whole results to build/, which git ignores. The documents need fewer figures, rounded. Those are
committed, so that every table and picture of the comparison comes from one file. The file's head says which run the
rows are from. `python benchmarks/peers/rows.py DATE` makes it of build/peers/results-test.json.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "build" / "peers" / "results-test.json"
KEPT = ROOT / "docs" / "results" / "peers.json"


@dataclass(frozen=True)
class JudgedWeights:
    """What the judge found in a checkpoint: matrices stored in at most 16 values a group, of all matrices."""

    experts_int4: int
    experts: int
    others_int4: int
    others: int
    zeros: int = 0

    @property
    def whole(self) -> bool:
        """Whether every linear weight of the blocks is stored in four bits, or as zeros."""
        return self.experts_int4 + self.others_int4 + self.zeros == self.experts + self.others


@dataclass(frozen=True)
class PeerRow:
    """One peer on one model in one group size. KL in nats; `kl_mean_nats` None: the peer did not run.

    `beside`: a row of ours over the best other tool, e.g. '0.573 of auto-round'. It is kept because it was computed
    before rounding.
    """

    peer: str
    model: str
    group: int
    set: str
    status: str
    calibrated: bool
    documents: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    bits_per_weight: float = 0.0
    linear_bits_per_weight: float = 0.0
    kl_mean_nats: float | None = None
    kl_low_nats: float = 0.0
    kl_high_nats: float = 0.0
    kl_median_nats: float = 0.0
    kl_p99_nats: float = 0.0
    same_top1: float = 0.0
    changed_routes: float = 0.0
    weights: JudgedWeights | None = None
    seconds: float | None = None
    peak_rss_mb: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    said: str = ""
    beside: str = ""

    @property
    def ours(self) -> bool:
        return self.peer.startswith("onecard")

    @property
    def kl(self) -> float:
        assert self.kl_mean_nats is not None, f"{self.peer} did not run"
        return self.kl_mean_nats


def row_of(raw: dict[str, Any], beside: str = "") -> PeerRow:
    """A row of run.py's results."""
    row = {name: raw[name] for name in ("peer", "model", "group", "set", "status", "calibrated")}
    row |= {"versions": raw.get("versions", {}), "beside": beside}
    if "seconds" in raw:
        row["seconds"] = round(raw["seconds"], 1)
    if "peak_rss_bytes" in raw:
        row["peak_rss_mb"] = round(raw["peak_rss_bytes"] / 1e6)
    if "kl" not in raw:
        return PeerRow(**row, said=raw.get("error", raw["status"]))
    kl, found = raw["kl"], raw["weights"]
    said = f"relative error {found['error_max']:.2f} at {found['error_max_at']}" if raw["status"] != "ok" else ""
    return PeerRow(
        **row,
        said=said,
        documents=kl["documents"],
        tokens=kl["tokens"],
        stored_bytes=raw["stored_bytes"],
        bits_per_weight=round(raw["bits_per_weight"], 2),
        linear_bits_per_weight=round(raw["linear_bits_per_weight"], 2),
        kl_p99_nats=round(kl["kl_p99_nats"], 4),
        same_top1=round(kl["same_top1"], 4),
        changed_routes=round(kl["changed_routes"], 4),
        **{name: round(kl[name], 5) for name in ("kl_mean_nats", "kl_low_nats", "kl_high_nats", "kl_median_nats")},
        weights=JudgedWeights(
            experts_int4=found["expert_matrices_int4"],
            experts=found["expert_matrices"],
            others_int4=found["other_matrices_int4"],
            others=found["other_matrices"],
            zeros=len(found["all_zero"]),
        ),
    )


def rows_of(results: list[dict[str, Any]]) -> list[PeerRow]:
    """All rows of run.py's results, each of ours beside the best other tool's."""
    return [row_of(raw, _beside(raw, results)) for raw in results]


def _beside(raw: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The mean KL of a row of ours over the least of another tool's.

    The other tool's row has the same model and group size and no fewer bytes. Where ours is all int4, so is the other.
    """
    if not raw["peer"].startswith("onecard") or "kl" not in raw:
        return ""

    def whole(row: dict[str, Any]) -> bool:
        found = row_of(row).weights
        return found is not None and found.whole

    others = [
        other
        for other in results
        if "kl" in other
        and not other["peer"].startswith(("onecard", "rtn"))
        and (other["model"], other["group"]) == (raw["model"], raw["group"])
        and other["stored_bytes"] >= raw["stored_bytes"]
        and (whole(other) or not whole(raw))
    ]
    if not others:
        return ""
    least = min(others, key=lambda other: other["kl"]["kl_mean_nats"])
    return f"{raw['kl']['kl_mean_nats'] / least['kl']['kl_mean_nats']:.3f} of {least['peer']}"


def read_kept(path: Path = KEPT) -> list[PeerRow]:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [PeerRow(**row | {"weights": row["weights"] and JudgedWeights(**row["weights"])}) for row in rows]


def write_kept(run: dict[str, str], rows: list[PeerRow], path: Path = KEPT) -> None:
    """`run`: date, command and what else a reader must know of the run. One row a line, so that a diff shows rows."""
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"run": {json.dumps(run, indent=1)},\n "rows": [\n  {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    given = {"date": sys.argv[1], "command": "make peers"} if len(sys.argv) > 1 else sys.exit("say the run's date")
    write_kept(given, rows_of(json.loads(RESULTS.read_text(encoding="utf-8"))))
