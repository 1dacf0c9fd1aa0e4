"""Peak memory of `onecard quantize` against the number of blocks: `python benchmarks/memory.py`.

Synthetic models of 4, 8 and 16 blocks with fixed width (16 experts, hidden 512, intermediate 1024: 55 MB of bf16 a
block), GPTQ, 8192 calibration tokens, each in a process of its own. Prints a table and exits 1 when the largest peak
is more than 10 % above the smallest. `--scout-block` instead sends one block of Scout's true shapes (4.4 GB of bf16)
through round-to-nearest and exits 1 above 12 GiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import peaks_by_blocks, write_model, write_texts

GIB = 2**30
RECIPE = """name: memory
description: benchmark
method: {method}
group_size: 128
quantize_roles: [expert, shared_expert]
calibration_rows: 16
calibration_row_tokens: 512
evaluation_rows: 8
evaluation_row_tokens: 256
batch_tokens: 2048
warn_below_expert_rows: 0
"""


def run(folder: Path, model: Path, method: str, evaluation_characters: int) -> dict[str, float]:
    """Run `onecard quantize` in its own process. Returns its JSON line."""
    recipe = folder / f"{method}.yaml"
    recipe.write_text(RECIPE.format(method=method))
    calibration = write_texts(folder / "calibration.jsonl", 20, 512, seed=1)
    evaluation = write_texts(folder / "evaluation.jsonl", 8, evaluation_characters, seed=2)
    command = [sys.executable, "-m", "onecard", "quantize", str(model), str(folder / "out"), "--recipe", str(recipe)]
    command += ["--calibration", str(calibration), "--evaluation", str(evaluation), "--overwrite"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def by_blocks() -> int:
    return peaks_by_blocks(lambda folder, model: run(folder, model, "best", 256))


def scout_block() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", 1, hidden=5120, intermediate=8192, experts=16)
        source = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        result = run(folder, model, "rtn", 128)
    peak = result["peak_rss_bytes"]
    print(f"one block of Scout's shapes, round-to-nearest and verification: {source / 1e9:.2f} GB of bf16 in,")
    took = f"{result['seconds']:.0f} s"
    print(f"{result['emitted_bytes'] / 1e9:.2f} GB out, {took}, peak RSS {peak / GIB:.2f} GiB (limit 12)")
    return int(peak > 12 * GIB)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scout-block", action="store_true")
    sys.exit(scout_block() if parser.parse_args().scout_block else by_blocks())
