"""The engines that a checkpoint can be held against, and each one's rules."""

from . import gptqmodel, llama_cpp, transformers, vllm
from .rules import Rule

ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": vllm.RULES,
    "transformers": transformers.RULES,
    "llama.cpp": llama_cpp.RULES,
    "gptqmodel": gptqmodel.RULES,
}
