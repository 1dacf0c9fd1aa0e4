"""Whether this tree still makes the checkpoints that a commit made: every file but the record is held against it.

    python benchmarks/same_bytes.py --against COMMIT [--models babies|demo]

Both trees quantize the same models with the same recipes, each in processes of its own: Qwen3-MoE's and Scout's babies
(tests/babies.py), or the embedded model, by `rtn`, `fast` and `balanced`. The commit's tree is a git worktree in a
temporary folder. One line a checkpoint; exit code 1 on a difference.

Left out are onecard.json, which holds times and versions, and its line in SHA256SUMS. Where one tree writes one
safetensors file and the other several, the tensors are compared by name, dtype, shape and bytes in place of the files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("rtn", "fast", "balanced")
FAMILIES = ("qwen3", "scout")
# Files of the sharded layout only.
INDEX = "model.safetensors.index.json"
BABIES = """
import random, sys
from pathlib import Path
sys.path.insert(0, "tests")
from babies import make_baby
try:
    from inputs import write_jsonl, write_tokenizer
except ImportError:  # an older commit keeps them there
    from conftest import write_jsonl, write_tokenizer
folder, rng = Path(sys.argv[1]), random.Random(0)
for family in sys.argv[2:]:
    make_baby(folder / family, family, 2)
    write_tokenizer(folder / family)
words = [" ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(9)) for _ in range(18)]
write_jsonl(folder / "calibration.jsonl", [{"text": text} for text in words[:12]])
write_jsonl(folder / "evaluation.jsonl", [{"text": text} for text in words[12:]])
"""


@dataclass(frozen=True)
class Job:
    """One checkpoint to make: what to call it, and the command's arguments apart from OUT."""

    name: str
    model: str
    options: tuple[str, ...]


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's tree."""
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
    try:
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def python(tree: Path, links: Path, *arguments: object) -> None:
    """A Python process in which `onecard` is that tree. Raises RuntimeError with what it said when it fails."""
    links.mkdir(parents=True, exist_ok=True)
    link = links / "onecard"
    if not link.is_symlink():
        link.symlink_to(tree)
    environment = os.environ | {"PYTHONPATH": str(links), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} in {tree}:\n{done.stderr}")


def write_recipe(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def baby_jobs(folder: Path) -> list[Job]:
    python(ROOT, folder / "link-babies", "-c", BABIES, folder, *FAMILIES)
    shared = {
        "description": "For babies.",
        "group_size": 32,
        "quantize_roles": ["expert", "shared_expert", "mlp"],
        "warn_below_expert_rows": 0,
        "calibration_rows": 8,
        "calibration_row_tokens": 24,
        "evaluation_rows": 6,
        "evaluation_row_tokens": 24,
        "batch_tokens": 96,
        "max_shard_bytes": 200_000,
    }
    texts = [f"--{which}={folder / which}.jsonl" for which in ("calibration", "evaluation")]
    jobs = []
    for method in METHODS:
        recipe = write_recipe(folder / f"{method}.yaml", {"name": "same", "method": method} | shared)
        jobs += [Job(f"{f}-{method}", str(folder / f), ("--recipe", recipe, *texts)) for f in FAMILIES]
    return jobs


def demo_jobs(folder: Path) -> list[Job]:
    shipped = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    limits = ("tasks", "max_flip_rate")  # bounds for `balanced` alone, and no matter of bytes
    common = {key: value for key, value in shipped.items() if key not in limits}
    made = {m: write_recipe(folder / f"{m}.yaml", common | {"name": m, "method": m}) for m in METHODS}
    return [Job(f"demo-{method}", "demo", ("--recipe", recipe)) for method, recipe in made.items()]


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Every file by name; of SHA256SUMS the lines that do not concern the record."""
    found = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "onecard.json"}
    sums = found.get("SHA256SUMS", b"").splitlines()
    return found | {"SHA256SUMS": b"\n".join(line for line in sums if not line.endswith(b"onecard.json"))}


def tensors_of(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).contiguous()
                raw = tensor.flatten().view(dtype=torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def differing(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def compare(here: Path, there: Path) -> tuple[bool, str]:
    """(whether the two checkpoints are the same, what to say of them)."""
    ours, theirs = files_of(here), files_of(there)
    shards = [sorted(name for name in files if name.endswith(".safetensors")) for files in (ours, theirs)]
    said = f"{len(ours)} files"
    if shards[0] == shards[1]:
        wrong = differing(ours, theirs)
    else:
        said = f"{len(shards[0])} shards here, {len(shards[1])} there: by tensor"
        layout = {*shards[0], *shards[1], INDEX, "SHA256SUMS"}
        kept = [{name: data for name, data in files.items() if name not in layout} for files in (ours, theirs)]
        wrong = differing(*kept) + differing(tensors_of(here), tensors_of(there))
    return not wrong, f"{said}, {'identical' if not wrong else 'DIFFERENT: ' + ', '.join(wrong[:5])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--models", choices=("babies", "demo"), default="babies")
    given = parser.parse_args()
    all_same = True
    with tempfile.TemporaryDirectory() as name, checked_out(given.against, Path(name)) as other:
        folder = Path(name)
        for job in (baby_jobs if given.models == "babies" else demo_jobs)(folder):
            outs = {tree: folder / side / job.name for side, tree in (("here", ROOT), ("there", other))}
            for tree, out in outs.items():
                links = folder / f"link-{out.parent.name}"
                python(tree, links, "-m", "onecard", "quantize", job.model, out, *job.options)
            same, said = compare(outs[ROOT], outs[other])
            all_same &= same
            print(f"{job.name:<16} {said}", flush=True)
    sys.exit(not all_same)


if __name__ == "__main__":
    main()
