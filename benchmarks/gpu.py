"""Is the CUDA path true, and how fast is it? One command for a machine with one NVIDIA card, and no network.

    python benchmarks/gpu.py kernels     # every kernel against torch's form, bit for bit; products against fp64; rates
    python benchmarks/gpu.py demo        # make demo's job twice, killed and resumed: the same bytes; KL beside a CPU's
    python benchmarks/gpu.py block       # one block of Scout's shapes by rtn, fast, balanced and best, beside the plan
    python benchmarks/gpu.py blocks      # four blocks end to end by fast, and what 48 would take
    python benchmarks/gpu.py all --minutes 25

Each ends in one JSON line, behind a table for docs/benchmarks.md. `all` takes the parts in this order, each with its
own limit, until --minutes are over. Parts that have ended lie in --folder, and `all` goes on behind them: where a call
may take ten minutes, give --minutes 9 three times. --again forgets them. Exit status: 0, 1 if a check failed or a part
broke down or none was left time, 2 without a card.

`--device cpu --small` goes the same way in tiny shapes, in Triton's interpreter (tests/test_gpu_benchmark.py).

It needs torch >= 2.11 (a CUDA build, with its triton >= 3.6), transformers >= 5.17, a C compiler for Triton's launcher
(gcc or clang, and Python's headers), and what quantizing imports beside them. onecard itself need not be installed.
Where only torch and transformers are there, carry the wheels of accelerate, click, compressed-tensors (it needs
loguru), gguf, Jinja2, pillow, psutil, pydantic, rich and scipy. datasets, pyarrow, bitsandbytes and plotly are not
imported on the way. All texts and models are the repository's own or made here.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT_LINK = HERE.parent / "build" / "types" / "onecard"
# onecard is this repository, installed or not: its root, under the package's name, through a link.
ROOT_LINK.parent.mkdir(parents=True, exist_ok=True)
if not ROOT_LINK.exists():
    ROOT_LINK.symlink_to(Path("..", ".."), target_is_directory=True)
sys.path[:0] = [str(HERE), str(ROOT_LINK.parent)]
if {"cpu", "--device=cpu"} & {*sys.argv}:  # before torch and triton are imported
    os.environ["TRITON_INTERPRET"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from gpu_checks import demo, kernels, scout  # noqa: E402
from gpu_checks.processes import Setup, TimeUpError  # noqa: E402
from onecard.report.resources import package_versions  # noqa: E402

# Parts of `all`, in order, and the most seconds of each.
BUDGETS = {"kernels": 240, "demo": 420, "block-rtn": 120, "block-fast": 240, "block-balanced": 420, "block-best": 600}
BUDGETS |= {"blocks": 420}
Part = Callable[[Setup], dict[str, Any]]
# A part is not begun with less than this share of its seconds.
WORTH_BEGINNING = 0.5


def refusal(device: str) -> str | None:
    """Why nothing can be done on this device."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return (
        "there is no CUDA card that this torch can use, so there is nothing to measure. --device cpu --small goes "
        "through the same steps in tiny shapes"
    )


def parts_of(names: list[str]) -> dict[str, Part]:
    """The parts of these names, in order."""
    found: dict[str, Part] = {"kernels": kernels.kernels, "demo": demo.demo}
    for method in scout.METHODS:
        found[f"block-{method}"] = lambda setup, method=method: scout.block(setup, method)
    found["blocks"] = scout.blocks
    return {name: part for name, part in found.items() if name in names}


def carried_out(name: str, part: Part, setup: Setup) -> dict[str, Any]:
    """What a part found, or how it broke down; kept in the folder."""
    began = time.monotonic()
    try:
        found = part(setup)
    except TimeUpError:
        found = {"ok": False, "error": f"not finished after {time.monotonic() - began:.0f} s", "table": ""}
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": str(error), "table": ""}
    found["part_seconds"] = round(time.monotonic() - began, 1)
    (setup.place("results") / f"{name}.json").write_text(json.dumps(found))
    return found


def report(found: dict[str, dict[str, Any]], left: list[str], facts: dict[str, Any]) -> int:
    """The tables, and one JSON line. Returns the exit status."""
    for name, part in found.items():
        print(f"\n{name}: {'well' if part['ok'] else 'NOT WELL'}, {part['part_seconds']} s")
        print(part["table"] or part["error"])
    if left:
        print(f"\nnot begun, for want of time: {', '.join(left)}. The same command goes on with them.")
    ok = bool(found) and all(part["ok"] for part in found.values())
    parts = {name: {k: v for k, v in part.items() if k != "table"} for name, part in found.items()}
    print(json.dumps({"ok": ok, "left": left, **facts, "parts": parts}), flush=True)
    return 0 if ok else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("kernels", "demo", "block", "blocks", "all"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "gpu", help="for models and results")
    parser.add_argument("--again", action="store_true", help="with all: forget the parts that have ended")
    given = parser.parse_args()
    if given.device == "cpu" and not given.small:
        parser.error("--device cpu goes with --small")
    until = time.monotonic() + 60 * given.minutes
    if (why := refusal(given.device)) is not None:
        print(why, file=sys.stderr)
        return 2
    folder = given.folder.resolve() / ("small" if given.small else "full")
    every = "all" in given.parts
    names = [name for name in BUDGETS if every or {name, name.partition("-")[0]} & {*given.parts}]
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts_of(names).items():
        kept, now = folder / "results" / f"{name}.json", time.monotonic()
        if every and kept.exists() and not given.again:
            found[name] = json.loads(kept.read_text())
            continue
        if until - now < WORTH_BEGINNING * BUDGETS[name] and every:
            break
        setup = Setup(given.device, given.small, folder, min(until, now + BUDGETS[name]))
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = carried_out(name, part, setup)
    return report(found, [name for name in names if name not in found], scout.card_facts() | package_versions())


if __name__ == "__main__":
    sys.exit(main())
