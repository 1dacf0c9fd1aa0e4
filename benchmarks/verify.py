"""What `onecard verify` costs: `python benchmarks/verify.py time`, `memory`, `head` or `floor`.

time    `verify` of the embedded model without imports, against its two forward walks (each model alone over the same
        rows, block by block, to the log-likelihood of the texts), in alternating rounds. Measured by the clock, and in
        processor time, which other work on the machine disturbs less. Exits 1 above 1.3.
memory  peak resident set of `onecard verify` on synthetic models of 4, 8 and 16 blocks, each in a process of its
        own. Exits 1 when the largest is more than 10 % above the smallest.
head    peak memory of the comparison of logits, beside the two heads, at Scout's vocabulary of 202,048, for one token
and
        for four thousand. Exits 1 above 1 GiB.
floor   what computing in bfloat16 costs by itself on the embedded model: its KL against itself in float32, with the
        recipe's evaluation texts.

Quality of a checkpoint is not measured here: synthetic weights are random.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.model import Model, open_model
from onecard.core.device import Compute
from onecard.core.rows import Row
from onecard.core.slices import COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from onecard.eval.floor import measure_floor
from onecard.eval.kl import compare
from onecard.eval.verify import verify
from onecard.models.walk import Walk
from onecard.pipeline import Options, quantize
from onecard.recipe import load_recipe
from onecard.report.resources import peak_rss_bytes
from synthetic import peaks_by_blocks, write_texts

GIB = 2**30
SCOUT_VOCABULARY = 202_048
NARROW = 256  # hidden size: the number of compared logits does not depend on it
CPU = torch.device("cpu")
MOST_TIME, MOST_HEAD_BYTES = 1.3, GIB


def forward(model: Model, rows: list[Row], batch_tokens: int) -> float:
    """Walk one model alone over all rows. Returns the mean negative log-likelihood of the texts, nats a token."""
    walk = Walk.over(model.adapter, model.source, Compute(device=CPU, dtype=torch.float32, batch_tokens=batch_tokens))
    last, total, tokens = model.adapter.n_blocks, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="onecard-forward-") as folder:
        rows_within = walk.hidden_rows(rows, Activations(Path(folder), walk.device))
        rows_within.embed("only")
        for index in range(last):
            rows_within.forward(walk.load(index), "only")
            rows_within.store.drop(index)
        norm, head = walk.final_norm(), walk.head().float()
        for k, numbers in enumerate(rows_within.groups):
            targets = torch.stack([rows[n].tokens for n in numbers])[:, 1:].flatten()
            with torch.inference_mode():
                hidden = norm(rows_within.get(last, "only", k))[:, :-1].flatten(0, 1)
                for start in range(0, len(targets), TOKENS_PER_SLICE):
                    part = slice(start, start + TOKENS_PER_SLICE)
                    loss = torch.nn.functional.cross_entropy(hidden[part] @ head.T, targets[part], reduction="sum")
                    total += float(loss)
            tokens += len(targets)
    return total / tokens


def take_time(rounds: int) -> int:
    recipe = load_recipe("rtn-int4")
    with tempfile.TemporaryDirectory(prefix="onecard-verify-") as name:
        out = Path(name) / "int4"
        quantize("demo", out, recipe, Options("cpu"), quiet=True)
        source, quantized = open_model("demo"), open_model(str(out))
        rows = prepare_texts(source, recipe, None, None, needs_calibration=False).evaluation
        seconds: list[tuple[float, float]] = []
        busy: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            marks = [(time.monotonic(), time.process_time())]
            for model in (source, quantized):
                forward(model, rows, recipe.batch_tokens)
            marks.append((time.monotonic(), time.process_time()))
            verify("demo", str(out), recipe, device_name="cpu", console=Console(quiet=True), quiet=True)
            marks.append((time.monotonic(), time.process_time()))
            if number:  # the first round warms caches
                for found, clock in ((seconds, 0), (busy, 1)):
                    found.append((marks[1][clock] - marks[0][clock], marks[2][clock] - marks[1][clock]))
                print("two walks {:.2f} s, verify {:.2f} s".format(*seconds[-1]), flush=True)
    ratio, busy_ratio = (statistics.median(b / a for a, b in found) for found in (seconds, busy))
    print(
        f"verify / two forward walks: {ratio:.3f} by the clock, {busy_ratio:.3f} of processor time (medians of "
        f"{rounds} rounds; limit {MOST_TIME})"
    )
    return int(ratio > MOST_TIME)


def verified(folder: Path, model: Path) -> dict[str, float]:
    """Run `onecard verify` of the model rounded to nearest in its own process. Returns its JSON line."""
    texts = write_texts(folder / "evaluation.jsonl", 24, 512, seed=2)
    given = ["--evaluation", str(texts), "--device", "cpu"]
    tool = [sys.executable, "-m", "onecard"]
    made = [*tool, "quantize", str(model), str(folder / "out"), "--recipe", "rtn-int4", *given]
    subprocess.run(made, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    command = [*tool, "verify", str(model), str(folder / "out"), *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return dict(json.loads(done.stdout))


def take_head() -> int:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.empty(SCOUT_VOCABULARY, NARROW, dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2)]
    before = peak_rss_bytes()
    for tokens in (1, 4096):
        for start in range(0, tokens, TOKENS_PER_SLICE):
            count = min(TOKENS_PER_SLICE, tokens - start)
            hidden = torch.randn(count, NARROW, generator=generator)
            slices = (
                (c, *(hidden @ w[c : c + COLUMNS_PER_SLICE].float().T for w in heads))
                for c in range(0, SCOUT_VOCABULARY, COLUMNS_PER_SLICE)
            )
            places = torch.zeros(count, dtype=torch.int64)
            compare(slices, places, places, places)
        taken = peak_rss_bytes() - before
        print(f"{tokens} tokens: {taken / GIB:.2f} GiB above the heads (limit {MOST_HEAD_BYTES / GIB:.0f})", flush=True)
    return int(taken > MOST_HEAD_BYTES)


def take_floor() -> int:
    recipe = load_recipe("demo")
    model = open_model("demo")
    rows = prepare_texts(model, recipe, None, None, needs_calibration=False).evaluation
    walk = Walk.over(model.adapter, model.source, Compute(CPU, torch.bfloat16, recipe.batch_tokens))
    with tempfile.TemporaryDirectory(prefix="onecard-floor-") as folder:
        floor = measure_floor(walk, rows, Activations(Path(folder), walk.device))
    print(json.dumps(floor.to_json()))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "head", "floor"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    takes = {
        "time": lambda: take_time(given.rounds),
        "memory": lambda: peaks_by_blocks(verified),
        "head": take_head,
        "floor": take_floor,
    }
    sys.exit(takes[given.what]())
