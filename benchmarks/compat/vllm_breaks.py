"""What vLLM itself does with the breakages that `onecard check --engine vllm` catches. Needs vllm_loads.py's files.

    python benchmarks/compat/vllm_breaks.py

Takes the int4 files of one of its cases (BUILD/vllm-cases), breaks a copy in one way, hands it to vLLM's loader
(with_vllm.py load) and prints how that ends beside the rule that `onecard check` names. Exit code 1 when a breakage
breaks no rule.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm_environment import BUILD, interpreter

from onecard.checkpoint.formats import compressed_tensors as ct
from onecard.core.errors import DamageError
from onecard.engine_check import hold_against
from onecard.prepare import demo_folder

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.0."
SOUND = "int4-g32--attention-too"


def fused(tensors: Tensors, config: dict[str, object]) -> None:
    """Layer 0's experts as they were published."""
    original = load_file(demo_folder() / "model" / "model.safetensors")
    stem = f"{LAYER}feed_forward.experts."
    for name in [n for n in tensors if n.startswith(stem)]:
        del tensors[name]
    tensors |= {n: t for n, t in original.items() if n.startswith(stem)}


def mixed(tensors: Tensors, config: dict[str, object]) -> None:
    """Expert 3's up projection in eight bits."""
    name = f"{LAYER}feed_forward.experts.3.up_proj.weight_packed"
    tensors[name] = ct.pack_words(ct.unpack_words(tensors[name], 4, tensors[name].shape[1] * 8), 8)


def without_scales(tensors: Tensors, config: dict[str, object]) -> None:
    del tensors[f"{LAYER}feed_forward.experts.3.up_proj.weight_scale"]


def half_ignored(tensors: Tensors, config: dict[str, object]) -> None:
    """q alone stays whole."""
    module = f"{LAYER}self_attn.q_proj"
    original = load_file(demo_folder() / "model" / "model.safetensors")
    for leaf in (ct.PACKED, ct.SCALE, ct.SHAPE):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = original[f"{module}.weight"]
    config["quantization_config"]["ignore"].append(module)  # type: ignore[index]


BREAKS: tuple[tuple[str, Callable[[Tensors, dict[str, object]], None]], ...] = (
    ("experts of layer 0 never taken apart", fused),
    ("one expert's up projection int8 among int4", mixed),
    ("one expert's scales missing", without_scales),
    ("q bf16 beside int4 k and v", half_ignored),
)


def broken(source: Path, out: Path, change: Callable[[Tensors, dict[str, object]], None]) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tensors: Tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((source / "config.json").read_text())
    change(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for path in source.glob("*.json"):
        if path.name not in ("config.json", "onecard.json", "model.safetensors.index.json"):
            shutil.copy(path, out / path.name)
    return out


def said(folder: Path, out: Path, build: Path) -> str:
    """How vLLM's loader ends: its error, or what it left as it was created."""
    command = [str(interpreter(build)), str(HERE / "with_vllm.py"), "load", str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = re.findall(r"^(?:\[rank0\]: )?(\w*Error\b.*)$", done.stderr, re.MULTILINE)
        return f"ends in `{(errors or ['an error without a word'])[-1][:160]}`"
    writes = json.loads((out / "loaded.json").read_text())["writes"]
    left = [name for name, (least, _) in writes.items() if not least and ".attn." not in name]
    return f"loads without a word, and leaves parts of {', '.join(left) or 'nothing'} as they were created"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD)
    build, missed = parser.parse_args().build.resolve(), 0
    print("| broken on purpose | vLLM's loader | rules that `onecard check --engine vllm` names |\n|---|---|---|")
    for number, (name, change) in enumerate(BREAKS):
        work = build / "vllm-breaks" / str(number)
        folder = broken(build / "vllm-cases" / SOUND / "int", work / "files", change)
        held = hold_against(str(folder), ("vllm",))
        try:
            held.refuse()
            missed += 1
        except DamageError:
            pass
        rules = ", ".join(f"`{breach.rule.name}`" for breach in held.of("error")["vllm"])
        print(f"| {name} | {said(folder, work / 'out', build)} | {rules or 'NONE'} |", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
