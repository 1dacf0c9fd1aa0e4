"""Checkpoints broken in the ways that users report, and what `onecard check --engine vllm` says about each.

    python benchmarks/compat/breakages.py                 # quantizes the embedded model; a minute
    python benchmarks/compat/breakages.py --sound FOLDER  # breaks copies of this folder: compressed-tensors int4 g32

Takes sound int4 files of the embedded model, breaks a copy in one way, and runs the command on it. Prints the
transcript for docs/engines.md. vllm_breaks.py hands the same copies to vLLM itself. Exit code 1 when a broken copy
passes.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import yaml
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from dense import onecard
from safetensors.torch import load_file, save_file
from vllm_environment import BUILD

from onecard.checkpoint.formats import compressed_tensors_write as ct
from onecard.conversion.export import export
from onecard.core.rows import Unwatched
from onecard.models.known import demo_folder
from onecard.models.llama4 import Llama4Adapter

Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.0."
RECIPE = {
    "name": "breakages",
    "description": "Sound files.",
    "method": "rtn",
    "group_size": 32,
    "quantize_roles": ["expert", "shared_expert", "mlp", "attention"],
    "evaluation_rows": 2,
    "evaluation_row_tokens": 64,
}


@dataclass(frozen=True)
class Breakage:
    """`change` alters the tensors and the config of a copy; `write` makes the broken folder from the sound one."""

    name: str
    folder: str
    change: Callable[[Tensors, dict[str, object]], None] | None = None
    write: Callable[[Path, Path], None] | None = None


def fused(tensors: Tensors, config: dict[str, object]) -> None:
    """Fuses layer 0's experts again, as they were published."""
    original = load_file(demo_folder() / "model" / "model.safetensors")
    stem = f"{LAYER}feed_forward.experts."
    for name in [n for n in tensors if n.startswith(stem)]:
        del tensors[name]
    tensors |= {n: t for n, t in original.items() if n.startswith(stem)}


def garbled(sound: Path, out: Path) -> None:
    """GPTQ's layout with q and k in it, as a tool writes it that does not know of their permutation."""
    with mock.patch.object(Llama4Adapter, "permuted_at_load", return_value=False):
        export(str(sound), "gptq", out, Unwatched())


def mixed(tensors: Tensors, config: dict[str, object]) -> None:
    """Expert 3's up projection in eight bits, announced in config.json."""
    module = f"{LAYER}feed_forward.experts.3.up_proj"
    packed, shape = tensors[f"{module}.{ct.PACKED}"], tensors[f"{module}.{ct.SHAPE}"].tolist()
    tensors[f"{module}.{ct.PACKED}"] = pack_to_int32(unpack_from_int32(packed, 4, torch.Size(shape)), 8)
    groups = config["quantization_config"]["config_groups"]  # type: ignore[index]
    eight = json.loads(json.dumps(next(iter(groups.values()))))
    eight["weights"]["num_bits"] = 8
    groups["group_int8"] = eight | {"targets": [module]}


def without_scales(tensors: Tensors, config: dict[str, object]) -> None:
    del tensors[f"{LAYER}feed_forward.experts.3.up_proj.weight_scale"]


def half_ignored(tensors: Tensors, config: dict[str, object]) -> None:
    """q alone stays bf16."""
    module = f"{LAYER}self_attn.q_proj"
    original = load_file(demo_folder() / "model" / "model.safetensors")
    for leaf in (ct.PACKED, ct.SCALE, ct.SHAPE):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = original[f"{module}.weight"]
    config["quantization_config"]["ignore"].append(module)  # type: ignore[index]


# The three most reported come first (docs/engines.md).
BREAKAGES = (
    Breakage("experts of layer 0 never taken apart", "fused-experts", fused),
    Breakage("q and k in GPTQ's layout", "garbled-qk", write=garbled),
    Breakage("one expert's up projection int8 among int4", "mixed-widths", mixed),
    Breakage("one expert's scales missing", "missing-scales", without_scales),
    Breakage("q bf16 beside int4 k and v", "half-ignored", half_ignored),
)


def broken(sound: Path, breakage: Breakage, home: Path) -> Path:
    """A copy of `sound` in `home` with one breakage."""
    out = home / breakage.folder
    shutil.rmtree(out, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    if breakage.write is not None:
        breakage.write(sound, out)
        return out
    assert breakage.change is not None
    out.mkdir()
    tensors: Tensors = {}
    for shard in sorted(sound.glob("*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((sound / "config.json").read_text())
    breakage.change(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for path in sound.glob("*.json"):
        if path.name not in ("config.json", "onecard.json", "model.safetensors.index.json"):
            shutil.copy(path, out / path.name)
    return out


def sound_files(home: Path) -> Path:
    """The embedded model in compressed-tensors, attention too, in groups of 32."""
    out, recipe = home / "sound", home / "recipe.yaml"
    home.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(RECIPE))
    onecard("quantize", "demo", out, "--recipe", recipe, "--overwrite")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD)
    parser.add_argument("--sound", type=Path)
    given = parser.parse_args()
    home, passed = given.build.resolve() / "breakages", 0
    sound = given.sound.resolve() if given.sound else sound_files(home)
    for breakage in BREAKAGES:
        folder = broken(sound, breakage, home)
        command = ["check", folder.name, "--engine", "vllm"]
        done = subprocess.run(
            [sys.executable, "-m", "onecard", *command], cwd=home, capture_output=True, text=True, check=False
        )
        print(f"$ onecard {' '.join(command)}        # {breakage.name}\n{done.stderr.rstrip()}")
        print(f"exit code {done.returncode}\n", flush=True)
        passed += done.returncode == 0
    return int(bool(passed))


if __name__ == "__main__":
    sys.exit(main())
