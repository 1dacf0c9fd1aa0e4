"""The measured parts of a made-up record: KL with its groups and worst tokens, errors of blocks and experts, flips."""

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


def document_facts(rng: random.Random, number: int, shift: float) -> dict[str, Any]:
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


def bucket(rng: random.Random, label: str, mean: float, tokens: int) -> dict[str, Any]:
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


def kl_facts(rng: random.Random, by_document: list[dict[str, Any]], blocks: int, shift: float) -> dict[str, Any]:
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
            bucket(rng, label, mean * f, tokens // 6)
            for label, f in (
                ("0 to 31", 1.3),
                ("32 to 63", 1.1),
                ("64 to 127", 1),
                ("128 to 255", 0.9),
                ("256 on", 0.9),
            )
        ],
        "by_likeness": [
            bucket(rng, "texts like calibration", mean, tokens // 2),
            bucket(rng, "others", mean * 1.2, tokens // 2),
        ],
        "by_kind": [
            bucket(rng, kind, mean * f, tokens // 6)
            for kind, f in zip(KINDS, (1, 0.7, 1.05, 1.3, 1.5, 1.1), strict=True)
        ],
        "by_confidence": [bucket(rng, label, mean * f, tokens // 5) for label, f in confidence],
        "by_document": by_document,
        "worst_tokens": [worst_token(rng, rank, shift) for rank in range(20)],
    }


def worst_token(rng: random.Random, rank: int, shift: float) -> dict[str, Any]:
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


def error_facts(rng: random.Random, rows: list[list[int]]) -> dict[str, Any]:
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


def flip_facts(rng: random.Random) -> dict[str, Any]:
    tasks = [
        task_facts(rng, name, items) for name, items in (("questions", 400), ("arc_challenge", 300), ("hellaswag", 500))
    ]
    answers = [answer for task in tasks for answer in task["answers"]]
    return {"all": {k: v for k, v in summary("all", answers).items() if k != "answers"}, "tasks": tasks}


def task_facts(rng: random.Random, name: str, items: int) -> dict[str, Any]:
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
    return summary(name, answers)


def summary(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
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
