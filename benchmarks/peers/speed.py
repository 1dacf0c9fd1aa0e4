"""Time and memory of onecard's `fast` against llm-compressor's GPTQ, in alternating pairs of whole processes.

    python benchmarks/peers/speed.py                    # 8 blocks at hidden 1024, and the embedded model; 3 pairs each
    python benchmarks/peers/speed.py --blocks 1 --hidden 256 --pairs 1 --model synthetic     # a trial

Both get the same rows. onecard's process emits, reads back and verifies; llm-compressor's quantizes and saves. The
synthetic model is the multimodal class with the embedded model's small vision tower, because llm-compressor takes the
experts of no other class apart; its experts are not square. Its weights are random: measure time and memory on them,
never quality. Prints each run, then medians and their ratios, and writes build/peers/speed.json. Run it on a quiet
machine.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import prepared  # noqa: E402
import process  # noqa: E402
from field import ROLES  # noqa: E402

import synthetic  # noqa: E402
from onecard.calibration.packing import pack_rows  # noqa: E402
from onecard.calibration.sources import read_jsonl  # noqa: E402
from onecard.calibration.tokens import Encoder  # noqa: E402
from onecard.models.families import load_adapter  # noqa: E402

ROW_TOKENS = 512
GROUP = 128
EXPERTS = 16
SIDES = {
    "onecard-fast": ("onecard", "with_onecard.py", {"method": "fast"}),
    # llm-compressor's default: every expert computes on every row.
    "llmcompressor-gptq": ("llmcompressor", "with_llmcompressor.py", {"method": "gptq", "all_experts": True}),
    "llmcompressor-gptq-own-rows": ("llmcompressor", "with_llmcompressor.py", {"method": "gptq", "all_experts": False}),
}


def write_multimodal(folder: Path, blocks: int, hidden: int) -> Path:
    """Write a synthetic Llama 4 with vision tower: names and shapes from our adapter, one shard a block."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    demo = json.loads((prepared.DEMO / "model" / "config.json").read_text())
    text = synthetic.text_config(blocks, hidden, hidden + hidden // 4, EXPERTS)
    vision = demo["vision_config"] | {"projector_output_dim": hidden}
    config = demo | {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": synthetic.VOCABULARY - 1,
        "boi_token_index": synthetic.VOCABULARY - 2,
        "eoi_token_index": synthetic.VOCABULARY - 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    synthetic.write_tokenizer(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copy(prepared.DEMO / "model" / name, folder / name)
    adapter = load_adapter(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    prefixes = [adapter.block_prefix(block) for block in range(blocks)]
    for number, prefix in enumerate([*prefixes, None]):
        shapes = {
            name: shape
            for name, shape in adapter.disk_shapes(()).items()
            if (name.startswith(prefix) if prefix else not name.startswith(tuple(prefixes)))
        }
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if "norm" in name and len(shape) == 1
            else (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()
            for name, shape in shapes.items()
        }
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def synthetic_inputs(model: Path, folder: Path, rows: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    synthetic.write_texts(folder / "calibration.jsonl", rows, ROW_TOKENS, seed=1)
    synthetic.write_texts(folder / "choice.jsonl", 4, ROW_TOKENS, seed=2)
    encoded = Encoder(model, load_adapter(model)).encode_all(read_jsonl(folder / "calibration.jsonl"))
    packed = torch.stack([row.tokens for row in pack_rows(encoded, ROW_TOKENS, rows, prepared.SEED)])
    save_file({"rows": packed}, folder / "rows.safetensors")
    return {"family": "llama4", "rows": len(packed)}


def once(
    side: str, model: Path, folder: Path, facts: dict[str, Any], job: Path, build: Path, threads: int
) -> process.Measured:
    environment, script, options = SIDES[side]
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True)
    data = {
        "model": str(model),
        "inputs": str(folder),
        "family": facts["family"],
        "group": GROUP,
        "options": options,
        "weights": [],
        "rows": facts["rows"],
        "roles": ROLES[facts["family"]],
    }
    (job / "job.json").write_text(json.dumps(data))
    python = sys.executable if environment == "onecard" else str(build / "env" / environment / "bin" / "python")
    env = process.environment(threads, ours=environment == "onecard")
    took = process.measure([python, str(HERE / script), "quantize", str(job)], env, job / "quantize.log", 3 * 3600)
    if took.code:
        raise SystemExit(f"{side} failed, see {job / 'quantize.log'}")
    peak = json.loads((job / "quantize.json").read_text())["peak_rss_bytes"]
    return process.Measured(took.code, took.seconds, took.cpu_seconds, max(peak, took.peak_rss_bytes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 512: expert widths are 5/4 of it")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", action="append", choices=["synthetic", "demo"])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "peers")
    given = parser.parse_args()
    build = given.build.resolve()
    home = build / "speed"
    out = []
    for name in given.model or ["synthetic", "demo"]:
        if name == "synthetic":
            model = write_multimodal(home / "model", given.blocks, given.hidden)
            folder = home / "inputs"
            facts = synthetic_inputs(model, folder, given.rows)
        else:
            model, folder = prepared.DEMO / "model", build / "inputs" / "demo"
            facts = prepared.prepare(model, folder)
            facts["rows"] = min(given.rows, facts["rows"])
        runs: dict[str, list[process.Measured]] = {side: [] for side in SIDES}
        for pair in range(given.pairs):
            for side in list(SIDES)[:: 1 if pair % 2 == 0 else -1]:
                took = once(side, model, folder, facts, home / "jobs" / f"{name}-{side}", build, given.threads)
                runs[side].append(took)
                print(f"{name} {side}: {took.seconds:.1f} s, peak {took.peak_rss_bytes / 1e6:.0f} MB", flush=True)
        seconds = {side: statistics.median(t.seconds for t in taken) for side, taken in runs.items()}
        peaks = {side: statistics.median(t.peak_rss_bytes for t in taken) for side, taken in runs.items()}
        ours, *others = SIDES
        out.append(
            {
                "model": name,
                "rows": facts["rows"],
                "blocks": given.blocks,
                "hidden": given.hidden,
                "threads": given.threads,
                "median_seconds": seconds,
                "median_peak_rss_bytes": peaks,
                "runs": {side: [[t.seconds, t.peak_rss_bytes] for t in taken] for side, taken in runs.items()},
            }
        )
        for theirs in others:
            print(
                f"{name}: {seconds[theirs] / seconds[ours]:.2f} times as fast as {theirs}, "
                f"{peaks[ours] / peaks[theirs]:.2f} of its peak",
                flush=True,
            )
    (build / "speed.json").write_text(json.dumps(out, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
