"""Mixtral: every layer is sparse and takes the two best of a few large experts; some versions have a sliding window.

The canonical names are the published ones (`block_sparse_moe`, and w1, w3 and w2 for gate, up and down), which vLLM
loads; transformers 5 has other names in memory. Routing weights are a softmax over the chosen experts and multiply the
expert's output (arXiv 2401.04088, section 2.1). The router is transformers' own module.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral as hf

from .adapter import FUSED_QKV, Half, Role, Site
from .cache import SPLITS, Split
from .experts import RoutedExperts
from .meta import meta_module
from .unfused import UnfusedAdapter


class MixtralMoe(nn.Module):
    """The feed-forward half with RoutedExperts."""

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.experts = RoutedExperts(
            config.num_local_experts, config.hidden_size, config.intermediate_size, scale_input=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, experts_TK = self.gate(x_TH.float())  # fp32: see Walk.load
        return self.experts(x_TH, experts_TK, weights_TK).reshape(hidden.shape)


class MixtralLayer(hf.MixtralDecoderLayer):
    """transformers' decoder layer with its feed-forward half under its published name."""

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
    router_name: ClassVar = "block_sparse_moe.gate"
    projections: ClassVar = ("w1", "w3", "w2")
    fused_leaves: ClassVar = FUSED_QKV
    splits: ClassVar = SPLITS | {"w1": Split.OUTPUTS, "w3": Split.OUTPUTS, "w2": Split.INPUTS}

    def is_moe(self, block: int) -> bool:
        return True

    def sites(self, block: int) -> tuple[Site, ...]:
        c, p, key = self.config, self.block_prefix(block), "block_sparse_moe.experts."
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        experts = [f"{p}{key}{e}." for e in range(self.n_experts)]
        return (
            *self.attention_sites(p, q, kv, c.hidden_size),
            *self.swiglu_sites(key, Role.EXPERT, experts, c.intermediate_size),
        )

    def memory_name(self, name: str) -> str:
        return name.replace(".block_sparse_moe", ".mlp")

    def build_block(self, block: int) -> nn.Module:
        return meta_module(MixtralLayer, self.config, block)

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.MixtralModel, self.config)
