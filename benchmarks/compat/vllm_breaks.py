"""How vLLM's loader ends on the breakages that `onecard check --engine vllm` catches. Needs vllm_loads.py's files.

    python benchmarks/compat/vllm_breaks.py

Takes the int4 files of one case (BUILD/vllm-cases), breaks a copy in one way, hands it to vLLM's loader (with_vllm.py
load), and prints how that ends beside the rules that `onecard check` names. Exit code 1 when a breakage breaks no rule.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from breakages import BREAKAGES, LAYER, broken
from safetensors.torch import load_file
from vllm_environment import BUILD, interpreter

from onecard.checkpoint.engines.check import hold_against
from onecard.core.errors import DamageError

HERE = Path(__file__).resolve().parent
SOUND = "int4-g32--attention-too"


def said(folder: Path, out: Path, build: Path) -> str:
    """How vLLM's loader ended: its error, or the parameters that it did not write."""
    command = [str(interpreter(build)), str(HERE / "with_vllm.py"), "load", str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = re.findall(r"^(?:\[rank0\]: )?(\w*Error\b.*)$", done.stderr, re.MULTILINE)
        return f"ends in `{(errors or ['an error without a word'])[-1][:160]}`"
    writes = json.loads((out / "loaded.json").read_text())["writes"]
    # The family has no biases; vLLM creates them as zeros.
    left = [n for n, (least, _) in writes.items() if not least and ".attn." not in n and not n.endswith("_bias")]
    if left:
        return f"loads without a word, and leaves parts of {', '.join(left)} as they were created"
    return "loads without a word" + (", and q is not permuted" if unpermuted(folder, out) else "")


def unpermuted(folder: Path, out: Path) -> bool:
    """Whether q of layer 0, in GPTQ's layout, was loaded without a permutation."""
    stored = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    loaded = load_file(out / "loaded.safetensors")
    q, qkv = stored.get(f"{LAYER}self_attn.q_proj.qweight"), loaded.get(f"{LAYER}self_attn.qkv_proj.qweight")
    return q is not None and qkv is not None and torch.equal(qkv[:, : q.shape[1]], q)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD)
    build, missed = parser.parse_args().build.resolve(), 0
    print("| broken on purpose | vLLM's loader | rules that `onecard check --engine vllm` names |\n|---|---|---|")
    home = build / "breakages"
    for breakage in BREAKAGES:
        folder = broken(build / "vllm-cases" / SOUND / "int", breakage, home)
        held = hold_against(str(folder), ("vllm",))
        try:
            held.refuse()
            missed += 1
        except DamageError:
            pass
        rules = ", ".join(f"`{breach.rule.name}`" for breach in held.of("error")["vllm"])
        ended = said(folder, home / f"{breakage.folder}-loaded", build)
        print(f"| {breakage.name} | {ended} | {rules or 'NONE'} |", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
