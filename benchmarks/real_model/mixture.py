"""A Llama as a Mixtral that computes the same function, and back.

The MLP is cut along its inner dimension into experts, all of which are chosen. The router is zero, so each expert's
weight is 1/n, and its down matrix is multiplied by n: the sum over experts is the MLP. With n a power of two nothing is
rounded. What the dense form's tools made is judged as a mixture, too, so one walk serves all.
"""

import re
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig

EXPERTS = 4
# Llama's projection -> Mixtral's, and the axis along which it is cut.
PROJECTIONS = {"gate_proj": ("w1", 0), "up_proj": ("w3", 0), "down_proj": ("w2", 1)}
MLP = re.compile(r"(.*\.)mlp\.(\w+)\.weight")


def mixture_config(config: LlamaConfig, experts: int = EXPERTS) -> MixtralConfig:
    kept = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
        *("max_position_embeddings", "vocab_size", "tie_word_embeddings", "rope_parameters", "head_dim"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return MixtralConfig(
        **{name: getattr(config, name) for name in kept},
        intermediate_size=config.intermediate_size // experts,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )


def mixture_tensors(dense: dict[str, torch.Tensor], experts: int = EXPERTS) -> dict[str, torch.Tensor]:
    """The mixture's tensors under Mixtral's published names, each in the dtype that it has in `dense`."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        found = MLP.fullmatch(name)
        if found is None:
            out[name] = tensor
            continue
        projection, axis = PROJECTIONS[found[2]]
        scaled = tensor * experts if projection == "w2" else tensor
        for part_name, part in zip(mixture_names(name, experts), scaled.chunk(experts, axis), strict=True):
            out[part_name] = part.contiguous()
        if projection == "w1":
            out[f"{found[1]}block_sparse_moe.gate.weight"] = tensor.new_zeros(experts, tensor.shape[1])
    return out


def dense_weight(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The dense weight `name` from its parts in the mixture, in the order of `mixture_names`."""
    found = MLP.fullmatch(name)
    if found is None:
        return parts[0]
    projection, axis = PROJECTIONS[found[2]]
    whole = torch.cat(parts, axis)
    return whole / len(parts) if projection == "w2" else whole


def mixture_names(name: str, experts: int = EXPERTS) -> list[str]:
    """What a dense weight's parts are called in the mixture."""
    found = MLP.fullmatch(name)
    if found is None:
        return [name]
    return [
        f"{found[1]}block_sparse_moe.experts.{number}.{PROJECTIONS[found[2]][0]}.weight" for number in range(experts)
    ]


def linear_weights(config: Any) -> list[str]:
    """The dense form's linear weights of all blocks, in the order of computation."""
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"mlp.{name}.weight" for name in PROJECTIONS]
    return [f"model.layers.{block}.{name}" for block in range(config.num_hidden_layers) for name in attention + mlp]
