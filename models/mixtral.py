"""Mixtral: every layer sparse, the two best of a few large experts, a sliding window in some versions.

The published names (`block_sparse_moe`, and w1, w3 and w2 for gate, up and down) are what vLLM loads, and so the
canonical ones; transformers 5 has other names in memory. Routing weights are a softmax over the chosen experts, on the
expert's output (arXiv 2401.04088, section 2.1). The router is transformers' own module.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral as hf

from .adapter import Half, Role, Site
from .cache import SPLITS, Split
from .experts import RoutedExperts
from .meta import meta_module
from .unfused import UnfusedAdapter


class MixtralMoe(nn.Module):
    """The sparse half with RoutedExperts."""

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.experts = RoutedExperts(
            config.num_local_experts, config.hidden_size, config.intermediate_size, scale_input=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, experts_TK = self.gate(x_TH)
        return self.experts(x_TH, experts_TK, weights_TK).reshape(hidden.shape)


class MixtralLayer(hf.MixtralDecoderLayer):
    """transformers' decoder layer, its feed-forward half under the name that the files give it."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.block_sparse_moe = MixtralMoe(self._modules.pop("mlp"), config)

    @property
    def mlp(self) -> Any:
        return self.block_sparse_moe


class MixtralAdapter(UnfusedAdapter):
    """`config` is a MixtralConfig."""

    family = "mixtral"
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "block_sparse_moe"}
    experts_key = "num_local_experts"
    causal_class = hf.MixtralForCausalLM
    router = ".block_sparse_moe.gate."
    splits: ClassVar = SPLITS | {"w1": Split.OUTPUTS, "w3": Split.OUTPUTS, "w2": Split.INPUTS}

    def sites(self, block: int) -> tuple[Site, ...]:
        c, p, key = self.config, self.block_prefix(block), "block_sparse_moe.experts."
        head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        width, role = c.intermediate_size, Role.EXPERT
        names = [f"{p}{key}{e}." for e in range(self.n_experts)]
        gate_up = tuple((f"{n}w1", f"{n}w3") for n in names)
        down = tuple((f"{n}w2",) for n in names)
        return (
            *self.attention_sites(p, c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim, c.hidden_size),
            Site(f"{key}gate_up", role, gate_up, (width, width), c.hidden_size, 3, feeds=tuple(n for (n,) in down)),
            # Experts' outputs are multiplied with their routing weights first.
            Site(f"{key}down", role, down, (c.hidden_size,), width, 4, False, True),
        )

    def router_site(self, block: int) -> Site | None:
        c, key, norm = self.config, "block_sparse_moe.gate", self.middle_norm
        module, experts = ((f"{self.block_prefix(block)}{key}",),), (c.num_local_experts,)
        return Site(key, Role.ROUTER, module, experts, c.hidden_size, stage=2, reads_norm=norm)

    def unit(self, module_name: str) -> str:
        head, _, leaf = module_name.rpartition(".")
        if ".experts." in module_name:
            return head.rpartition(".")[0]
        return f"{head}.qkv_proj" if leaf in ("q_proj", "k_proj", "v_proj") else module_name

    def published_name(self, name: str) -> str:
        return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")

    def build_block(self, block: int) -> nn.Module:
        return meta_module(MixtralLayer, self.config, block)

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.MixtralModel, self.config)
