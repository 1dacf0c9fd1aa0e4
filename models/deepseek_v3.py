"""DeepSeek-V3: multi-head latent attention, dense layers first, then many small experts and a shared one.

Attention (MLA, arXiv 2405.04434, section 2.1) goes through two narrow latents with a norm each: q_a and kv_a read the
residual stream, q_b and kv_b the normed latents. An engine caches only the latent of keys and values, and therefore
multiplies kv_b into its neighbours: vLLM unpacks kv_b at load and keeps the product in bf16. So kv_b may be quantized;
that saves bytes in the file, not on the card.

The router (arXiv 2412.19437, section 2.1.2) ranks experts by sigmoid(logit) plus a bias, within the best groups of
experts only. The bias was learnt to balance the load and has no part in the routing weights. The router is
transformers' own module.

Published files hold one fp8 tensor per expert matrix, with a scale for each block of 128 x 128. After the last layer
they hold the layers of multi-token prediction, which draft tokens. Those are no part of the model that is measured
here: they are neither read nor emitted, and the emitted config.json says that there are none.
"""

import re
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from .adapter import FUSED_GATE_UP, Half, Role, Site
from .cache import SPLITS, CacheLayer, Split
from .experts import RoutedExperts
from .meta import meta_module
from .unfused import UnfusedAdapter

# transformers' class computes this, and config_keys.py refuses anything else. vLLM has other defaults.
UNSAID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
MTP = "num_nextn_predict_layers"
# A tensor that only a layer of multi-token prediction has: it joins a hidden row with the next token's embedding.
DRAFTS = re.compile(r"(model\.layers\.(\d+)\.)eh_proj\.weight")


class DeepseekV3Moe(nn.Module):
    """The feed-forward half with RoutedExperts."""

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.shared_experts = block.shared_experts
        self.experts = RoutedExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, scale_input=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, experts_TK = self.gate(x_TH.float())  # fp32: see Walk.load
        return self.experts(x_TH, experts_TK, weights_TK).reshape(hidden.shape) + self.shared_experts(hidden)


class DeepseekV3Adapter(UnfusedAdapter):
    """`config` is a DeepseekV3Config. Raises ValueError for settings with which no DeepSeek-V3 was published."""

    family = "deepseek_v3"
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "mlp"}
    experts_key = "n_routed_experts"
    causal_class = hf.DeepseekV3ForCausalLM
    shared = ".shared_experts."
    router_name: ClassVar = "mlp.gate"
    fused_leaves: ClassVar = FUSED_GATE_UP | dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj")
    splits: ClassVar = SPLITS | {"q_b_proj": Split.OUTPUTS, "kv_b_proj": Split.OUTPUTS}
    published_in_fp8 = True
    known_code: ClassVar = frozenset(
        {"configuration_deepseek.DeepseekV3Config"}
        | {f"modeling_deepseek.DeepseekV3{kind}" for kind in ("Model", "ForCausalLM", "ForSequenceClassification")}
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        other = []
        layers = getattr(config, MTP, None) or 0
        if not isinstance(layers, int) or layers < 0:
            other.append(f"{MTP} is {layers!r}, which is no number of layers")
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
        attention = self._attention(p)
        if not self.is_moe(block):
            return (*attention, *self.swiglu_sites("mlp.", Role.MLP, [f"{p}mlp."], c.intermediate_size))
        experts, shared = [f"{p}mlp.experts.{e}." for e in range(self.n_experts)], [f"{p}mlp.shared_experts."]
        shared_width = c.moe_intermediate_size * c.n_shared_experts
        return (
            *attention,
            *self.swiglu_sites("mlp.shared_experts.", Role.SHARED, shared, shared_width),
            *self.swiglu_sites("mlp.experts.", Role.EXPERT, experts, c.moe_intermediate_size),
        )

    def _attention(self, prefix: str) -> list[Site]:
        """The readers of the residual stream, then the readers of the normed latents, then o."""
        c = self.config
        q, latent = c.num_attention_heads * c.qk_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        kv = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        values = c.num_attention_heads * c.v_head_dim

        def site(key: str, leaf: str, outputs: int, inputs: int, turn: int, **more: Any) -> Site:
            return Site(
                key=f"self_attn.{key}",
                role=Role.ATTENTION,
                members=((f"{prefix}self_attn.{leaf}",),),
                out_features=(outputs,),
                in_features=inputs,
                turn=turn,
                **more,
            )

        first: dict[str, Any] = {"turn": 0, "reads_norm": self.first_norm}
        kv_a = site("kv_a", "kv_a_proj_with_mqa", latent, c.hidden_size, **first)
        kv_b = site("kv_b", "kv_b_proj", kv, c.kv_lora_rank, 1)
        o = site("o", "o_proj", c.hidden_size, values, 2, adds_to_residual=True)
        if c.q_lora_rank is None:
            return [site("q", "q_proj", q, c.hidden_size, **first), kv_a, kv_b, o]
        q_a = site("q_a", "q_a_proj", c.q_lora_rank, c.hidden_size, **first)
        return [q_a, kv_a, site("q_b", "q_b_proj", q, c.q_lora_rank, 1), kv_b, o]

    def ranking(self, layer: nn.Module, logits_TE: torch.Tensor) -> torch.Tensor:
        c = self.config
        bias_E = layer.get_submodule(self.router_name).e_score_correction_bias
        assert isinstance(bias_E, torch.Tensor)
        scores = logits_TE.sigmoid() + bias_E
        by_group = scores.unflatten(-1, (c.n_group, -1))
        chosen = by_group.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        open_TG = torch.zeros(by_group.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, chosen, True)
        return by_group.masked_fill(~open_TG[..., None], -torch.inf).flatten(-2)

    def unit(self, module_name: str) -> str:
        # Without a latent of queries, kv_a has nothing to be fused with.
        alone = self.config.q_lora_rank is None and module_name.endswith(".kv_a_proj_with_mqa")
        return module_name if alone else super().unit(module_name)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        c = self.config
        return (CacheLayer("latent", c.kv_lora_rank + c.qk_rope_head_dim),) * self.n_blocks

    def left_aside(self, available: Collection[str]) -> set[str]:
        prefixes = (*self._announced_drafting(), *self._other_drafting(available))
        return super().left_aside(available) | {name for name in available if name.startswith(prefixes)}

    def _announced_drafting(self) -> list[str]:
        """The prefixes of the layers of multi-token prediction that config.json announces."""
        count = getattr(self.config, MTP, None) or 0
        return [self.block_prefix(block) for block in range(self.n_blocks, self.n_blocks + count)]

    def _other_drafting(self, available: Collection[str]) -> list[str]:
        """The prefixes of stored layers that are such by their tensors, and that config.json does not announce."""
        found = {match[1] for name in available if (match := DRAFTS.fullmatch(name)) and int(match[2]) >= self.n_blocks}
        return sorted(found - {*self._announced_drafting()})

    def aside_warnings(self, available: Collection[str]) -> list[str]:
        return [
            f"{prefix}* is a layer of multi-token prediction, which config.json does not announce ({MTP}): it is "
            "neither measured nor emitted"
            for prefix in self._other_drafting(available)
        ]

    def build_block(self, block: int) -> nn.Module:
        layer = meta_module(hf.DeepseekV3DecoderLayer, self.config, block)
        if self.is_moe(block):
            with torch.device("meta"):
                layer.mlp = DeepseekV3Moe(layer.mlp, self.config)
        return layer

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.DeepseekV3Model, self.config)

    def emitted(self, raw_config: dict[str, Any]) -> dict[str, Any]:
        # The remote code is not carried along, and no engine needs it.
        kept = {key: value for key, value in raw_config.items() if key != "auto_map"}
        return kept | ({MTP: 0} if kept.get(MTP) else {})

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        found = []
        if raw_config.get(MTP):
            first = f"{self.block_prefix(self.n_blocks)}*"
            found.append(
                f"{MTP} is {raw_config[MTP]}: the layers of multi-token prediction (from {first} on) are neither "
                "measured nor emitted, so an engine cannot draft tokens with the result"
            )
        unsaid = [key for key in UNSAID if key not in raw_config]
        if unsaid:
            found.append(
                f"config.json has no {' and no '.join(unsaid)}: transformers then takes DeepSeek-V3's own "
                f"({', '.join(UNSAID[key] for key in unsaid)}), vLLM a softmax, or no bias for the router"
            )
        return found
