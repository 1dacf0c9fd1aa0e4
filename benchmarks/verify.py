"""What `onecard verify` costs: `python benchmarks/verify.py time`, `memory` or `head`.

time    `verify` of the embedded model, all of it but the imports, against the two forward walks that it is made of
        (each model alone over the same rows, block by block, to the log-likelihood of the texts), in alternating
        rounds; by the clock, and by processor time, which other work on the machine disturbs less. Exits 1 above 1.3.
memory  peak resident set of `onecard verify` on synthetic models of 4, 8 and 16 blocks, each in a process of its
        own. Exits 1 when the largest is more than 10 % above the smallest.
head    peak memory that the comparison of logits takes, beside the two heads, at Scout's vocabulary of 202,048, for one
        and for four thousand tokens. Exits 1 above 1 GiB.

Quality is not measured here: synthetic weights are random.
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
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.workdir import Activations
from onecard.core.rows import Row, batches
from onecard.eval.kl import COLUMNS_PER_SLICE, TOKENS_PER_SLICE, compare
from onecard.eval.verify import verify
from onecard.models.adapter import read
from onecard.models.walk import Calls, embed, final_norm, load_block, run_block
from onecard.pipeline import Options, quantize
from onecard.recipe import load_recipe
from onecard.report.resources import peak_rss_bytes
from synthetic import peaks_by_blocks, write_texts

GIB = 2**30
SCOUT_VOCABULARY = 202_048
NARROW = 256  # hidden size: what is compared are logits, and their number does not depend on it
CPU = torch.device("cpu")
MOST_TIME, MOST_HEAD_BYTES = 1.3, GIB


class Silence:
    """A Step that shows nothing."""

    def begin(self, stage: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


def forward(model: Model, rows: list[Row], batch_tokens: int) -> float:
    """One model alone over all rows; mean negative log-likelihood of the texts, in nats a token."""
    adapter, source = model.adapter, model.source
    groups = batches(rows, batch_tokens)
    total, tokens = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="onecard-forward-") as folder:
        store = Activations(Path(folder))
        embed(adapter, source, rows, groups, store, ("only",), CPU, torch.float32)
        calls = Calls(adapter, CPU, torch.float32)
        for index in range(adapter.n_blocks):
            block = load_block(adapter, source, index, CPU, torch.float32)
            for k in range(len(groups)):
                hidden = store.get(index, "only", k)
                store.put(index + 1, "only", k, run_block(block, hidden, calls.of(hidden.shape[1])[index]))
            store.drop(index)
        norm = final_norm(adapter, source, CPU, torch.float32)
        head = read(adapter, source, adapter.head_name).float()
        for k, numbers in enumerate(groups):
            targets = torch.stack([rows[n].tokens for n in numbers])[:, 1:].flatten()
            with torch.inference_mode():
                hidden = norm(store.get(adapter.n_blocks, "only", k))[:, :-1].flatten(0, 1)
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
    """`onecard verify` in its own process, of the model rounded to nearest; the JSON line it prints."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "head"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sys.exit(
        {"time": lambda: take_time(given.rounds), "memory": lambda: peaks_by_blocks(verified), "head": take_head}[
            given.what
        ]()
    )
