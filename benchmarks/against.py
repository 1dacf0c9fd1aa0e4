"""Time and memory of a run in this tree beside those in a commit's, on a CPU, as ratios.

    python benchmarks/against.py --against COMMIT [--pairs 2] [--jobs demo fast rtn] [--blocks 8]

    demo   `make demo`'s second job: the embedded model by the recipe `demo`
    fast   `--blocks` synthetic blocks at hidden 1024 (16 experts of 2048, 32 rows of 512 tokens) by `fast`
    rtn    the same blocks by round-to-nearest

Both trees run the same command by turns, so that what else the machine does strikes both. One line a job: the medians
of wall clock, processor time and peak resident set, and this tree's over the commit's. The weights of synthetic models
are random: nothing is said of quality.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from same_bytes import ROOT, checked_out

from synthetic import write_model, write_texts

JOBS = ("demo", "fast", "rtn")


@dataclass(frozen=True)
class Taken:
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def arguments(job: str, folder: Path, blocks: int) -> list[str]:
    """The command's arguments apart from OUT; makes what they name."""
    if job == "demo":
        return ["demo", "--recipe", "demo"]
    model, recipe = folder / "model", folder / f"{job}.yaml"
    if not model.exists():
        write_model(model, blocks=blocks, hidden=1024, intermediate=2048, experts=16)
        write_texts(folder / "calibration.jsonl", 32, 512, seed=1)
        write_texts(folder / "evaluation.jsonl", 24, 256, seed=2)
    keys = {
        "name": job,
        "description": "a timing",
        "method": job,
        "calibration_rows": 32,
        "calibration_row_tokens": 512,
        "evaluation_rows": 24,
        "evaluation_row_tokens": 256,
    }
    recipe.write_text(yaml.safe_dump(keys))
    texts = ["--calibration", str(folder / "calibration.jsonl"), "--evaluation", str(folder / "evaluation.jsonl")]
    return [str(model), "--recipe", str(recipe), *(texts if job != "rtn" else texts[2:])]


def take(tree: Path, links: Path, given: list[str], out: Path) -> Taken:
    """One run in a process of its own."""
    link = links / tree.name / "onecard"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(tree)
    model, *rest = given
    command = [sys.executable, "-m", "onecard", "quantize", model, str(out), *rest, "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(link.parent)}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=environment, cwd=links, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((out / "onecard.json").read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(time.monotonic() - began, cpu, record["machine"]["peak_rss_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--blocks", type=int, default=8, help="of the synthetic model")
    asked = parser.parse_args()
    print(f"| job | seconds, {asked.against} | this tree | ratio | CPU s | this tree | ratio | peak RSS ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, checked_out(asked.against, Path(name)) as tree:
        folder = Path(name)
        for job in asked.jobs:
            given = arguments(job, folder, asked.blocks)
            taken: dict[Path, list[Taken]] = {tree: [], ROOT: []}
            for pair in range(asked.pairs):
                for where in (tree, ROOT) if pair % 2 == 0 else (ROOT, tree):
                    out = folder / f"{job}-{pair}-{where.name}"
                    taken[where].append(take(where, folder / "links", given, out))
            old, new = (
                [statistics.median(getattr(one, key) for one in taken[where]) for key in Taken.__dataclass_fields__]
                for where in (tree, ROOT)
            )
            print(
                f"| {job} | {old[0]:.1f} | {new[0]:.1f} | {new[0] / old[0]:.2f} | {old[1]:.1f} | {new[1]:.1f} | "
                f"{new[1] / old[1]:.2f} | {new[2] / old[2]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
