"""Load a checkpoint with transformers, as any user would. The whole model is dequantized into memory."""

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
    """The checkpoint as transformers' own class, dequantized to `dtype`. Raises InputError when transformers cannot
    load it."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

    config = load_adapter(path).config  # AutoConfig would refuse faults that the adapter corrects
    cls = AutoModelForImageTextToText if config.model_type == "llama4" else AutoModelForCausalLM
    kwargs: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    block = getattr(config, "quantization_config", None)
    if isinstance(block, dict) and block.get("quant_method") == COMPRESSED_TENSORS:
        if len(block.get("config_groups") or {}) > 1:
            raise InputError(
                f"{path} has several widths, and transformers {transformers.__version__} takes one for all experts and "
                "one for all other matrices: it would silently unpack the rest wrongly. vLLM loads it; for "
                "transformers make a folder with `onecard export --format bf16`"
            )
        # On a CPU the first forward pass of a compressed model ends in an AttributeError.
        kwargs["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    of_bitsandbytes = isinstance(block, dict) and block.get("quant_method") == BITSANDBYTES
    try:
        with warnings.catch_warnings(), unstacked_experts() if of_bitsandbytes else nullcontext():
            # The warning says that `dequantize` overrides the checkpoint's own configuration, which is the intention.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = cls.from_pretrained(str(path), **kwargs).eval()
            if of_bitsandbytes:
                # Its kernels multiply in bf16 or fp16, and some of them only certain shapes.
                model = model.dequantize().eval()
    # transformers 5.23 drops the zero points of experts when it stacks them, then misses them; it wants bitsandbytes'
    # experts one by one although it saves them fused; and GPTQ needs packages that may be missing.
    except (RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"transformers {transformers.__version__} cannot load {path}: {error}") from error
    # Experts that transformers dequantizes and stacks (Qwen3) keep the dtype of their scales, not the requested one.
    # Only parameters are converted: the buffers of RoPE must stay in fp32.
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model
