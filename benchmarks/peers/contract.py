"""The contract between run.py and a peer's script. It runs in the peer's environment, so it imports nothing of onecard.

    with_TOOL.py quantize JOB    timed: reads JOB/job.json, writes JOB/checkpoint as the tool stores it
    with_TOOL.py dense JOB       not timed: reads that folder back with the tool's own reader into JOB/dense

JOB/dense holds every weight under its canonical (unfused) name: fp32 where the tool quantized, else as stored. What a
checkpoint lacks is taken from the source. Calibration rows are int64 [rows, tokens], all of one length. They and an
unfused copy of the source are in the folder that job.json calls `inputs`.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from process import high_water


@dataclass(frozen=True)
class Job:
    """`weights`: canonical names of the text blocks' linear weights, in order; these are to become int4."""

    folder: Path
    model: Path
    inputs: Path
    family: str
    group: int
    options: dict[str, Any]
    weights: tuple[str, ...]
    row_count: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def rows(self) -> Any:
        from safetensors.torch import load_file

        return load_file(self.inputs / "rows.safetensors")["rows"][: self.row_count]

    def source(self) -> dict[str, Any]:
        """All tensors of the unfused copy of the source."""
        from safetensors.torch import load_file

        return load_file(self.inputs / "canonical" / "model.safetensors")


def read_job(folder: Path) -> Job:
    data = json.loads((folder / "job.json").read_text())
    return Job(
        folder,
        Path(data["model"]),
        Path(data["inputs"]),
        data["family"],
        data["group"],
        data["options"],
        tuple(data["weights"]),
        data["rows"],
    )


def alias(name: str) -> str | None:
    """A tensor's name without the prefix that a tool may add: from `layers.` on, elsewhere its last two parts.

    None for the vision tower and the projector, which have layers of their own.
    """
    if re.search(r"vision|visual|multi_modal", name):
        return None
    found = re.search(r"(?:^|\.)(layers\.\d+\..*)$", name)
    if found:
        return found[1]
    tail = ".".join(name.split(".")[-2:])
    return tail if tail in ("embed_tokens.weight", "norm.weight", "lm_head.weight") else None


def stored(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor in the safetensors files of a folder and its subfolders."""
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield name, file.get_tensor(name)


def modules_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Alias of a module -> last name -> stored tensor: {"layers.0.self_attn.q_proj": {"qweight": ...}}."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in stored(folder):
        known = alias(name)
        if known is not None:
            module, _, leaf = known.rpartition(".")
            found.setdefault(module, {})[leaf] = tensor
    return found


def canonical_modules(job: Job) -> dict[str, str]:
    """Alias of each module to quantize -> its canonical weight."""
    return {str(alias(name)).removesuffix(".weight"): name for name in job.weights}


def gptq_weight(parts: dict[str, Any], group: int, version: int) -> Any:
    """The fp32 weight [out, in] of a layer in the GPTQ layout.

    An int32 holds nibbles, lowest first. qweight is packed along the inputs, qzeros along the outputs. Version 1 stores
    each zero point less 1."""
    import torch

    shifts = torch.arange(0, 32, 4)
    codes_IO = (parts["qweight"][:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1)
    zeros_GO = (parts["qzeros"][:, :, None] >> shifts & 15).flatten(1, 2) + (1 if version == 1 else 0)
    inputs = len(codes_IO)
    group_of = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // group
    return ((codes_IO - zeros_GO[group_of]).float() * parts["scales"].float()[group_of]).T


def save_slices(job: Job, packed: dict[str, Any], source: dict[str, Any]) -> None:
    """Save the checkpoint of a tool that quantized slices: its tensors, and every other tensor as it was."""
    from safetensors.torch import save_file

    job.checkpoint.mkdir()
    kept = {name: tensor for name, tensor in source.items() if name not in job.weights}
    save_file({k: v.contiguous() for k, v in (kept | packed).items()}, job.checkpoint / "model.safetensors")


def store_as_bf16(folder: Path) -> None:
    """Rewrite fp32 tensors as bf16, the source's dtype, for tools that compute in fp32 and save fp32.

    Scales become fp16, which those tools store by default."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32:
                tensors[name] = tensor.to(torch.float16 if name.endswith(".scales") else torch.bfloat16)
        save_file(tensors, path, metadata)


def _write_dense(job: Job, dense: dict[str, Any]) -> None:
    """Write `dense`, with what it lacks from the checkpoint (under any prefix), else from the source."""
    import torch
    from safetensors.torch import save_file

    source = job.source()
    unknown = sorted(dense.keys() - source.keys())
    if unknown:
        raise ValueError(f"no such weights in the source: {unknown[:5]}")
    held = {
        alias(name): tensor for name, tensor in stored(job.checkpoint) if alias(name) and tensor.is_floating_point()
    }
    out = {}
    for name, tensor in source.items():
        value = dense[name] if name in dense else held.get(alias(name), tensor)
        if value.shape != tensor.shape:
            raise ValueError(f"{name} was read back as {list(value.shape)}; it is {list(tensor.shape)}")
        out[name] = value.detach().to(torch.float32).contiguous() if name in dense else value.contiguous()
    (job.folder / "dense").mkdir()
    save_file(out, job.folder / "dense" / "model.safetensors")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(quantize: Callable[[Job], None], dense: Callable[[Job], dict[str, Any]], packages: tuple[str, ...]) -> None:
    """Run one phase of a peer's script. PHASE.json says what happened, an exception's words included."""
    phase, job = sys.argv[1], read_job(Path(sys.argv[2]))
    facts: dict[str, Any] = {"versions": versions(packages)}
    try:
        if phase == "quantize":
            quantize(job)
        else:
            _write_dense(job, dense(job))
        code = 0
    except Exception as error:
        traceback.print_exc()
        facts["error"] = f"{type(error).__name__}: {error}"
        code = 1
    facts["peak_rss_bytes"] = high_water("self")
    (job.folder / f"{phase}.json").write_text(json.dumps(facts, indent=1))
    sys.exit(code)
