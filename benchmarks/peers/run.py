"""Run other quantizers and ours on the same two models and rows, under one judge: `make peers`.

    python benchmarks/peers/run.py                                       # everything, judged on the test set
    python benchmarks/peers/run.py --choice --peer llmcompressor-gptq --model demo --group 128

Each job (peer, model, group) is a process in the peer's own environment. Wall time and peak RSS are those of the whole
process, imports included. A job that is finished for the same inputs is judged and not run again, except with
`--again`. Rows are merged into build/peers/results-SET.json; table.py and plot.py draw them. `--choice` judges on the
texts that choices are made on. Without it the test set is read, which is for the final run alone.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import judge  # noqa: E402
import prepared  # noqa: E402
import process  # noqa: E402
import rows as kept  # noqa: E402
import table  # noqa: E402
from field import PEERS, ROLES, Peer  # noqa: E402

from onecard.checkpoint.source import open_folder  # noqa: E402

MODELS = {"demo": prepared.DEMO / "model", "qwen3-moe": None}
TRIAL_DOCUMENTS = 8
TENSOR_FILES = (".safetensors", ".gguf", ".bin", ".pt")


def interpreter(build: Path, peer: Peer) -> Path:
    return (
        Path(sys.executable) if peer.environment == "onecard" else build / "env" / peer.environment / "bin" / "python"
    )


def last_words(job: Path, phase: str, code: int) -> str:
    """Why a phase failed: the exception that the script caught, or the last line that it wrote."""
    facts = job / f"{phase}.json"
    if facts.exists():
        return str(json.loads(facts.read_text()).get("error", f"exit code {code}"))
    lines = [line for line in (job / f"{phase}.log").read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip() if lines else 'not a word'}"


def phase(name: str, peer: Peer, job: Path, build: Path, given: argparse.Namespace) -> process.Measured:
    command = [str(interpreter(build, peer)), str(HERE / peer.script), name, str(job)]
    env = process.environment(given.threads, ours=peer.environment == "onecard")
    return process.measure(command, env | {"PEERS_BUILD": str(build)}, job / f"{name}.log", given.timeout)


def quantized(
    peer: Peer,
    model: Path,
    given_inputs: Path,
    facts: dict[str, Any],
    group: int,
    job: Path,
    build: Path,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Run both phases unless this job is finished. Returns the run's facts, with `error` if it failed."""
    wanted = {
        "model": str(model),
        "inputs": str(given_inputs),
        "family": facts["family"],
        "group": group,
        "options": peer.options,
        "weights": facts["weights"],
        "identity": facts["identity"],
        "threads": given.threads,
        "roles": ROLES[facts["family"]],
        "rows": min(facts["rows"], given.rows or facts["rows"]),
    }
    done = job / "done.json"
    if done.exists() and not given.again and json.loads((job / "job.json").read_text()) == wanted:
        return dict(json.loads(done.read_text()))
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps(wanted, indent=1))
    if not interpreter(build, peer).exists():
        return {"error": f"no environment {peer.environment}: `make peers-env` builds it"}
    took = phase("quantize", peer, job, build, given)
    found: dict[str, Any] = {"seconds": round(took.seconds, 2), "cpu_seconds": round(took.cpu_seconds, 2)}
    written = job / "quantize.json"
    if written.exists():
        found |= json.loads(written.read_text())
    found["peak_rss_bytes"] = max(took.peak_rss_bytes, found.get("peak_rss_bytes", 0))
    if took.code:
        return found | {"error": last_words(job, "quantize", took.code)}
    read = phase("dense", peer, job, build, given)
    if read.code:
        return found | {"error": f"reading back: {last_words(job, 'dense', read.code)}"}
    done.write_text(json.dumps(found, indent=1))
    return found


def sizes(checkpoint: Path, facts: dict[str, Any], source: Path) -> dict[str, Any]:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix in TENSOR_FILES]
    stored = sum(path.stat().st_size for path in weights)
    infos = open_folder(source).infos
    linear = sum(infos[name].nbytes // 2 for name in facts["weights"])  # bf16: parameters
    kept = sum(info.nbytes for name, info in infos.items() if name not in set(facts["weights"]))
    return {
        "stored_bytes": stored,
        "all_file_bytes": sum(path.stat().st_size for path in files),
        "bits_per_weight": stored * 8 / facts["parameters"],
        "linear_bits_per_weight": (stored - kept) * 8 / linear,
    }


def row(peer: Peer, name: str, group: int, build: Path, given: argparse.Namespace) -> dict[str, Any]:
    model = MODELS[name] or build / "models" / name
    folder = build / "inputs" / name
    facts = prepared.prepare(model, folder)
    job = build / ("trial" if given.rows else "jobs") / name / f"{peer.name}-g{group}"
    which = "choice" if given.choice or given.rows else "test"
    head = {"peer": peer.name, "model": name, "group": group, "set": which, "calibrated": peer.calibrated}
    found = head | quantized(peer, model, folder, facts, group, job, build, given)
    if "error" in found:
        return found | {"status": "does not run"}
    found |= sizes(job / "checkpoint", facts, folder / "canonical")
    source, dense = open_folder(folder / "canonical"), open_folder(job / "dense")
    found["weights"] = judge.check_weights(source, dense, facts["weights"], facts["experts"], group, peer.rescales)
    wrong = found["weights"]["error_max"] > judge.MOST_ERROR or found["weights"]["not_finite"]
    found["status"] = "stored wrong" if wrong else "ok"
    if not found["weights"]["not_finite"]:
        rows = prepared.evaluation_rows(model, which, folder)[: TRIAL_DOCUMENTS if given.rows else None]
        found["kl"] = judge.kl(model, dense, rows)
    return found


def weight_error(found: dict[str, Any]) -> str:
    if "kl" not in found:
        return ""
    weights = found["weights"]
    return f", weight error {weights['error_mean']:.3f} (most {weights['error_max']:.3f})"


def merge(path: Path, new: dict[str, Any]) -> None:
    """Put a row into the results, in place of an older row of the same peer, model and group."""
    rows = json.loads(path.read_text()) if path.exists() else []
    key = ("peer", "model", "group")
    rows = [r for r in rows if any(r[k] != new[k] for k in key)] + [new]
    order = {peer.name: number for number, peer in enumerate(PEERS)}
    rows.sort(key=lambda r: (r["model"], -r["group"], order.get(r["peer"], len(order))))
    path.write_text(json.dumps(rows, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", help="only this one; may be repeated")
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--group", action="append", type=int)
    parser.add_argument("--choice", action="store_true", help="judge on the choice set, not on the test set")
    parser.add_argument("--again", action="store_true", help="run jobs that are finished once more")
    parser.add_argument(
        "--rows", type=int, help="a trial on this many calibration rows, the first ones, judged on the choice set"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3 * 3600, help="seconds that one job may take")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "peers")
    given = parser.parse_args()
    unknown = set(given.peer or ()) - {peer.name for peer in PEERS}
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; known: {', '.join(p.name for p in PEERS)}")
    build = given.build.resolve()
    results = build / f"results-{'trial' if given.rows else 'choice' if given.choice else 'test'}.json"
    for name in given.model or MODELS:
        for peer in PEERS:
            if peer.name not in given.peer if given.peer else peer.check_only:
                continue
            for group in peer.groups:
                if given.group and group not in given.group:
                    continue
                found = row(peer, name, group, build, given)
                found["machine"] = {"platform": platform.platform(), "cores": os.cpu_count(), "threads": given.threads}
                merge(results, found)
                print(table.line(kept.row_of(found)) + weight_error(found), flush=True)
    table.write(kept.rows_of(json.loads(results.read_text())), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
