"""Records as `quantize`, `verify` and `flips` write them, made up from a seed: for tests of what is drawn from them.

`full_record()` has every part that a record can have, with figures that hang together (a mean that its documents have,
intervals around it, the worst experts of the list of experts). It needs no model and no walk.
"""

import math
import random
from itertools import accumulate, pairwise
from typing import Any

KINDS = ("prose", "code", "conversation", "language", "image tokens", "after an image")
TEXT = (
    "the river was low that year and the ferry could not cross before noon so they waited by the mill and talked of "
    "rain of prices and of the new bridge which nobody believed in until it stood there"
)
WORDS = TEXT.split()
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
    by_document = [_document(rng, n, shift) for n in range(documents)]
    widths = [
        {"role": role, "width": width, "parameters": n, "bytes": n // 8 * 33 // 8 if "int4" in width else 2 * n}
        for role, width, n in ROLES
    ]
    emitted = sum(entry["bytes"] for entry in widths) + 1_234_568
    weights = sum(entry["parameters"] for entry in widths)
    low = [entry for entry in widths if "int4" in entry["width"]]
    rows = [[int(rng.lognormvariate(8, 0.7)) for _ in range(experts)] for _ in range(blocks)]
    rows[blocks // 2][3], rows[blocks - 1][experts - 1] = 41, 0
    return {
        "command": "quantize",
        "onecard": "0.1.0",
        "schema_version": 2,
        "model": {"name": name, "family": "llama4", "blocks": blocks, "experts": experts, "digest": "87bf212e" * 8},
        "checkpoint": {"name": f"{name}-int4", "digest": "1f00d5ee" * 8, "bytes": emitted},
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
        "plan": {
            "emitted_bytes": emitted,
            "source_bytes": 2 * weights + 99_000,
            "parameters": weights,
            "shards": 14,
            "quantized_parameters": sum(e["parameters"] for e in low),
            "widths": widths,
            "quantized_share": sum(e["parameters"] for e in low) / weights,
            "bits_per_weight": emitted * 8 / weights,
            "quantized_bits_per_weight": 4.125,
        },
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
        "kl": _kl(rng, by_document, blocks, shift),
        "errors": _errors(rng, rows),
        "flips": _flips(rng),
        "gate": {
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
        },
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


def _document(rng: random.Random, number: int, shift: float) -> dict[str, Any]:
    kind = KINDS[number % 4]
    mean = shift * rng.lognormvariate(-4.4, 0.45) * (0.7 if kind == "code" else 1.2 if kind == "language" else 1)
    hard = 2.0 + rng.gauss(0, 0.5) - (1.1 if kind == "code" else 0)
    return {
        "document": number,
        "digest": f"{rng.getrandbits(64):016x}",
        "kind": kind,
        "source": "evaluation.jsonl",
        "tokens": rng.randint(120, 511),
        "kl_mean_nats": mean,
        "same_top1": 1 - min(0.4, 5 * mean),
        "nll_reference": hard,
        "nll_quantized": hard + mean * rng.uniform(0.2, 1.2),
    }


def _bucket(rng: random.Random, label: str, mean: float, tokens: int) -> dict[str, Any]:
    value, half = mean * rng.uniform(0.9, 1.1), mean * rng.uniform(0.05, 0.15)
    return {
        "label": label,
        "tokens": tokens,
        "documents": 60,
        "kl_mean_nats": value,
        "kl_low_nats": value - half,
        "kl_high_nats": value + half,
        "same_top1": 1 - min(0.4, 5 * value),
    }


def _kl(rng: random.Random, by_document: list[dict[str, Any]], blocks: int, shift: float) -> dict[str, Any]:
    tokens = sum(d["tokens"] for d in by_document)
    mean = sum(d["tokens"] * d["kl_mean_nats"] for d in by_document) / tokens
    edges = [0.0, *(10 ** (-7 + 0.25 * i) for i in range(35))]
    weights = [0.004, *(math.exp(-((math.log10(math.sqrt(a * b)) + 2.4) ** 2) / 0.8) for a, b in pairwise(edges[1:]))]
    counts = [round(tokens * w / sum(weights)) for w in weights]
    counts[20] += tokens - sum(counts)
    below = list(accumulate(counts))
    quantile = {
        q: edges[1 + next(i for i, n in enumerate(below) if n >= q * tokens)] for q in (0.5, 0.9, 0.95, 0.99, 0.999)
    }
    confidence = [
        (f"{a / 10:.1f} to {(a + 2) / 10:.1f}", f) for a, f in ((0, 1.9), (2, 1.6), (4, 1.4), (6, 1), (8, 0.4))
    ]
    return {
        "tokens": tokens,
        "documents": len(by_document),
        "kl_mean_nats": mean,
        "kl_standard_error_nats": mean * 0.02,
        "kl_low_nats": mean * 0.96,
        "kl_high_nats": mean * 1.05,
        "kl_median_nats": quantile[0.5],
        "kl_p90_nats": quantile[0.9],
        "kl_p95_nats": quantile[0.95],
        "kl_p99_nats": quantile[0.99],
        "kl_p999_nats": quantile[0.999],
        "kl_max_nats": 6.3 * shift,
        "reverse_kl_mean_nats": mean * 1.02,
        "same_top1": 0.9246,
        "same_top1_low": 0.9211,
        "same_top1_high": 0.9279,
        "top5_overlap": 0.9412,
        "delta_p_mean": -0.0007,
        "delta_p_rms": 0.021,
        "delta_p_quantiles": {
            "p01": -0.07,
            "p05": -0.03,
            "p25": -0.004,
            "p50": 0.0,
            "p75": 0.003,
            "p95": 0.028,
            "p99": 0.066,
        },
        "perplexity_reference": 13.341,
        "perplexity_quantized": 13.468,
        "perplexity_ratio": 1.00952,
        "perplexity_ratio_low": 1.0071,
        "perplexity_ratio_high": 1.0119,
        "interval": {
            "method": "bootstrap over documents",
            "level": 0.95,
            "resamples": 10_000,
            "seed": 0,
            "documents": len(by_document),
        },
        "changed_routes": 0.06,
        "changed_routes_by_block": {str(b): 0.01 * b for b in range(blocks)},
        "histogram": {"edges_nats": edges, "tokens": counts},
        "by_position": [
            _bucket(rng, label, mean * f, tokens // 6)
            for label, f in (
                ("0 to 31", 1.3),
                ("32 to 63", 1.1),
                ("64 to 127", 1),
                ("128 to 255", 0.9),
                ("256 on", 0.9),
            )
        ],
        "by_kind": [
            _bucket(rng, kind, mean * f, tokens // 6)
            for kind, f in zip(KINDS, (1, 0.7, 1.05, 1.3, 1.5, 1.1), strict=True)
        ],
        "by_confidence": [_bucket(rng, label, mean * f, tokens // 5) for label, f in confidence],
        "by_document": by_document,
        "worst_tokens": [_token(rng, rank, shift) for rank in range(20)],
    }


def _token(rng: random.Random, rank: int, shift: float) -> dict[str, Any]:
    def some(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    sure = rng.uniform(0.6, 0.95)
    return {
        "document": rng.randrange(60),
        "kind": rng.choice(KINDS),
        "position": rng.randint(4, 500),
        "kl_nats": shift * 6.3 / (1 + rank) ** 0.5,
        "before": some(24) + " ",
        "token": rng.choice(WORDS),
        "after": " " + some(10),
        "p_reference": sure,
        "p_quantized": sure / 9,
        "reference_top": [[f" {some(1)}", sure], [f" {some(1)}", (1 - sure) / 2], ["\n", (1 - sure) / 4]],
        "quantized_top": [[f" {some(1)}", 0.71], [f" {some(1)}", 0.12], [f" {some(1)}", sure / 9]],
    }


def _errors(rng: random.Random, rows: list[list[int]]) -> dict[str, Any]:
    experts = []
    for block, row in enumerate(rows):
        for expert, count in enumerate(row):
            error = 0.06 * (1 + 2.2 / math.sqrt(1 + count / 60)) * rng.uniform(0.9, 1.1)
            experts.append(
                {
                    "block": block,
                    "expert": expert,
                    "weight_error": error * 1.15,
                    "output_error": error,
                    "weight_gain": 1 - error / 20,
                    "rows": count // 9,
                    "calibration_rows": count,
                    "score": error,
                }
            )
    blocks = []
    hidden = 0.0
    for block in range(len(rows)):
        attention, feed_forward = 0.004 * rng.uniform(0.8, 1.2), 0.011 * rng.uniform(0.8, 1.2)
        hidden = 0.93 * hidden + attention + feed_forward
        units = {
            "self_attn.qkv": attention * 2,
            "self_attn.o": attention * 1.4,
            "experts": feed_forward * 5,
            "shared_expert": feed_forward * 4,
        }
        blocks.append(
            {"block": block, "hidden": hidden, "attention": attention, "feed_forward": feed_forward, "units": units}
        )
    return {
        "blocks": blocks,
        "experts": experts,
        "worst_experts": sorted(experts, key=lambda e: -float(e["score"]))[:10],
    }


def share(count: int, items: int) -> dict[str, Any]:
    """A share with Wilson's interval at 95 %."""
    z, p = 1.96, count / items
    middle, half = p + z * z / (2 * items), z * math.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    whole = 1 + z * z / items
    return {
        "share": p,
        "low": max(0.0, (middle - half) / whole),
        "high": min(1.0, (middle + half) / whole),
        "count": count,
    }


def _flips(rng: random.Random) -> dict[str, Any]:
    tasks = [
        _task(rng, name, items) for name, items in (("questions", 400), ("arc_challenge", 300), ("hellaswag", 500))
    ]
    answers = [answer for task in tasks for answer in task["answers"]]
    return {"all": {k: v for k, v in _summary("all", answers).items() if k != "answers"}, "tasks": tasks}


def _task(rng: random.Random, name: str, items: int) -> dict[str, Any]:
    answers = []
    for number in range(items):
        right = rng.randrange(4)
        reference = right if rng.random() < 0.71 else (right + 1) % 4
        quantized = reference if rng.random() < 0.95 else rng.randrange(4)
        answers.append(
            {
                "id": f"{name}-{number}",
                "right": right,
                "reference": reference,
                "quantized": quantized,
                "margin_reference": rng.random() * 4,
                "margin_quantized": rng.random() * 4,
            }
        )
    return _summary(name, answers)


def _summary(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    items = len(answers)
    was, now = ([a[side] == a["right"] for a in answers] for side in ("reference", "quantized"))
    return {
        "task": name,
        "items": items,
        "digest": "5eed0f17" * 8,
        "shots": 0,
        "accuracy_reference": share(sum(was), items),
        "accuracy_quantized": share(sum(now), items),
        "changed": share(sum(a["reference"] != a["quantized"] for a in answers), items),
        "right_to_wrong": share(sum(a and not b for a, b in zip(was, now, strict=True)), items),
        "wrong_to_right": share(sum(b and not a for a, b in zip(was, now, strict=True)), items),
        "mcnemar_p": 0.21,
        "margin_of_changed": 0.62,
        "margin_of_all": 2.01,
        "answers": answers,
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
