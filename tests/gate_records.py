"""A record of `quantize` that a gate can judge, changed at will, and what the gate prints about it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

from command_line import Command
from onecard.core.record.schema import SCHEMA_VERSION

DOCUMENTS = 60


def record(factor: float = 1.0, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A record of `quantize`. One seed always gives the same KL for each document, times `factor`."""
    rng = random.Random(seed)
    documents = []
    for number in range(DOCUMENTS):
        tokens, kl = rng.randint(50, 400), factor * rng.lognormvariate(-5, 1)
        same = 1 - min(0.5, 8 * kl)
        documents.append(
            {
                "document": number,
                "digest": f"{number:016x}",
                "kind": "prose",
                "source": "x",
                "tokens": tokens,
                "kl_mean_nats": kl,
                "same_top1": same,
            }
        )
    total = sum(d["tokens"] for d in documents)
    mean = sum(d["tokens"] * d["kl_mean_nats"] for d in documents) / total
    same_top1 = sum(d["tokens"] * d["same_top1"] for d in documents) / total
    answers = [{"id": str(i), "right": 0, "reference": i % 4, "quantized": (i + (i % 20 == 0)) % 4} for i in range(300)]
    share = {"share": 0.05, "low": 0.031, "high": 0.08, "count": 15}
    figures = {
        "items": 300,
        "changed": share,
        **dict.fromkeys(("accuracy_reference", "accuracy_quantized", "right_to_wrong", "wrong_to_right"), share),
    }
    return {
        "command": "quantize",
        "onecard": "0",
        "schema_version": SCHEMA_VERSION,
        "model": {"name": "/home/me/m", "family": "llama4", "blocks": 2, "digest": "a" * 64},
        "recipe": {"name": "r", "max_kl_mean_nats": 0.05, "max_fallbacks": 0},
        "texts": {"evaluation": {"source": "/home/me/secret.jsonl", "rows_digest": "b" * 64, "rows": DOCUMENTS}},
        "plan": {"emitted_bytes": 1000},
        "versions": {},
        "identity": {},
        "compute_dtype": "float32",
        "files": [],
        "warnings": [],
        "blocks": [{"block": 0, "expert_rows": [70, 300]}],
        "fallbacks": {"diagonal_fallbacks": 0},
        "kl": {
            "tokens": total,
            "documents": DOCUMENTS,
            "kl_mean_nats": mean,
            "kl_standard_error_nats": mean / 12,
            "kl_low_nats": 0.85 * mean,
            "kl_high_nats": 1.2 * mean,
            "kl_p99_nats": 0.2,
            "same_top1": same_top1,
            "same_top1_low": same_top1 - 0.01,
            "same_top1_high": same_top1 + 0.01,
            "by_document": documents,
            "worst_tokens": [
                {
                    "document": 3,
                    "position": 7,
                    "kl_nats": 0.9,
                    "before": "a text that is nobody's business",
                    "token": " either",
                }
            ],
        },
        "flips": {
            "all": {"task": "all", **figures},
            "tasks": [{"task": "demo", "digest": "d", "shots": 0, "answers": answers, **figures}],
        },
        "machine": {"device": "cpu", "host": "nobody's business"},
    } | changes


def line(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.stdout.count("\n") == 1
    return dict(json.loads(result.stdout))


def checks(result: Result, code: int) -> dict[str, dict[str, Any]]:
    found = line(result, code)
    assert found["passed"] == (code == 0) == all(check["passed"] for check in found["checks"])
    return {f"{check['kind']} {check['name']}": check for check in found["checks"]}


# --- against a baseline


def against(
    onecard: Command, write: Callable[..., Path], now: dict[str, Any], before: dict[str, Any], *options: object
) -> Result:
    frozen = write("frozen.json", before).with_name("baseline.json")
    assert onecard("baseline", write("frozen.json", before), "-o", frozen).exit_code == 0
    return onecard("gate", write("now.json", now), "--baseline", frozen, *options)


def noisy(factor: float, spread: float, seed: int = 1) -> dict[str, Any]:
    """A record whose KLs moved by `factor`, with log-normal noise of this spread for each document."""
    rng = random.Random(seed)
    made = record()
    for document in made["kl"]["by_document"]:
        document["kl_mean_nats"] *= factor * rng.lognormvariate(0, spread)
    total = made["kl"]["tokens"]
    made["kl"]["kl_mean_nats"] = sum(d["tokens"] * d["kl_mean_nats"] for d in made["kl"]["by_document"]) / total
    return made


# --- never compared silently


def without(key: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in record(**changes).items() if name != key}


def changed(**where: Any) -> dict[str, Any]:
    made = record()
    for path, value in where.items():
        *folders, key = path.split("__")
        inside = made
        for name in folders:
            inside = inside[name]
        inside[key] = value
    return made
