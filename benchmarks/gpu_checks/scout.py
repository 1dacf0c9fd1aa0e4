"""Blocks of Scout's true shapes with random weights through the whole run: seconds by stage and peaks of memory beside
what `onecard plan` says of the same model, recipe and texts. Their KL means nothing."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from gpu_checks.processes import Checks, Setup, in_child, needed, read_record, table
from synthetic import write_model, write_texts

METHODS = ("rtn", "fast", "balanced", "best")
# Hidden size, width of an expert, experts; rows and tokens of calibration and of evaluation.
SCOUT, SCOUT_ROWS = (5120, 8192, 16), (256, 2048, 64, 2048)
SMALL, SMALL_ROWS = (256, 256, 4), (6, 64, 2, 32)
SCOUT_BLOCKS = 48


def recipe_of(method: str, setup: Setup) -> dict[str, Any]:
    """The keys of a recipe for a synthetic model: int4 experts, and no limit that random weights would pass."""
    rows, tokens, evaluated, of_tokens = SMALL_ROWS if setup.small else SCOUT_ROWS
    more = {"tabu_moves": 5} if setup.small and method != "rtn" else {}
    return {
        "name": f"synthetic-{method}",
        "description": "random weights",
        "method": method,
        "group_size": 128,
        "quantize_roles": ["expert", "shared_expert"],
        "calibration_rows": rows,
        "calibration_row_tokens": tokens,
        "evaluation_rows": evaluated,
        "evaluation_row_tokens": of_tokens,
        "warn_below_expert_rows": 0,
    } | more


def write_synthetic(setup: Setup, folder: Path, blocks: int) -> Path:
    """The model in `folder`, once, with texts beside it, one token a letter. Its random numbers are drawn on the
    device. Raises RuntimeError where the disk is too small."""
    rows, tokens, evaluated, of_tokens = SMALL_ROWS if setup.small else SCOUT_ROWS
    write_texts(folder / "calibration.jsonl", rows + 2, tokens, seed=1)
    write_texts(folder / "evaluation.jsonl", evaluated + 2, of_tokens, seed=2)
    model = folder / f"model-{blocks}"
    if (model / "model.safetensors.index.json").exists():  # written last
        return model
    shutil.rmtree(model, ignore_errors=True)
    hidden, width, experts = SMALL if setup.small else SCOUT
    # The model and its result, and rows between the blocks.
    wanted = blocks * experts * 3 * hidden * width * 2 * 1.5 + 8e9 * (not setup.small)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise RuntimeError(
            f"{blocks} blocks need {wanted / 1e9:.0f} GB of disk in {folder}, and {free / 1e9:.0f} are free"
        )
    status, _ = in_child(setup, write_model, model, blocks, hidden, width, experts, setup.device)
    if status:
        raise RuntimeError(f"the synthetic model could not be written: {status}")
    return model


def through(setup: Setup, method: str, blocks: int) -> dict[str, Any]:
    """One run of the method over so many blocks."""
    folder = setup.place("scout")
    model, out, recipe = write_synthetic(setup, folder, blocks), folder / "out", folder / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(method, setup)))
    planned = folder / "plan.txt"
    planned.unlink(missing_ok=True)
    needed(setup, ["plan", str(model), "--recipe", str(recipe)], planned)
    plan = json.loads(next(line for line in planned.read_text().splitlines() if line.startswith("{")))
    args = [f"--{which}={folder / which}.jsonl" for which in ("calibration", "evaluation")]
    log = folder / f"{method}.txt"
    needed(setup, ["quantize", str(model), str(out), "--recipe", str(recipe), "--overwrite", *args], log)
    record = read_record(out)
    shutil.rmtree(out)
    machine = record["machine"]
    peak = machine["peak_rss_bytes"] if setup.on_cpu else machine["peak_device_bytes"]
    return {
        "method": method,
        "blocks": blocks,
        "device": machine["device"],
        "seconds": machine["seconds"],
        "planned_seconds": plan["estimated_seconds"],
        "peak_bytes": peak,
        "planned_peak_bytes": plan["estimated_ram_bytes" if setup.on_cpu else "estimated_device_bytes"],
        "peak_rss_bytes": machine["peak_rss_bytes"],
        "calibration_tokens": record["texts"].get("calibration", {}).get("tokens", 0),
        "stage_seconds": machine["stage_seconds"],
    }


def block(setup: Setup, method: str) -> dict[str, Any]:
    found = through(setup, method, 1)
    return found | {"ok": True, "table": summary([found])}


def blocks(setup: Setup) -> dict[str, Any]:
    """Four blocks by `fast`, their verification included, and what 48 would take. One block is known from a part that
    ran before, or is run here."""
    known = setup.folder / "results" / "block-fast.json"
    one = json.loads(known.read_text()) if known.exists() else None
    if one is None or "seconds" not in one:
        one = through(setup, "fast", 1)
    four, checks = through(setup, "fast", 4), Checks()
    more = (four["seconds"] - one["seconds"]) / 3
    whole = one["seconds"] + (SCOUT_BLOCKS - 1) * more
    checks.add("four blocks with verification", True, f"{four['seconds']:.0f} s, {more:.1f} s for each further block")
    said = f"Extrapolated, not measured: {SCOUT_BLOCKS} blocks in {whole / 60:.1f} min, without Scout's own vocabulary."
    found = four | {"ok": checks.ok, "seconds_of_a_further_block": more, "extrapolated_seconds_of_48_blocks": whole}
    return found | {"table": f"{summary([one, four])}\n\n{said}"}


def summary(runs: list[dict[str, Any]]) -> str:
    """A column a run."""
    head = ("", *(f"`{run['method']}`, {run['blocks']} block{'s' * (run['blocks'] > 1)}" for run in runs))
    stages = list(dict.fromkeys(stage for run in runs for stage in run["stage_seconds"]))
    rows: list[tuple[object, ...]] = [
        ("seconds", *(f"{run['seconds']:.1f}" for run in runs)),
        ("`plan` says", *(f"{run['planned_seconds']:.1f}" for run in runs)),
        ("peak of device memory, GB", *(f"{run['peak_bytes'] / 1e9:.2f}" for run in runs)),
        ("`plan` says", *(f"{run['planned_peak_bytes'] / 1e9:.2f}" for run in runs)),
        ("peak of RAM, GB", *(f"{run['peak_rss_bytes'] / 1e9:.2f}" for run in runs)),
    ]
    rows += [(stage, *(f"{run['stage_seconds'].get(stage, 0):.2f}" for run in runs)) for stage in stages]
    return table(head, rows)


def card_facts() -> dict[str, Any]:
    """The card's name and its driver, as nvidia-smi says them; empty where it is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"nvidia-smi": said.splitlines()}
