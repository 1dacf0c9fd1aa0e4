"""Which engines run a checkpoint, and from which version, by family and by what is quantized.

Taken from the engines' sources and, for transformers, from loading the files; docs/vllm.md and docs/formats.md say
what was run. A version is named only where an older one fails.
"""

from collections.abc import Mapping
from typing import Any

FAMILIES = {"deepseek_v3": "DeepSeek-V3", "llama4": "Llama 4", "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE"}


def _in_few_bits(roles: Mapping[str, Mapping[str, Any]], role: str) -> bool:
    return any(str(width).startswith("int") for width in roles.get(role, {}).get("widths", {}))


def engines(
    family: str,
    roles: Mapping[str, Mapping[str, Any]],
    symmetric: bool,
    versions: Mapping[str, str],
    stored_as: str = "compressed-tensors",
) -> list[tuple[str, str, str]]:
    """(engine, least version, remark) for the model card. `roles` as inspection.py gives them."""
    name = FAMILIES.get(family, family)
    if stored_as in ("bitsandbytes", "bnb-nf4"):
        return _bitsandbytes(family, versions)
    if stored_as == "bf16":
        plain = f"any version that knows {name}"
        return [("vLLM", plain, "`vllm serve FOLDER`"), ("transformers", plain, "`from_pretrained(FOLDER)`")]
    if stored_as == "gguf":
        known = f"any build that knows {name}"
        return [("llama.cpp", known, "`llama-server -m FOLDER/model.gguf`; the text model alone")]
    if stored_as.startswith("gptq"):
        known = f"any version that knows {name} and GPTQ"
        return [("GPTQModel", known, "`GPTQModel.load(FOLDER)`"), ("vLLM", known, "`vllm serve FOLDER`")][
            : 1
            + (
                symmetric and stored_as == "gptq"
            )  # vLLM reads version 1 alone
        ]
    known = f"any version that knows {name} and compressed-tensors"
    remark = "`vllm serve FOLDER`"
    if family == "llama4" and _in_few_bits(roles, "attention"):
        known = "one with pull request 35033 (merged 2026-02-23) or later"
        remark += ". Older versions permute q and k for RoPE but not their scales: the model loads and answers nonsense"
    found = [("vLLM", known, remark)]
    loaded = "`quantization_config=CompressedTensorsConfig(dequantize=True)`, in older versions `run_compressed=False`"
    if symmetric:
        made = f"made with {versions.get('transformers')} and compressed-tensors {versions.get('compressed-tensors')}"
        found.append(("transformers", made, f"{loaded}; it unpacks the weights to the dtype of the original"))
    return found


def _bitsandbytes(family: str, versions: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """`engines` for bitsandbytes' files. vLLM 0.32 no longer reads them."""
    made = f"made with {versions.get('transformers')} and bitsandbytes {versions.get('bitsandbytes')}"
    if family == "llama4":
        return [("transformers", made, "`from_pretrained(FOLDER)`; every expert stays in few bits")]
    remark = "by `onecard generate`; `from_pretrained` alone stacks the experts and refuses"
    return [("transformers", made, remark)]
