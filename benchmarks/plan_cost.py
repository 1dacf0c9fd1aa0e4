"""Time, memory and disk as `onecard plan --measure` predicts them, beside real runs: `python benchmarks/plan_cost.py`.

The embedded model by the recipes `rtn-int4` and `demo`, each in a process of its own. Rates and runs are measured in
processor time, because other work on the machine distorts the clock; the comparison of times therefore leaves disks
out. The plan counts the tokens that the recipe wants, and the embedded texts hold fewer. The second estimate is for the
tokens that the run had; the model of costs is judged by it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from transformers.utils import logging

from onecard.core.device import choose_compute
from onecard.eval.machine_rates import measure_rates
from onecard.forecast import cost_of, plan
from onecard.planner.cost import Machine
from onecard.planner.work import Tokens
from onecard.recipe import load_recipe

RECIPES = sys.argv[1:] or ["rtn-int4", "demo"]


def run(recipe: str, folder: Path) -> dict[str, Any]:
    """CPU seconds without those of starting, peak resident set, most bytes in OUT and the work directory."""
    command = [
        sys.executable,
        "-m",
        "onecard",
        "quantize",
        "demo",
        str(folder / recipe),
        "--recipe",
        recipe,
        "--device",
        "cpu",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, tree_bytes(folder))
        time.sleep(0.5)
    assert process.returncode in (0, 1), process.returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((folder / recipe / "onecard.json").read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    texts = record["texts"]
    tokens = {which: texts[which]["tokens"] if which in texts else 0 for which in ("calibration", "evaluation")}
    return {"cpu": cpu, "ram": record["machine"]["peak_rss_bytes"], "disk": most, **tokens}


def tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # it has been moved in the meantime
                continue
    return total


def main() -> None:
    logging.set_verbosity_error()
    start = subprocess.run(
        [sys.executable, "-c", "import os, onecard.pipeline; print(sum(os.times()[:2]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"imports take {float(start.stdout):.1f} CPU s and are in neither; load {psutil.getloadavg()[0]:.1f}")
    for name in RECIPES:
        recipe = load_recipe(name)
        planned = plan("demo", recipe, "cpu")
        adapter, compute = planned.model.adapter, choose_compute("cpu", recipe.compute_dtype, recipe.batch_tokens)
        rates = measure_rates(adapter, planned.plan, recipe, compute, clock=time.process_time)
        with tempfile.TemporaryDirectory() as folder:
            truth = run(name, Path(folder))
        cpu = truth["cpu"] - float(start.stdout)
        tokens = Tokens(truth["calibration"], truth["evaluation"])
        cost = cost_of(adapter, planned.plan, recipe, rates, Machine.of(compute), tokens)
        said = cost.seconds - cost.seconds_by["disk"]
        print(
            f"{name}: {truth['calibration']:,} and {truth['evaluation']:,} tokens\n"
            f"  time  {said:8.1f} CPU s predicted, {cpu:8.1f} measured: {said / cpu:.2f}\n"
            f"  RAM   {cost.ram_bytes / 1e6:8.0f} MB predicted, {truth['ram'] / 1e6:8.0f} measured: "
            f"{cost.ram_bytes / truth['ram']:.2f}\n"
            f"  disk  {cost.disk_bytes / 1e6:8.0f} MB predicted, {truth['disk'] / 1e6:8.0f} measured: "
            f"{cost.disk_bytes / truth['disk']:.2f}\n"
            f"  parts {', '.join(f'{part} {seconds:.1f} s' for part, seconds in cost.seconds_by.items())}",
            flush=True,
        )


if __name__ == "__main__":
    main()
