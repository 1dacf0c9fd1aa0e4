"""Babies: tiny random models, one for each family, in the layout of the family's real checkpoints.

Dimensions are multiples of 32 (tests use group size 32), and no expert matrix is square. Weights are random but not
small, so that routing, attention and the head all matter.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.llama4 import modeling_llama4 as hf_llama4

VOCAB = 256
PATCH, IMAGE = 250, 251


def llama4_config(layers: int = 4, moe_step: int = 1, hidden: int = 64, intermediate: int = 96) -> Llama4Config:
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "num_local_experts": 8,
        "interleave_moe_layer_step": moe_step,
        "attention_chunk_size": 8,
        "floor_scale": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 48,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
    }
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=PATCH,
        boi_token_index=252,
        eoi_token_index=253,
        architectures=["Llama4ForConditionalGeneration"],
    )


def qwen3_config(layers: int = 3) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=160,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=256,
        architectures=["Qwen3MoeForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
    )


def deepseek_config(layers: int = 3) -> DeepseekV3Config:
    """The first layer is dense. Experts form four groups of two, and a token may use two of the groups. YaRN as
    published."""
    return DeepseekV3Config(
        hidden_size=64,
        intermediate_size=160,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        vocab_size=VOCAB,
        n_routed_experts=8,
        n_shared_experts=3,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=0,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
        architectures=["DeepseekV3ForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
    )


def mixtral_config(layers: int = 3) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=256,
        architectures=["MixtralForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
    )


# Families whose experts transformers 5 fuses in memory, and whose files hold one tensor each.
UNFUSED = {"qwen3": qwen3_config, "deepseek": deepseek_config, "mixtral": mixtral_config}
# Mixtral's published names, where transformers 5 has others.
MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
ROUTER_BIAS = "e_score_correction_bias"


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            noise = 1.0 + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise.to(torch.bfloat16))
    for name, buffer in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def published(family: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors under the names and in the shapes of the family's files."""
    if family not in UNFUSED:
        return state
    apart = split_experts(state)
    if family != "mixtral":
        return apart
    for theirs, ours in MIXTRAL_NAMES.items():
        apart = {name.replace(theirs, ours): tensor for name, tensor in apart.items()}
    return apart


def split_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes the fused experts of transformers 5 apart, each `[out, in]`."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                out[f"{stem}{e}.gate_proj.weight"], out[f"{stem}{e}.up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for e, down in enumerate(tensor):
                out[f"{stem}{e}.down_proj.weight"] = down
        else:
            out[name] = tensor
    return out


def save(folder: Path, config: Any, state: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Write config.json and bf16 safetensors (a router's bias stays in fp32, as published), sharded with an index when
    `shards` > 1."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = "bfloat16"
    config.save_pretrained(str(folder))
    state = {
        name: tensor.detach().to(torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16).contiguous()
        for name, tensor in state.items()
    }
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(state)
    weight_map = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_model(family: str, layers: int | None = None, seed: int = 0) -> Any:
    """A random fp32 transformers model whose weights are exact in bf16: scout, maverick, llama4-text, qwen3, deepseek,
    mixtral."""
    if family in UNFUSED:
        model = AutoModelForCausalLM.from_config(UNFUSED[family](layers or 3), dtype=torch.float32)
    elif family == "llama4-text":
        text = llama4_config(layers or 4).text_config
        text.architectures = ["Llama4ForCausalLM"]
        model = hf_llama4.Llama4ForCausalLM(text)
    else:
        model = Llama4ForConditionalGeneration(llama4_config(layers or 4, moe_step=2 if family == "maverick" else 1))
    model = model.float().eval()
    randomize(model, seed)
    return model


def make_baby(folder: Path, family: str, layers: int | None = None, seed: int = 0, shards: int = 1) -> Path:
    model = make_model(family, layers, seed)
    return save(folder, model.config, published(family, model.state_dict()), shards)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def changed_copy(model: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Copies a baby's folder to `out`, with `change(name, tensor)` applied to every tensor."""
    shutil.copytree(model, out)
    for shard in shard_files(out):
        tensors = {name: change(name, tensor) for name, tensor in load_file(shard).items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, shard, metadata={"format": "pt"})
    return out


def noise(share: float, seed: int = 0) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A change for `changed_copy`: adds noise to every matrix, as a share of the matrix's standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2:
            return tensor
        spread = share * tensor.float().std()
        return (tensor.float() + spread * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    return change
