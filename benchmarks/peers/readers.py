"""Does transformers, through compressed-tensors, read every checkpoint of our rows as our walk does?

    python benchmarks/peers/readers.py [--rows 24]

For each finished job of `make peers`, the mean KL between transformers' logits of the emitted folder and of the bf16
model, both whole, must equal that of our own walk over the same files. Prints one line a checkpoint. Exit code 1 if a
KL differs by more than MOST_DIFFERENCE.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import judge  # noqa: E402
import prepared  # noqa: E402
from run import MODELS  # noqa: E402
from transformers.utils import logging  # noqa: E402

from onecard.checkpoint.loading import load_with_transformers  # noqa: E402
from onecard.checkpoint.model import open_model  # noqa: E402
from onecard.core.rows import Row  # noqa: E402

MOST_DIFFERENCE = 1e-3


def log_probabilities(model: Any, row: Row) -> torch.Tensor:
    """fp64 [T - 1, V], one row for each predicted token."""
    with torch.inference_mode():
        logits = model(input_ids=row.tokens[None], use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="this many rows of the choice set, the first ones")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "peers")
    given = parser.parse_args()
    logging.set_verbosity_error()
    failed = 0
    for name, own in MODELS.items():
        folder = own or given.build / "models" / name
        rows = prepared.evaluation_rows(folder, "choice", given.build / "inputs" / name)[: given.rows]
        original = load_with_transformers(folder, torch.float32)
        wanted = [log_probabilities(original, row) for row in rows]
        for done in sorted((given.build / "jobs" / name).glob("onecard-*/done.json")):
            job = json.loads((done.parent / "job.json").read_text())
            checkpoint = done.parent / "checkpoint"
            model = load_with_transformers(checkpoint, torch.float32)
            total = tokens = 0.0
            for row, p in zip(rows, wanted, strict=True):
                cost = (p.exp() * (p - log_probabilities(model, row))).sum(-1)
                total, tokens = total + float(cost.sum()), tokens + len(cost)
            theirs = total / tokens
            ours = judge.kl(folder, open_model(str(checkpoint)).source, rows)["kl_mean_nats"]
            difference = abs(theirs / ours - 1)
            failed += not difference <= MOST_DIFFERENCE
            print(
                f"{name} {done.parent.name} ({job['options']['method']}): mean KL {theirs:.6f} in transformers, "
                f"{ours:.6f} in our walk, {difference:.1e} apart",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
