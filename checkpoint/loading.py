"""Load a checkpoint with transformers, as a stranger would.

The whole model is loaded, dequantized, into memory.
"""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..models.families import load_adapter
from ..models.unstacked import unstacked_experts
from .formats.bitsandbytes_read import NAME as BITSANDBYTES
from .formats.compressed_tensors_config import NAME as COMPRESSED_TENSORS


def load_with_transformers(path: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The checkpoint as transformers' own class, dequantized to `dtype` when it is loaded."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

    config = load_adapter(path).config  # AutoConfig would refuse what the adapter mends
    cls = AutoModelForImageTextToText if config.model_type == "llama4" else AutoModelForCausalLM
    kwargs: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    block = getattr(config, "quantization_config", None)
    if isinstance(block, dict) and block.get("quant_method") == COMPRESSED_TENSORS:
        if len(block.get("config_groups") or {}) > 1:
            raise InputError(
                f"{path} has several widths, and transformers {transformers.__version__} takes one for all experts and "
                "one for all other matrices: it would unpack the rest wrongly without a word. vLLM loads it; for "
                "transformers make a folder with `onecard export --format bf16`"
            )
        # Left compressed, the first forward pass ends in an AttributeError on a CPU.
        kwargs["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    of_bitsandbytes = isinstance(block, dict) and block.get("quant_method") == BITSANDBYTES
    try:
        with warnings.catch_warnings(), unstacked_experts() if of_bitsandbytes else nullcontext():
            # That `dequantize` overrides the checkpoint's own configuration is what it is given for.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = cls.from_pretrained(str(path), **kwargs).eval()
            if of_bitsandbytes:
                # Its kernels multiply in bf16 or fp16 and, some of them, only certain shapes.
                model = model.dequantize().eval()
    # 5.23 drops the zero points of experts, which it stacks, and then misses them; of bitsandbytes it wants the experts
    # one by one that it saved fused; for GPTQ it wants packages that need not be here.
    except (RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"transformers {transformers.__version__} cannot load {path}: {error}") from error
    # Experts that it dequantizes and stacks (Qwen3) keep the dtype of their scales, whatever was asked for.
    # Parameters alone: the buffers of RoPE must stay in fp32.
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model
