"""The one JSON line that `quantize`, `verify` and `flips` print for scripts, from the record alone."""

from typing import Any

from ..core.record.schema import Record

# What the line repeats of the record's `kl` and `flips`.
LINE_KL = ("kl_mean_nats", "kl_low_nats", "kl_high_nats", "kl_p99_nats", "same_top1", "changed_routes", "tokens")
LINE_FLIPS = ("accuracy_reference", "accuracy_quantized", "changed", "right_to_wrong", "wrong_to_right")


def result_line(record: Record, out: str) -> dict[str, Any]:
    """The line of a finished run."""
    assert record.plan is not None
    line: dict[str, Any] = {
        "out": out,
        "emitted_bytes": record.plan.emitted_bytes,
        "bits_per_weight": record.plan.bits_per_weight,
        **{key: getattr(record.kl, key) for key in LINE_KL if record.kl is not None},
        "compute_dtype": record.measured_dtype,
        "seconds": record.machine.seconds,
        "peak_rss_bytes": record.machine.peak_rss_bytes,
    }
    if record.kl is not None and record.kl.floor is not None:
        line["floor_kl_mean_nats"] = record.kl.floor.kl_mean_nats
    if record.flips is not None:
        every = record.flips.all
        line |= {"items": every.items} | {key: getattr(every, key).share for key in LINE_FLIPS}
    if record.machine.peak_device_bytes:
        line["peak_device_bytes"] = record.machine.peak_device_bytes
    return line
