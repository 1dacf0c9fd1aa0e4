"""Mixtral: every layer sparse, the two best of a few large experts, a sliding window in some versions.

The published names (`block_sparse_moe`, and w1, w3 and w2 for gate, up and down) are what vLLM loads, and so the
canonical ones; transformers 5 has other names in memory. Routing weights are a softmax over the chosen experts, on the
expert's output (arXiv 2401.04088, section 2.1). The router is transformers' own module.
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral as hf

from .adapter import Adapter, Half, Location, Role, Site
from .cache import SPLITS, Split
from .experts import RoutedExperts
from .meta import meta_module, meta_shapes


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


class MixtralAdapter(Adapter):
    """`config` is a MixtralConfig."""

    family = "mixtral"
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "block_sparse_moe"}
    splits: ClassVar = SPLITS | {"w1": Split.OUTPUTS, "w3": Split.OUTPUTS, "w2": Split.INPUTS}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.n_blocks = config.num_hidden_layers
        self.n_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.tied_head = bool(config.tie_word_embeddings)
        self.embedding_name = "model.embed_tokens.weight"
        self.norm_name = "model.norm.weight"
        self.head_name = self.embedding_name if self.tied_head else "lm_head.weight"

    @property
    def text_config(self) -> Any:
        return self.config

    def block_prefix(self, block: int) -> str:
        return f"model.layers.{block}."

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

    def expected(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found = meta_shapes(hf.MixtralForCausalLM, self.config)
        shapes = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): shape for name, shape in found.items()
                  if ".mlp.experts." not in name}  # fmt: skip
        for block in range(self.n_blocks):
            for _, name, out, inp in self.modules(block):
                shapes.setdefault(f"{name}.weight", (out, inp))
        if self.tied_head:
            shapes.pop("lm_head.weight", None)
        return shapes

    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        return self.expected()

    def locate(self, name: str, available: Collection[str]) -> Location:
        return Location(name)

    def role(self, name: str) -> Role:
        if ".embed_tokens." in name:
            return Role.EMBEDDING
        if name.startswith("lm_head."):
            return Role.HEAD
        if "norm" in name.rsplit(".", 2)[-2]:
            return Role.NORM
        if ".experts." in name:
            return Role.EXPERT
        return Role.ATTENTION if ".self_attn." in name else Role.ROUTER

    def build_block(self, block: int) -> nn.Module:
        return meta_module(MixtralLayer, self.config, block)

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.MixtralModel, self.config)
