"""What a run would take on one H100 80 GB: counted, not measured. There is no GPU in it.

    python benchmarks/gpu_cost.py [--model scout] [--method fast] [--tokens 1048576] [--stage quantize] [--by-line]
    python benchmarks/gpu_cost.py --json         # ends in one line
    python benchmarks/gpu_cost.py --write        # also into gpu_cost.json, from which docs/benchmarks.md has its table

The project's own code runs on tensors without values that say that they lie on a card (gpu_model/): kernel launches,
bytes, operations, synchronisations, copies, files and live memory are counted by stage and by source line, and cost
what gpu_model/rates.py says. `--by-line` lists the lines that take longest. `--without-kernels`: as on a card without
Triton.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
os.environ.pop("TRITON_INTERPRET", None)

from transformers.utils import logging  # noqa: E402

from gpu_model import rates  # noqa: E402
from gpu_model.job import recipe_of  # noqa: E402
from gpu_model.whole import Asked, Cost, Whole, whole_run  # noqa: E402

# Name -> the published config, and the shipped recipe whose keys count.
MODELS = {
    "scout": ("llama4-scout", "llama4-scout-h100"),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", "qwen3-30b-a3b-24gb"),
    "maverick": ("llama4-maverick", "llama4-scout-h100"),
}
KEPT = HERE / "gpu_cost.json"
METHODS = ("rtn", "fast", "balanced", "best")
TOKENS = 512 * 2048
# What takes time at a line.
KINDS = ("card seconds", "host seconds", "copy seconds", "disk seconds", "CPU seconds", "waits", "disk seconds behind")
LINES = 15


def table(model: str, method: str, whole: Whole) -> str:
    head = (
        f"\n{model}, {method}: {whole.seconds / 60:.1f} min, {whole.launches_per_block:,.0f} launches a block, "
        f"peak {whole.peak_bytes / 1e9:.1f} GB\n"
        f"{'stage':18s} {'seconds':>9s} {'card':>8s} {'host':>8s} {'copies':>7s} {'disk':>7s} {'CPU':>6s} "
        f"{'launches':>12s} {'syncs':>10s} {'peak GB':>8s}"
    )
    return "\n".join([head, *(_row(name, cost) for name, cost in whole.stages.items() if cost.seconds > 0.05)])


def _row(name: str, cost: Cost) -> str:
    card, host, copies, disk, cpu = (cost.total(kind) for kind in KINDS[:5])
    return (
        f"{name:18s} {cost.seconds:9.1f} {card:8.1f} {host:8.1f} {copies:7.1f} {disk:7.1f} {cpu:6.1f} "
        f"{cost.total('launches'):12,.0f} {cost.total('syncs'):10,.0f} {cost.peak_bytes / 1e9:8.1f}"
    )


def lines(whole: Whole, stage: str | None) -> str:
    """The lines that take longest, in each stage or in one."""
    found = []
    for name, cost in whole.stages.items():
        if stage not in (None, name):
            continue
        by_line: dict[str, dict[str, float]] = {}
        for (what, where), amount in cost.counts.items():
            by_line.setdefault(where, {})[what] = amount
        ranked = sorted(by_line.items(), key=lambda item: -max(item[1].get(kind, 0.0) for kind in KINDS))
        found.append(f"\n{name}: {cost.seconds:.1f} s")
        for where, counts in ranked[:LINES]:
            if max(counts.get(kind, 0.0) for kind in KINDS) < 0.1:
                break
            said = ", ".join(
                f"{kind.replace(' seconds', '')} {counts[kind]:.1f} s" for kind in KINDS if counts.get(kind, 0) >= 0.1
            )
            said += f", {counts.get('launches', 0):,.0f} launches, {counts.get('syncs', 0):,.0f} syncs"
            found.append(f"  {where:40s} {said}")
    return "\n".join(found)


def keep(model: str, method: str, tokens: int, whole: Whole) -> None:
    """Into gpu_cost.json, beside what it holds of others."""
    held = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    stages = {name: round(cost.seconds, 1) for name, cost in whole.stages.items() if cost.seconds >= 0.05}
    found = whole.brief() | {"stages": stages, "device_peak_bytes_by_stage": _peaks(whole)}
    held.setdefault(model, {}).setdefault(method, {})[str(tokens)] = found
    KEPT.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _peaks(whole: Whole) -> dict[str, int]:
    return {name: cost.peak_bytes for name, cost in whole.stages.items() if cost.peak_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="scout")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of calibration; 128 rows are evaluated")
    parser.add_argument("--disk", type=float, default=rates.DISK, help="bytes a second")
    parser.add_argument("--stage", help="with --by-line: this stage alone")
    parser.add_argument("--by-line", action="store_true")
    parser.add_argument("--without-kernels", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    logging.set_verbosity_error()
    brief: dict[str, Any] = {}
    for method in given.method:
        model, recipe = MODELS[given.model]
        asked = Asked(model, recipe_of(recipe, method), given.tokens, not given.without_kernels, given.disk)
        whole = whole_run(asked)
        brief[method] = whole.brief()
        print(table(given.model, method, whole), flush=True)
        if given.by_line:
            print(lines(whole, given.stage))
        if whole.flags:
            print("\nflags:", *(f"  {amount:12,.0f} x {flag}" for flag, amount in whole.flags.items()), sep="\n")
        if given.write:
            keep(given.model, method, given.tokens, whole)
    if given.json:
        print(json.dumps(brief))
    return 0


if __name__ == "__main__":
    sys.exit(main())
