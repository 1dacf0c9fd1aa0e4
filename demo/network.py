"""The demo model's structure, its folder on disk, and an expert layer that gives each expert only its own rows.

The structure is Scout's at a fifteen-thousandth of its size (README.md compares them). transformers' classes compute
everything except the experts, which they would compute for every token. `OwnRowsMoe` has the same weights under the
same names and computes each expert for its own rows only: the same sums, a sixteenth of the work. Weights are saved in
bf16 under the module's names, which are also Scout's on disk. `model.to(bfloat16)` is never called, because it breaks
the vision tower's complex rotary table. train.py trains the model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from .tokens import BOS, EOS, EOT, PAD, SPECIAL_TOKENS, VOCABULARY

TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 256,
        "rope_type": "llama3",
    },
    "no_rope_layers": [1, 1, 1, 0],
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 128,
    "attn_temperature_tuning": True,
    "floor_scale": 128,
    "attn_scale": 0.1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": [SPECIAL_TOKENS.index(EOS), SPECIAL_TOKENS.index(EOT)],
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "dtype": "bfloat16",
}
VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 64,
    "hidden_act": "gelu",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "intermediate_size": 256,
    "vision_output_dim": 128,
    "image_size": 32,
    "patch_size": 8,
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "rope_theta": 10000,
    "dtype": "bfloat16",
}
CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "boi_token_index": SPECIAL_TOKENS.index("<|image_start|>"),
    "eoi_token_index": SPECIAL_TOKENS.index("<|image_end|>"),
    "image_token_index": SPECIAL_TOKENS.index("<|patch|>"),
    "tie_word_embeddings": False,
    "text_config": TEXT,
    "vision_config": VISION,
    "dtype": "bfloat16",
}
PREPROCESSOR = {
    "image_processor_type": "Llama4ImageProcessor",
    "processor_class": "Llama4Processor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_patches": 1,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}
PROCESSOR = {"processor_class": "Llama4Processor", "patch_size": 8, "pixel_shuffle_ratio": 0.5}
GENERATION = {
    "bos_token_id": TEXT["bos_token_id"],
    "eos_token_id": TEXT["eos_token_id"],
    "pad_token_id": TEXT["pad_token_id"],
}


class OwnRowsMoe(nn.Module):
    """Llama4TextMoe's weights; each expert sees the rows routed to it, scaled by sigmoid(top-1 logit) on the way in."""

    def __init__(self, moe: Llama4TextMoe) -> None:
        super().__init__()
        self.experts, self.router, self.shared_expert = moe.experts, moe.router, moe.shared_expert
        self.logits_TE = torch.empty(0)  # of the last call, for the balance loss and the route counts

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TI = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = functional.linear(x_TI, self.router.weight)
        self.logits_TE = logits_TE
        top_T, expert_T = logits_TE.max(dim=1)
        order_T = expert_T.argsort(stable=True)
        counts = expert_T.bincount(minlength=logits_TE.shape[1]).tolist()
        rows_TI = (x_TI * top_T.sigmoid()[:, None])[order_T]
        outputs = []
        gate_ups, downs = self.experts.gate_up_proj.unbind(0), self.experts.down_proj.unbind(0)
        for rows, gate_up, down in zip(rows_TI.split(counts), gate_ups, downs, strict=True):
            gate, up = (rows @ gate_up).chunk(2, dim=-1)
            outputs.append((functional.silu(gate) * up) @ down)
        routed_TI = torch.cat(outputs)[order_T.argsort()]
        return self.shared_expert(x_TI) + routed_TI, logits_TE


def use_own_rows(model: Llama4ForConditionalGeneration) -> list[OwnRowsMoe]:
    """Replaces every expert layer of the model in place; returns the new layers."""
    layers = model.language_model.model.layers
    for layer in layers:
        layer.feed_forward = OwnRowsMoe(layer.feed_forward)
    return [layer.feed_forward for layer in layers]


def build(seed: int) -> Llama4ForConditionalGeneration:
    """A new float32 model. The vision side starts with unit gain.

    transformers' 0.02 is meant for wide layers. In these narrow ones it would make a picture's tokens a tenth as large
    as a word's, and the text side would learn to ignore them.
    """
    torch.manual_seed(seed)
    model = Llama4ForConditionalGeneration(Llama4Config.from_dict(json.loads(json.dumps(CONFIG)))).float()
    for part in (model.vision_model, model.multi_modal_projector):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def load(folder: Path, seed: int = 0) -> Llama4ForConditionalGeneration:
    """The model in a folder, its bf16 weights as float32. Every name must match."""
    model = build(seed)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights, strict=True)
    return model


def save(model: Llama4ForConditionalGeneration, folder: Path) -> int:
    """Writes bf16 weights and all configuration files except the tokenizer's. Returns the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    files = {"preprocessor_config": PREPROCESSOR, "processor_config": PROCESSOR, "generation_config": GENERATION}
    for name, content in {**files, "config": CONFIG}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() * 2 for tensor in weights.values())
