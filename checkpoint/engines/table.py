"""The engines that a checkpoint can be checked for, and the rules of each."""

from . import gptqmodel, llama_cpp, transformers, vllm
from .rules import Rule

ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": vllm.RULES,
    "transformers": transformers.RULES,
    "llama.cpp": llama_cpp.RULES,
    "gptqmodel": gptqmodel.RULES,
}
