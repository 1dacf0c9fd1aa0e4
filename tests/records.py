"""Records as `quantize`, `verify` and `flips` write them, made up from a seed: for tests of what is drawn from them.

`full_record()` has every part that a record can have, with figures that hang together (a mean that its documents have,
intervals around it, the worst experts of the list of experts). It needs no model and no walk.
"""

import random
from typing import Any

from measured import document_facts, error_facts, flip_facts, kl_facts

ROLES = [
    ("expert", "int4 group 128", 96_636_764_160),
    ("attention", "BF16", 3_019_898_880),
    ("shared_expert", "int4 group 128", 6_039_797_760),
    ("embedding", "BF16", 1_034_485_760),
    ("head", "BF16", 1_034_485_760),
    ("vision", "BF16", 860_000_000),
    ("router", "BF16", 3_932_160),
    ("norm", "BF16", 496_640),
]


def full_record(
    seed: int = 0,
    blocks: int = 8,
    experts: int = 16,
    documents: int = 60,
    shift: float = 1.0,
    name: str = "Llama-4-Scout-17B-16E-Instruct",
) -> dict[str, Any]:
    """A record with every part. `shift` multiplies every KL: 1.1 gives a record ten percent worse."""
    rng = random.Random(seed)
    by_document = [document_facts(rng, n, shift) for n in range(documents)]
    plan = plan_facts()
    rows = [[int(rng.lognormvariate(8, 0.7)) for _ in range(experts)] for _ in range(blocks)]
    rows[blocks // 2][3], rows[blocks - 1][experts - 1] = 41, 0
    return {
        "command": "quantize",
        "onecard": "0.1.0",
        "schema_version": 2,
        "model": {"name": name, "family": "llama4", "blocks": blocks, "experts": experts, "digest": "87bf212e" * 8},
        "checkpoint": {"name": f"{name}-int4", "digest": "1f00d5ee" * 8, "bytes": plan["emitted_bytes"]},
        "recipe": {
            "name": "llama4-scout-h100",
            "method": "best",
            "bits": 4,
            "group_size": 128,
            "note": None,
            "warn_below_expert_rows": 256,
            "digest": "0c0ffee0" * 8,
            "calibration": {"source": "chats.jsonl"},
        },
        "texts": {
            which: {
                "source": f"{which}.jsonl",
                "documents": documents,
                "rows": documents,
                "tokens": 61_310,
                "digest": "74829622" * 8,
                "rows_digest": "1d031e4e" * 8,
                "tokens_by_kind": {"prose": 40_000, "code": 21_310},
            }
            for which in ("calibration", "evaluation")
        },
        "plan": plan,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "identity": {"device": "cpu"},
        "files": ["config.json", "model-00001-of-00014.safetensors", "onecard.json"],
        "blocks": [
            {
                "block": b,
                "expert_rows": row,
                "damping_raised": 0,
                "diagonal_fallbacks": 0,
                "output_error": {},
                "aimed": [],
                "tuning": [],
            }
            for b, row in enumerate(rows)
        ],
        "fallbacks": {
            "damping_raised": 2,
            "diagonal_fallbacks": 0,
            "experts_in_all": blocks * experts,
            "experts_starved": 2,
            "experts_without_rows": 1,
            "least_rows_of_an_expert": 0,
        },
        "warnings": ["block 7: 1 of 16 experts got fewer than 256 rows"],
        "kl": kl_facts(rng, by_document, blocks, shift),
        "errors": error_facts(rng, rows),
        "flips": flip_facts(rng),
        "gate": gate_facts(),
        "machine": {
            "platform": "Linux",
            "processor": "x86_64",
            "cores": 16,
            "threads": 16,
            "device": "NVIDIA H100",
            "seconds": 7261.2,
            "stage_seconds": {"quantize": 5012.3, "verify: quantized": 813.9},
            "peak_rss_bytes": 41_200_000_000,
            "peak_device_bytes": 61_300_000_000,
        },
    }


def plan_facts() -> dict[str, Any]:
    """The plan of Scout with int4 experts: true parameters, bytes of plausible size."""
    widths = [
        {"role": role, "width": width, "parameters": n, "bytes": n // 8 * 33 // 8 if "int4" in width else 2 * n}
        for role, width, n in ROLES
    ]
    emitted = sum(entry["bytes"] for entry in widths) + 1_234_568
    weights = sum(entry["parameters"] for entry in widths)
    low = [entry for entry in widths if "int4" in entry["width"]]
    return {
        "emitted_bytes": emitted,
        "source_bytes": 2 * weights + 99_000,
        "parameters": weights,
        "shards": 14,
        "quantized_parameters": sum(e["parameters"] for e in low),
        "widths": widths,
        "quantized_share": sum(e["parameters"] for e in low) / weights,
        "bits_per_weight": emitted * 8 / weights,
        "quantized_bits_per_weight": 4.125,
    }


def gate_facts() -> dict[str, Any]:
    """A gate that passed two limits, one of them narrowly."""
    return {
        "passed": True,
        "report": "run.json",
        "baseline": None,
        "checks": [
            {
                "name": "max_kl_mean_nats",
                "kind": "limit",
                "passed": True,
                "measured": 0.0131,
                "allowed": 0.02,
                "said": "0.01308 nats (0.01256 to 0.01373), at most 0.02",
                "low": 0.01256,
                "high": 0.01373,
            },
            {
                "name": "max_flip_rate",
                "kind": "limit",
                "passed": True,
                "measured": 0.0383,
                "allowed": 0.05,
                "said": "3.83 % (2.89 % to 5.08 %), at most 5 %",
                "low": 0.0289,
                "high": 0.0508,
            },
        ],
        "notes": ["max_flip_rate: its interval reaches beyond the limit"],
    }


KINDS_OF_UNIT = ("attention.qkv", "attention.o", "shared_expert", "experts")
# Width -> (bytes for each weight, error that it leaves).
PRICED = {
    "int4 group 128": (0.52, 0.07),
    "int4 group 32": (0.57, 0.06),
    "int8 group 128": (1.02, 0.004),
    "keep": (2.0, 0.0),
}


def allocation_facts(blocks: int = 4, seed: int = 0) -> dict[str, Any]:
    """The record's `allocation` after a run with `bits: fit`. Every width is used by some unit."""
    rng = random.Random(seed)
    units: list[dict[str, Any]] = []
    prices: list[dict[str, Any]] = []
    for number, (block, kind) in enumerate((b, k) for b in range(blocks) for k in KINDS_OF_UNIT):
        weights = 786_432 if kind == "experts" else 32_768
        name = f"model.layers.{block}.{kind}"
        smooth = rng.lognormvariate(0, 0.6)
        got = list(PRICED)[(number + block) % len(PRICED)]
        role = "attention" if kind.startswith("attention") else kind.rstrip("s")
        units.append(
            {
                "unit": name,
                "role": role,
                "block": block,
                "kind": kind,
                "width": got,
                "bytes": int(weights * PRICED[got][0]),
            }
        )
        widths = [
            {"width": width, "bytes": int(weights * size), "error": error, "kl_nats": smooth * error**2}
            for width, (size, error) in PRICED.items()
        ]
        prices.append(
            {"unit": name, "role": role, "parameters": weights, "smooth": smooth, "flip": 0.0, "widths": widths}
        )
    together = {}
    for width in list(PRICED)[:-1]:
        total = sum(w["kl_nats"] for unit in prices for w in unit["widths"] if w["width"] == width)
        together[width] = {"measured_nats": total * 1.1, "predicted_nats": total}
    return {
        "budget_bytes": sum(unit["bytes"] for unit in units) + 1_000_000,
        "predicted_kl_nats": 0.0113,
        "gain": 0.7,
        "units": units,
        "prices": {"units": prices, "together": together, "scale": 1.1, "rows": 64, "tokens": 32_768},
    }
