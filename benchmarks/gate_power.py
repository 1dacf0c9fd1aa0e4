"""False alarms of the gate, and how often it finds a tenth more KL: `python benchmarks/gate_power.py [--measure]`.

A simulation on real KLs. benchmarks/gate_power.json holds, by document, the sums of KL and the tokens with the same
top-1 of twelve checkpoints of the embedded model on its evaluation texts (123 documents, 54,105 tokens). `--measure`
makes those checkpoints and that file anew (about fifteen minutes on one core). Without it the table takes half a
minute. Seeds are fixed: the table is the same every time.

Every trial draws 123 documents with replacement, both runs of a document together, and applies the gate's own tests
(eval/regression.py; the default tolerance of the same top-1). "Nothing changed" is simulated in ways from easy to hard:

  same files      the report is the baseline, measured twice; the walk is deterministic
  rounding        two runs of one recipe that differ in `batch_tokens` alone: another order of sums, other codes
  other texts     two runs whose calibration rows were drawn with different seeds
  other settings  runs with damping, shrinkage or tabu moves 1 to 10 % apart

The last three are equal in expectation, but each pair of checkpoints differs a little. `centred` scales one run so that
the ratio over all documents is exactly 1. `swapped` draws for each document which of the two runs is the report, so
that neither is better and nothing is scaled. The rows `as measured` count alarms over the ordered pairs as they are,
every document once.

A rise of 10 % is simulated as: every document's KL times 1.1; the same for equivalent runs (centred, then times 1.1),
with their noise; a mixture with round-to-nearest's KLs that has a tenth more, which is how a worse method is worse;
factors drawn for each document with a mean of 1.1 and a standard deviation of 0.2; and 20 % on half of the documents.

"Means alone" has no documents, just two means and their standard errors. Both runs read the same documents, so it gives
no false alarm here, and for the same reason it misses much.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onecard.eval.comparison import Tolerances
from onecard.eval.regression import ratio_exceeds, unpaired_ratio_exceeds
from onecard.pipeline import Options, quantize
from onecard.recipe import Recipe

DATA = Path(__file__).with_suffix(".json")
TRIALS, SEED = 6000, 0
TOLERANCES = (0.0, 0.01, 0.02, 0.05)
RISE = 1.1
GROUPS = {
    "rounding": ("fast", "fast, batch_tokens 4096", "fast, batch_tokens 2048"),
    "rounding, balanced": ("balanced", "balanced, batch_tokens 4096"),
    "other texts": ("fast", "fast, seed 1", "fast, seed 2", "fast, seed 3"),
    "other settings": ("fast", "fast, damping 0.011", "fast, shrinkage 0.31", "fast, tabu_moves 49"),
}
RUNS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "fast": {"method": "fast"},
    "fast, batch_tokens 4096": {"method": "fast", "batch_tokens": 4096},
    "fast, batch_tokens 2048": {"method": "fast", "batch_tokens": 2048},
    "fast, seed 1": {"method": "fast", "calibration_seed": 1},
    "fast, seed 2": {"method": "fast", "calibration_seed": 2},
    "fast, seed 3": {"method": "fast", "calibration_seed": 3},
    "fast, damping 0.011": {"method": "fast", "damping": 0.011},
    "fast, shrinkage 0.31": {"method": "fast", "shrinkage": 0.31},
    "fast, tabu_moves 49": {"method": "fast", "tabu_moves": 49},
    "balanced": {"method": "balanced"},
    "balanced, batch_tokens 4096": {"method": "balanced", "batch_tokens": 4096},
}
# For each document the sum of KL, and the number of tokens with the same top-1; [D] each.
Run = tuple[np.ndarray, np.ndarray]
# A trial: KL of this run and of the baseline, same top-1 of both, tokens.
Trial = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def measure() -> None:
    """Quantize by every entry of RUNS, and keep the sums of its documents."""
    found: dict[str, Any] = {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in RUNS.items():
            recipe = Recipe.model_validate(
                {
                    "name": "gate-power",
                    "description": name,
                    "calibration_row_tokens": 512,
                    "evaluation_rows": 512,
                    "evaluation_row_tokens": 512,
                    "warn_below_expert_rows": 0,
                }
                | fields
            )
            record = quantize("demo", Path(folder) / "out", recipe, Options("cpu", overwrite=True))
            documents = record.kl["by_document"]
            found["tokens"] = [d["tokens"] for d in documents]
            found["runs"][name] = {
                "kl_nats": [float(f"{d['tokens'] * d['kl_mean_nats']:.8g}") for d in documents],
                "same_top1": [round(d["tokens"] * d["same_top1"]) for d in documents],
            }
            print(f"{name}: {record.kl['kl_mean_nats']:.5f} nats", flush=True)
    DATA.write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def resampled(
    now: Run, before: Run, tokens: np.ndarray, trials: int, rng: np.random.Generator, factor: Callable[[int], Any]
) -> Iterator[Trial]:
    for _ in range(trials):
        drawn = rng.integers(0, len(tokens), len(tokens))
        yield now[0][drawn] * factor(len(drawn)), before[0][drawn], now[1][drawn], before[1][drawn], tokens[drawn]


def centred(now: Run, before: Run, ratio: float) -> Run:
    """`now` with its KL scaled and its same top-1 shifted: over all documents only KL differs, by `ratio`."""
    return now[0] * (ratio * before[0].sum() / now[0].sum()), now[1] - (now[1] - before[1]).sum() / len(now[1])


def cases(runs: dict[str, Run], tokens: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, str, list[Trial]]]:
    """Yields ('nothing' or 'rise', the row's name, trials)."""
    fast, worse = runs["fast"], runs["rtn"]

    def one(_: int) -> float:
        return 1.0

    def of_pairs(names: tuple[str, ...], ratio: float) -> list[Trial]:
        pairs = list(itertools.permutations(names, 2))
        return [
            trial
            for a, b in pairs
            for trial in resampled(centred(runs[a], runs[b], ratio), runs[b], tokens, TRIALS // len(pairs), rng, one)
        ]

    def swapped(names: tuple[str, ...]) -> Iterator[Trial]:
        pairs = list(itertools.combinations(names, 2))
        for a, b in pairs:
            for na, nb, sa, sb, n in resampled(runs[a], runs[b], tokens, TRIALS // len(pairs), rng, one):
                swap = rng.random(len(n)) < 0.5
                yield (
                    np.where(swap, nb, na),
                    np.where(swap, na, nb),
                    np.where(swap, sb, sa),
                    np.where(swap, sa, sb),
                    n,
                )

    def alone(factor: Callable[[int], Any], now: Run = fast) -> list[Trial]:
        return list(resampled(now, fast, tokens, TRIALS, rng, factor))

    yield "nothing", "same files", alone(one)
    for name, members in GROUPS.items():
        yield "nothing", f"{name}, centred", of_pairs(members, 1.0)
    for name, members in GROUPS.items():
        yield "nothing", f"{name}, swapped", list(swapped(members))
    for name, members in GROUPS.items():
        trials = [
            (*(x for pair in zip(runs[a], runs[b], strict=True) for x in pair), tokens)
            for a, b in itertools.permutations(members, 2)
        ]
        yield "nothing", f"{name}, as measured", trials
    yield "rise", "every document times 1.1", alone(lambda n: RISE)
    for name, members in GROUPS.items():
        yield "rise", f"{name}, times 1.1", of_pairs(members, RISE)
    share = (RISE - 1) * fast[0].sum() / (worse[0].sum() - fast[0].sum())
    yield "rise", "towards round-to-nearest", alone(one, (fast[0] + share * (worse[0] - fast[0]), fast[1]))
    spread = np.sqrt(np.log1p((0.2 / RISE) ** 2))
    yield "rise", "factors of 1.1 +- 0.2", alone(lambda n: RISE * np.exp(rng.normal(-(spread**2) / 2, spread, n)))
    yield "rise", "20 % on half of the documents", alone(lambda n: np.where(rng.random(n) < 0.5, 2 * RISE - 1, 1.0))


def found_by(trial: Trial, top1: bool) -> list[bool]:
    """Whether the gate fails, at each tolerance of the mean KL and, as the last entry, with means alone (unpaired).

    `top1`: the check of the same top-1 counts too, as in the gate.
    """
    now, before, same_now, same_before, tokens = trial
    fallen = top1 and ratio_exceeds(same_before - same_now, tokens, Tolerances().same_top1).exceeds
    found = [fallen or ratio_exceeds(now, before, 1 + tolerance).exceeds for tolerance in TOLERANCES]
    (mean_now, error_now), (mean_before, error_before) = (_mean(x, tokens) for x in (now, before))
    unpaired = unpaired_ratio_exceeds(mean_now, error_now, mean_before, error_before, 1 + Tolerances().kl_mean)
    return [*found, unpaired.exceeds]


def _mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Mean over tokens, and its standard error over documents by the record's formula."""
    mean = sums.sum() / tokens.sum()
    count = len(sums)
    return mean, float(np.sqrt(count / (count - 1) * ((sums - mean * tokens) ** 2).sum()) / tokens.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="make the checkpoints and the file of KLs anew first")
    if parser.parse_args().measure:
        measure()
    held = json.loads(DATA.read_text())
    tokens = np.asarray(held["tokens"], float)
    runs = {n: (np.asarray(r["kl_nats"]), np.asarray(r["same_top1"], float)) for n, r in held["runs"].items()}
    print(f"{len(tokens)} documents, {int(tokens.sum()):,} tokens; the gate's share of failures, in %\n")
    default = Tolerances().kl_mean
    heads = [f"**{t:.0%}** (default)" if t == default else f"{t:.0%}" for t in TOLERANCES]
    print(f"| | | trials | {' | '.join(f'tolerance {h}' for h in heads)} | means alone, {default:.0%} |")
    print("|---" * (len(TOLERANCES) + 4) + "|")
    for kind, what, trials in cases(runs, tokens, np.random.default_rng(SEED)):
        # The mean KL has to find a rise. Where nothing changed, an alarm of any check is false.
        found = np.array([found_by(trial, kind == "nothing") for trial in trials], float)
        shares = found.mean(0)
        errors = np.sqrt(shares * (1 - shares) / len(found))
        cells = " | ".join(f"{100 * s:.1f} ± {100 * e:.1f}" for s, e in zip(shares, errors, strict=True))
        print(
            f"| {'nothing changed' if kind == 'nothing' else '10 % more'} | {what} | {len(found)} | {cells} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
