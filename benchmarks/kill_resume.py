"""Kill a run at random moments and resume it: `python benchmarks/kill_resume.py [--kills 20]`.

The embedded model is quantized once undisturbed, by the demo's recipe with fewer rows, or by --recipe. Then runs are
killed with SIGKILL at moments drawn uniformly over the undisturbed run's time, and resumed with --resume, until --kills
kills have struck a live run. A run that finishes is compared, and a new one begins. Every finished output must equal
the undisturbed one byte for byte, except the section `machine` (times, memory) of its record. Prints where each kill
struck; exits 1 on a difference.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from onecard.recipe import load_recipe


def command(model: str, out: Path, recipe: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "onecard", "quantize", model, str(out), "--recipe", recipe, *flags]


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file. The record counts without its section `machine`, and its line in SHA256SUMS not at all."""
    found = {}
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        if path.name == "onecard.json":
            record = json.loads(data)
            record.pop("machine")
            data = json.dumps(record, sort_keys=True).encode()
        if path.name == "SHA256SUMS":  # the record's digest covers the section `machine`
            data = b"".join(line for line in data.splitlines() if not line.endswith(b"  onecard.json"))
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def stage(work: Path) -> str:
    """Finished stages when the kill struck, from the work directory."""
    state = work / "state.json"
    if not state.exists():
        return "before the first stage" if work.exists() else "before the work directory"
    return f"{json.loads(state.read_text())['done']} stages finished"


def run(model: str, recipe: str, kills: int, seed: int) -> int:
    generator = random.Random(seed)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if recipe == "demo":  # all stages in less time, so that kills don't all strike the same long one
            fewer = {"calibration_rows": 64, "evaluation_rows": 48}
            recipe = str(folder / "fewer-rows.yaml")
            values = load_recipe("demo").model_dump(mode="json") | fewer
            Path(recipe).write_text(yaml.safe_dump(values), encoding="utf-8")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.monotonic()
        subprocess.run(command(model, folder / "whole", recipe), check=True, **quiet)  # type: ignore[call-overload]
        whole = time.monotonic() - began
        expected = digests(folder / "whole")
        print(f"undisturbed: {whole:.1f} s, {len(expected)} files", flush=True)
        out, struck, finished = folder / "out", 0, 0
        while True:
            flags = ("--resume",) if out.exists() or out.with_name("out.work").exists() else ()
            process = subprocess.Popen(command(model, out, recipe, *flags), **quiet)  # type: ignore[call-overload]
            try:
                process.wait(generator.uniform(0, whole) if struck < kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                struck += 1
                print(f"kill {struck:2d}: {stage(out.with_name('out.work'))}", flush=True)
                continue
            finished += 1
            same = process.returncode == 0 and digests(out) == expected
            bad += not same
            verdict = "equal, byte for byte" if same else f"DIFFERENT (exit status {process.returncode})"
            print(f"run {finished} finished: {verdict}", flush=True)
            if struck >= kills:
                break
            shutil.rmtree(out)
    print(f"{struck} kills, {finished} finished runs, {bad} different")
    return int(bad > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(run(given.model, given.recipe, given.kills, given.seed))
