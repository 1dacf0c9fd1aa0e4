"""DeepSeek-V3: multi-head latent attention, dense layers first, then many small experts and a shared one.

Attention (MLA, arXiv 2405.04434, section 2.1) goes through two narrow latents with a norm each: q_a and kv_a read the
residual stream, q_b and kv_b the normed latents. An engine caches the latent of keys and values alone, for which it
multiplies kv_b into its neighbours: vLLM unpacks kv_b when it loads and keeps the product in bf16 beside it, so kv_b
may be quantized, and saves bytes of the file rather than of the card.

The router (arXiv 2412.19437, section 2.1.2) ranks by sigmoid(logit) plus a bias that was learnt to balance the load, in
the best groups of experts alone; the bias has no part in the routing weights. It is transformers' own module.

Published files hold one tensor a matrix and expert, in fp8 with a scale a block of 128 x 128, and after the last layer
those of multi-token prediction: a layer that drafts tokens for the others. It is no part of the model whose answers are
measured here: it is neither read nor emitted, and the emitted config.json says that there is none.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from .adapter import Half, Role, Site
from .cache import SPLITS, CacheLayer, Split
from .experts import RoutedExperts
from .meta import meta_module
from .unfused import UnfusedAdapter

# What transformers' class computes, whatever config.json says: another value is another model.
ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "attention_bias": False}
MTP = "num_nextn_predict_layers"


class DeepseekV3Moe(nn.Module):
    """The sparse half with RoutedExperts."""

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.shared_experts = block.shared_experts
        self.experts = RoutedExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, scale_input=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, experts_TK = self.gate(x_TH)
        return self.experts(x_TH, experts_TK, weights_TK).reshape(hidden.shape) + self.shared_experts(hidden)


class DeepseekV3Adapter(UnfusedAdapter):
    """`config` is a DeepseekV3Config. Raises ValueError for what this architecture has never been published with."""

    family = "deepseek_v3"
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "mlp"}
    experts_key = "n_routed_experts"
    causal_class = hf.DeepseekV3ForCausalLM
    shared = ".shared_experts."
    router = ".mlp.gate."
    splits: ClassVar = SPLITS | {"q_b_proj": Split.OUTPUTS, "kv_b_proj": Split.OUTPUTS}
    published_in_fp8 = True
    known_code: ClassVar = frozenset(
        {"configuration_deepseek.DeepseekV3Config"}
        | {f"modeling_deepseek.DeepseekV3{kind}" for kind in ("Model", "ForCausalLM", "ForSequenceClassification")}
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        other = [
            f"{key} is {getattr(config, key)!r}" for key, value in ONLY.items() if getattr(config, key, value) != value
        ]
        if not config.n_shared_experts:
            other.append(f"n_shared_experts is {config.n_shared_experts!r}")
        if not config.n_group or config.n_routed_experts % config.n_group:
            other.append(f"{config.n_routed_experts} experts in {config.n_group!r} groups")
        if other:
            raise ValueError(f"{', '.join(other)}, which is not DeepSeek-V3's architecture")

    def is_moe(self, block: int) -> bool:
        return bool(block >= self.config.first_k_dense_replace)

    def sites(self, block: int) -> tuple[Site, ...]:
        c, p = self.config, self.block_prefix(block)
        sites = self._attention(p)

        def mlp(key: str, role: Role, names: list[str], width: int, last_stage: int) -> None:
            gate_up = tuple((f"{n}gate_proj", f"{n}up_proj") for n in names)
            down = tuple((f"{n}down_proj",) for n in names)
            feeds = tuple(name for (name,) in down)
            sites.append(Site(f"{key}gate_up", role, gate_up, (width, width), c.hidden_size, stage=3, feeds=feeds))
            # Experts' outputs are multiplied with their routing weights first.
            alone = role is not Role.EXPERT
            sites.append(Site(f"{key}down", role, down, (c.hidden_size,), width, last_stage, alone, True))

        if self.is_moe(block):
            # The shared expert's down projection comes last: it sees every token and mends what the others left.
            shared = c.moe_intermediate_size * c.n_shared_experts
            mlp("mlp.shared_experts.", Role.SHARED, [f"{p}mlp.shared_experts."], shared, 5)
            experts = [f"{p}mlp.experts.{e}." for e in range(self.n_experts)]
            mlp("mlp.experts.", Role.EXPERT, experts, c.moe_intermediate_size, 4)
        else:
            mlp("mlp.", Role.MLP, [f"{p}mlp."], c.intermediate_size, 4)
        return tuple(sites)

    def _attention(self, prefix: str) -> list[Site]:
        """What reads the residual stream, then what reads the normed latents, then o."""
        c = self.config
        q, latent = c.num_attention_heads * c.qk_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        kv = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)

        def site(key: str, leaf: str, outputs: int, inputs: int, stage: int, **more: Any) -> Site:
            module = ((f"{prefix}self_attn.{leaf}",),)
            return Site(f"self_attn.{key}", Role.ATTENTION, module, (outputs,), inputs, stage, **more)

        first: dict[str, Any] = {"stage": 0, "reads_norm": self.first_norm}
        kv_a = site("kv_a", "kv_a_proj_with_mqa", latent, c.hidden_size, **first)
        kv_b = site("kv_b", "kv_b_proj", kv, c.kv_lora_rank, 1)
        o = site(
            "o",
            "o_proj",
            c.hidden_size,
            c.num_attention_heads * c.v_head_dim,
            2,
            adds_to_residual=True,
            reaches_residual=True,
        )
        if c.q_lora_rank is None:
            return [site("q", "q_proj", q, c.hidden_size, **first), kv_a, kv_b, o]
        q_a = site("q_a", "q_a_proj", c.q_lora_rank, c.hidden_size, **first)
        return [q_a, kv_a, site("q_b", "q_b_proj", q, c.q_lora_rank, 1), kv_b, o]

    def router_site(self, block: int) -> Site | None:
        c, name = self.config, f"{self.block_prefix(block)}mlp.gate"
        experts, norm = (c.n_routed_experts,), self.middle_norm
        site = Site("mlp.gate", Role.ROUTER, ((name,),), experts, c.hidden_size, stage=2, reads_norm=norm)
        return site if self.is_moe(block) else None

    def ranking(self, block: nn.Module, logits_TE: torch.Tensor) -> torch.Tensor:
        c = self.config
        bias_E = block.get_submodule("mlp.gate").e_score_correction_bias
        assert isinstance(bias_E, torch.Tensor)
        scores = logits_TE.sigmoid() + bias_E
        by_group = scores.unflatten(-1, (c.n_group, -1))
        chosen = by_group.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        open_TG = torch.zeros(by_group.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, chosen, True)
        return by_group.masked_fill(~open_TG[..., None], -torch.inf).flatten(-2)

    def unit(self, module_name: str) -> str:
        head, _, leaf = module_name.rpartition(".")
        if ".experts." in module_name:
            return head.rpartition(".")[0]
        if leaf in ("q_a_proj", "kv_a_proj_with_mqa") and self.config.q_lora_rank is not None:
            return f"{head}.fused_qkv_a_proj"
        return f"{head}.gate_up_proj" if leaf in ("gate_proj", "up_proj") else module_name

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        c = self.config
        return (CacheLayer("latent", c.kv_lora_rank + c.qk_rope_head_dim),) * self.n_blocks

    def left_aside(self, name: str) -> bool:
        more = range(self.n_blocks, self.n_blocks + (getattr(self.config, MTP, None) or 0))
        return name.startswith(tuple(self.block_prefix(block) for block in more))

    def build_block(self, block: int) -> nn.Module:
        layer = meta_module(hf.DeepseekV3DecoderLayer, self.config, block)
        if self.is_moe(block):
            with torch.device("meta"):
                layer.mlp = DeepseekV3Moe(layer.mlp, self.config)
        return layer

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.DeepseekV3Model, self.config)

    def emitted(self, raw_config: dict[str, Any]) -> dict[str, Any]:
        # Its code is not carried along, and no engine needs it.
        kept = {key: value for key, value in raw_config.items() if key != "auto_map"}
        return kept | ({MTP: 0} if kept.get(MTP) else {})

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        found = []
        if raw_config.get(MTP):
            first = f"{self.block_prefix(self.n_blocks)}*"
            found.append(
                f"{MTP} is {raw_config[MTP]}: the layers of multi-token prediction (from {first} on) are neither "
                "measured nor emitted, so that an engine cannot draft tokens with the result"
            )
        unsaid = [key for key in ("scoring_func", "topk_method") if key not in raw_config]
        if unsaid:
            found.append(
                f"config.json says no {' and no '.join(unsaid)}: transformers takes DeepSeek-V3's own "
                f"({', '.join(str(ONLY[key]) for key in unsaid)}), vLLM a softmax, or leaves out the router's bias"
            )
        return found
