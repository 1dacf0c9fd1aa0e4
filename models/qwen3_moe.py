"""Qwen3-MoE: one 2-D tensor per expert matrix on disk, top-k routing, routing weights on the expert's output."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from .adapter import Half, Role, Site
from .experts import RoutedExperts
from .meta import meta_module
from .unfused import UnfusedAdapter

HEAD_DIM = "head_dim"


class Qwen3Moe(nn.Module):
    """The feed-forward half with RoutedExperts. Logits and softmax are fp32 (Walk.load holds the router so)."""

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.experts = RoutedExperts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size, scale_input=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        probs_TE = torch.softmax(nn.functional.linear(x_TH.float(), self.gate.weight), dim=-1)
        weights_TK, experts_TK = torch.topk(probs_TE, self.top_k, dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return self.experts(x_TH, experts_TK, weights_TK.to(x_TH.dtype)).reshape(hidden.shape)


class Qwen3MoeAdapter(UnfusedAdapter):
    """`config` is a Qwen3MoeConfig."""

    family = "qwen3_moe"
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "mlp"}
    experts_key = "num_experts"
    causal_class = hf.Qwen3MoeForCausalLM
    router_name: ClassVar = "mlp.gate"

    @staticmethod
    def mended(raw_config: dict[str, Any]) -> dict[str, Any]:
        if raw_config.get(HEAD_DIM, 0) is not None:
            return raw_config
        return raw_config | {HEAD_DIM: raw_config.get("hidden_size", 0) // (raw_config.get("num_attention_heads") or 1)}

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        if raw_config.get(HEAD_DIM, 0) is not None:
            return []
        number = self.mended(raw_config)[HEAD_DIM]
        return [f"{HEAD_DIM} is null, with which transformers cannot run: it is read and emitted as {number}"]

    def is_moe(self, block: int) -> bool:
        c = self.config
        return block not in c.mlp_only_layers and c.num_experts > 0 and (block + 1) % c.decoder_sparse_step == 0

    def sites(self, block: int) -> tuple[Site, ...]:
        c, p = self.config, self.block_prefix(block)
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if self.is_moe(block):
            experts = [f"{p}mlp.experts.{e}." for e in range(self.n_experts)]
            feed_forward = self.swiglu_sites("mlp.experts.", Role.EXPERT, experts, c.moe_intermediate_size)
        else:
            feed_forward = self.swiglu_sites("mlp.", Role.MLP, [f"{p}mlp."], c.intermediate_size)
        return (*self.attention_sites(p, q, kv, c.hidden_size), *feed_forward)

    def build_block(self, block: int) -> nn.Module:
        layer = meta_module(hf.Qwen3MoeDecoderLayer, self.config, block)
        if self.is_moe(block):
            with torch.device("meta"):
                layer.mlp = Qwen3Moe(layer.mlp, self.config)
        return layer

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.Qwen3MoeModel, self.config)
