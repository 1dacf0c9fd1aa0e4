"""Llama 4: Scout's and Maverick's structure, text with or without the vision tower.

On disk the experts are fused 3-D tensors `[experts, in, out]`; the last axis of gate_up_proj holds the gate, then the
up. An engine wants one 2-D Linear `[out, in]` per expert. The router's score multiplies the expert's INPUT. Maverick
interleaves dense layers. The multimodal class puts the whole text model under `language_model.`.
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.llama4 import modeling_llama4 as hf

from ..core.device import Compute
from ..core.tensors import TensorSource
from .adapter import Adapter, Half, Location, Role, Site
from .experts import RoutedExperts
from .meta import meta_module, meta_shapes

# Early published configs have a number here (transformers 4.51). It is a switch now.
TUNING = "attn_temperature_tuning"
CHUNK = "attention_chunk_size"
# null means that no layer is chunked, and transformers' masks need a number: this is more tokens than any text has.
NO_CHUNK = 2**30


class Llama4Moe(nn.Module):
    """The MoE feed-forward with RoutedExperts; transformers' own computes all experts on all rows."""

    gives_logits = True  # forward returns them beside the hidden rows, as transformers' own does

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.router = block.router
        self.shared_expert = block.shared_expert
        self.top_k = config.num_experts_per_tok
        self.experts = RoutedExperts(
            config.num_local_experts, config.hidden_size, config.intermediate_size, scale_input=True
        )

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = nn.functional.linear(x_TH.float(), self.router.weight)  # fp32: see Walk.load
        top, experts_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        scores_TK = torch.sigmoid(top).to(x_TH.dtype)
        return self.shared_expert(x_TH) + self.experts(x_TH, experts_TK, scores_TK), logits_TE


class Llama4Adapter(Adapter):
    """`config` is a Llama4Config (multimodal) or a Llama4TextConfig."""

    family = "llama4"
    image_tiles = 17  # sixteen, and the whole image once more (transformers' Llama4ImageProcessor, max_patches)
    half_modules: ClassVar = {Half.ATTENTION: "self_attn", Half.FEED_FORWARD: "feed_forward"}
    router_name: ClassVar = "feed_forward.router"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.has_vision = config.model_type == "llama4"
        self.prefix = "language_model." if self.has_vision else ""
        text = self.text_config
        self.n_blocks = text.num_hidden_layers
        self.n_experts = text.num_local_experts
        self.top_k = text.num_experts_per_tok
        self.vocab_size = text.vocab_size
        self.hidden_size = text.hidden_size
        self.tied_head = bool(text.tie_word_embeddings)
        self.image_token_id = config.image_token_index if self.has_vision else None
        if self.image_token_id is not None and not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(f"image_token_index is {self.image_token_id}, and there are {self.vocab_size} tokens")
        self.embedding_name = f"{self.prefix}model.embed_tokens.weight"
        self.norm_name = f"{self.prefix}model.norm.weight"
        self.head_name = self.embedding_name if self.tied_head else f"{self.prefix}lm_head.weight"

    @property
    def text_config(self) -> Any:
        return self.config.text_config if self.has_vision else self.config

    def text_only(self) -> Adapter:
        return Llama4Adapter(self.config.text_config) if self.has_vision else self

    def block_prefix(self, block: int) -> str:
        return f"{self.prefix}model.layers.{block}."

    def is_moe(self, block: int) -> bool:
        return block in self.text_config.moe_layers

    def sites(self, block: int) -> tuple[Site, ...]:
        c, p = self.text_config, self.block_prefix(block)
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        ff, width = "feed_forward.", c.intermediate_size
        attention = self.attention_sites(p, q, kv, c.hidden_size)
        if not self.is_moe(block):
            return (*attention, *self.swiglu_sites(ff, Role.MLP, [f"{p}{ff}"], c.intermediate_size_mlp))
        experts = [f"{p}{ff}experts.{e}." for e in range(self.n_experts)]
        return (
            *attention,
            *self.swiglu_sites(f"{ff}shared_expert.", Role.SHARED, [f"{p}{ff}shared_expert."], width),
            *self.swiglu_sites(f"{ff}experts.", Role.EXPERT, experts, width),
        )

    def permuted_at_load(self, module_name: str) -> bool:
        # For RoPE: vLLM permutes every q and k of the text model (models/llama4.py, `permute_qk_weight_for_rotary`).
        return self.role(f"{module_name}.weight") is Role.ATTENTION and module_name.endswith((".q_proj", ".k_proj"))

    def otherwise_in_vllm(self) -> list[str]:
        c, found = self.text_config, []
        step = c.interleave_moe_layer_step
        sparse = [block for block in range(self.n_blocks) if step > 0 and (block + 1) % step == 0]
        if sparse != list(c.moe_layers):
            found.append(f"moe_layers is {list(c.moe_layers)}, and interleave_moe_layer_step {step} gives {sparse}")
        chunked = [block for block, kind in enumerate(c.layer_types) if kind == "chunked_attention"]
        with_rope = [block for block in range(self.n_blocks) if c.no_rope_layers[block]]
        if chunked != with_rope:
            found.append(f"layer_types has chunks in the layers {chunked}, and no_rope_layers gives {with_rope}")
        if c.attention_bias:
            found.append("attention_bias is true")
        return found

    def expected(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self._fused_shapes)
        for block in range(self.n_blocks):
            self._unfuse(shapes, block)
        return shapes

    def _unfuse(self, shapes: dict[str, tuple[int, ...]], block: int) -> None:
        if self.is_moe(block):
            stem = f"{self.block_prefix(block)}feed_forward.experts."
            shapes.pop(f"{stem}gate_up_proj")
            shapes.pop(f"{stem}down_proj")
            for _, name, out, inp in self.modules(block):
                shapes.setdefault(f"{name}.weight", (out, inp))

    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        shapes = dict(self._fused_shapes)
        for block in range(self.n_blocks):
            # Asked of each block: a tool that takes experts apart may have left some blocks fused.
            first = f"{self.block_prefix(block)}feed_forward.experts.0."
            if any(f"{first}{projection}.weight" in available for projection in self.projections):
                self._unfuse(shapes, block)
        return shapes

    @cached_property
    def _fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Cached: building Scout on the meta device takes a second, and a run asks several times."""
        cls = hf.Llama4ForConditionalGeneration if self.has_vision else hf.Llama4ForCausalLM
        shapes = meta_shapes(cls, self.config)
        if self.tied_head:
            shapes.pop(f"{self.prefix}lm_head.weight", None)
        return shapes

    def locate(self, name: str, available: Collection[str]) -> Location:
        if name in available or ".experts." not in name:
            return Location(name)
        stem, _, rest = name.partition(".experts.")
        expert, projection, _ = rest.split(".")
        width = self.text_config.intermediate_size
        if projection == "down_proj":
            return Location(f"{stem}.experts.down_proj", (int(expert),), transposed=True)
        columns = slice(0, width) if projection == "gate_proj" else slice(width, 2 * width)
        return Location(f"{stem}.experts.gate_up_proj", (int(expert), slice(None), columns), transposed=True)

    def role(self, name: str) -> Role:
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            return Role.VISION
        if ".embed_tokens." in name:
            return Role.EMBEDDING
        if "lm_head." in name:
            return Role.HEAD
        if "norm" in name.rsplit(".", 2)[-2]:
            return Role.NORM
        if ".experts." in name:
            return Role.EXPERT
        if ".shared_expert." in name:
            return Role.SHARED
        if ".router." in name:
            return Role.ROUTER
        return Role.ATTENTION if ".self_attn." in name else Role.MLP

    def build_block(self, block: int) -> nn.Module:
        layer = meta_module(hf.Llama4TextDecoderLayer, self.text_config, block)
        if self.is_moe(block):
            with torch.device("meta"):
                layer.feed_forward = Llama4Moe(layer.feed_forward, self.text_config)
        return layer

    def text_skeleton(self) -> nn.Module:
        return meta_module(hf.Llama4TextModel, self.text_config)

    def image_token_count(self) -> int:
        v = self.config.vision_config
        return int((v.image_size // v.patch_size) ** 2 * v.pixel_shuffle_ratio**2)

    def image_text(self) -> str:
        # As transformers' Llama4Processor writes an image of one tile.
        return "<|image_start|><|image|>" + "<|patch|>" * self.image_token_count() + "<|image_end|>"

    def run_picture(self) -> None:
        v = self.config.vision_config
        tower, projector = self._vision()
        features = tower(torch.empty(1, v.num_channels, v.image_size, v.image_size, device="meta")).last_hidden_state
        projected = projector(features.reshape(-1, features.shape[-1]))
        if projected.shape != (self.image_token_count(), self.hidden_size):
            raise ValueError(f"a picture gives {list(projected.shape)} instead of {self.image_token_count()} tokens")

    def _vision(self) -> tuple[Any, Any]:
        """Vision tower and projector on the meta device."""
        return (
            meta_module(hf.Llama4VisionModel, self.config.vision_config),
            meta_module(hf.Llama4MultiModalProjector, self.config),
        )

    def image_features(self, source: TensorSource, pixels: torch.Tensor, compute: Compute) -> torch.Tensor:
        tower, projector = self._vision()
        for module, prefix in ((tower, "vision_model."), (projector, "multi_modal_projector.")):
            state = {name: source.get(prefix + name).to(compute.device, compute.dtype) for name in module.state_dict()}
            module.load_state_dict(state, assign=True)
        # This buffer is complex, and computed, not stored. Casting it to bf16 would drop its imaginary part.
        tower.rotary_embedding = hf.Llama4VisionRotaryEmbedding(self.config.vision_config).to(compute.device)
        out = []
        with torch.inference_mode():
            for chunk in pixels.split(16):  # Scout's tower needs about 0.2 GB for 16 tiles
                features = tower(chunk.to(compute.device, compute.dtype)).last_hidden_state
                out.append(projector(features.reshape(-1, features.shape[-1])).cpu())
        return torch.cat(out)

    @staticmethod
    def mended(raw_config: dict[str, Any]) -> dict[str, Any]:
        nested = isinstance(raw_config.get("text_config"), dict)
        text = dict(raw_config["text_config"] if nested else raw_config)
        if type(text.get(TUNING)) is int:
            text[TUNING] = bool(text[TUNING])
        if CHUNK in text and text[CHUNK] is None:
            text[CHUNK] = NO_CHUNK
        return raw_config | {"text_config": text} if nested else text

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        text = raw_config.get("text_config", raw_config)
        found = []
        if type(text.get(TUNING)) is int:
            found.append(
                f"{TUNING} is {text[TUNING]}, as in early copies of config.json: it is a switch, read and emitted "
                f"as {str(bool(text[TUNING])).lower()}"
            )
        if CHUNK in text and text[CHUNK] is None:
            found.append(
                f"{CHUNK} is null (no chunk), with which transformers cannot run: it is read and emitted as "
                f"{NO_CHUNK}, which no text reaches"
            )
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        if rope.get("rope_type") == "llama3" and (rope.get("factor"), rope.get("high_freq_factor")) == (8.0, 4.0):
            found.append(
                "rope scaling has factor 8 and high_freq_factor 4, as in early copies of config.json: Scout has "
                "factor 16, low_freq_factor 1, high_freq_factor 1"
            )
        if text.get("rms_norm_eps") == 1e-6:
            found.append("rms_norm_eps is 1e-06 (the QK norm uses it too): Llama 4 was trained with 1e-05")
        wrong = {
            "num_hidden_layers": (80, 48),
            "hidden_size": (8192, 5120),
            "num_attention_heads": (64, 40),
            "num_experts_per_tok": (2, 1),
        }
        for key, (published, true) in wrong.items():
            if text.get(key) == published:
                found.append(f"{key} is {published}, a wrong figure of public model cards: Llama 4 has {true}")
        return found
