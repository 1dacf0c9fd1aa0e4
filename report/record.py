"""RunRecord: every number of a run, with its unit, as JSON with a schema version.

The terminal card and the JSON line are drawn from it alone. What two honest runs of one recipe on one source must have
in common lies outside `machine`; time, memory and the machine's name lie inside it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 2
# Of the record's `kl`, what the JSON line repeats.
LINE_KL = ("kl_mean_nats", "kl_low_nats", "kl_high_nats", "kl_p99_nats", "same_top1", "changed_routes", "tokens")
LINE_FLIPS = ("accuracy_reference", "accuracy_quantized", "changed", "right_to_wrong", "wrong_to_right")


@dataclass
class RunRecord:
    """Filled while a run goes on. `blocks` holds one entry a block: rows by expert, output errors by site.
    `identity` is all that the emitted bytes depend on; `files` the names of all that was put into OUT. `checkpoint` is
    what was measured; `kl` (eval/summary.py, eval/told.py), `errors` (eval/errors.py), `flips` (eval/flips.py) and
    `gate` are what was found of it, each empty where it was not asked for. `export`: of files that were written from
    another checkpoint's codes, which format they have and which checkpoint that was; `kl` and the like are then its.
    """

    command: str
    onecard: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    texts: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    kl: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    flips: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def result_line(record: RunRecord, out: str) -> dict[str, Any]:
    """The one JSON line for scripts."""
    line = {
        "out": out,
        "emitted_bytes": record.plan["emitted_bytes"],
        "bits_per_weight": record.plan["bits_per_weight"],
        **{key: record.kl[key] for key in LINE_KL if record.kl},
        "seconds": record.machine["seconds"],
        "peak_rss_bytes": record.machine["peak_rss_bytes"],
    }
    if record.flips:
        told = record.flips["all"]
        line |= {"items": told["items"]} | {key: told[key]["share"] for key in LINE_FLIPS}
    if record.machine.get("peak_device_bytes"):
        line["peak_device_bytes"] = record.machine["peak_device_bytes"]
    return line
