"""Exports in bf16 for engines without int4 (`onecard export --format bf16`), and the text model of such an export.

vLLM's multimodal Llama 4 wants a whole image processor before it answers anything. `text_model` therefore makes a
folder of the text model alone from an export with a vision tower: the same tensors under the names of
`Llama4ForCausalLM`, and the config's own `text_config`. Any other export is served as it is.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from onecard.checkpoint.model import open_model
from onecard.models.adapter import Role

# Files that the text model's folder goes without: those of the tower, and digests and records of missing files.
LEFT_OUT = ("config.json", "model.safetensors.index.json", "onecard.json")


def run(*command: object, ours: bool) -> None:
    """Run one command, quietly unless it fails, with a PYTHONPATH that hides this package."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if not ours:
        env.pop("PYTHONPATH", None)
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-4:]} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def onecard(*arguments: object) -> None:
    run(sys.executable, "-m", "onecard", *arguments, ours=True)


def exported(checkpoint: Path, out: Path) -> Path:
    onecard("export", checkpoint, "--format", "bf16", "-o", out, "--overwrite")
    return out


def text_model(folder: Path, out: Path) -> Path:
    """A bf16 export without vision tower: `folder` itself, or its text model written to `out`."""
    model = open_model(str(folder))
    adapter = model.adapter
    if not adapter.has_vision:
        return folder
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {name: t for name, t in load_file(shard).items() if adapter.role(name) is not Role.VISION}
    prefix = getattr(adapter, "prefix", "")
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(named, out / "model.safetensors", {"format": "pt"})
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in LEFT_OUT and "processor" not in path.name:
            shutil.copy(path, out / path.name)
    config = model.config["text_config"] | {"architectures": ["Llama4ForCausalLM"], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out
