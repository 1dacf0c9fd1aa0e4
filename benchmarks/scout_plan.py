"""`onecard plan` on the true shapes of published models: `python benchmarks/scout_plan.py`.

Takes the config.json of Scout, Maverick and Qwen3-30B-A3B with safetensors files whose headers are real and whose data
is a hole (tests/hollow.py), runs the planner on them, and prints exact sizes. No weight is read.
"""

import sys
import tempfile
import time
from pathlib import Path

from transformers.utils import logging

from onecard.checkpoint.inspect import inspect
from onecard.forecast import plan
from onecard.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hollow import MAVERICK, QWEN3, SCOUT, published, write_hollow  # type: ignore[import-not-found]

CASES = [
    ("Llama 4 Scout", SCOUT, ["llama4-scout-h100", "llama4-scout-h100-int4-attention", "rtn-int4"]),
    ("Llama 4 Maverick", MAVERICK, ["llama4-scout-h100"]),
    ("Qwen3-30B-A3B", QWEN3, ["qwen3-30b-a3b-24gb"]),
]


def main() -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        for title, model, recipes in CASES:
            folder = write_hollow(Path(name) / model, published(model))
            facts = inspect(str(folder))
            print(f"{title}: {facts['parameters']:,} parameters, {facts['parameters'] * 2:,} bytes in bf16")
            for recipe in recipes:
                began = time.perf_counter()
                planned = plan(str(folder), load_recipe(recipe), "cpu")
                result, ram = planned.plan, planned.cost.ram_bytes
                print(
                    f"  {recipe}: {result.emitted_bytes:,} bytes ({result.emitted_bytes / 1e9:.2f} GB) in "
                    f"{len(result.shards)} files, {result.bits_per_weight:.3f} bits per weight, "
                    f"about {ram / 1e9:.0f} GB to quantize, planned in {time.perf_counter() - began:.1f} s"
                )


if __name__ == "__main__":
    sys.exit(main())
