"""`onecard plan` on the true shapes of published models: `python benchmarks/scout_plan.py`.

Writes the config.json of Scout, Maverick and Qwen3-30B-A3B with safetensors files whose headers are real and whose data
is a hole (sparse files: a few megabytes of disk), runs the planner on them, and prints exact sizes. No weight is read.
"""

import json
import struct
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

from transformers.utils import logging

from onecard.inspection import inspect, plan
from onecard.models.families import load_adapter
from onecard.recipe import load_recipe

VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "vision_output_dim": 4096,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
}


def llama4(experts: int, moe_step: int, qk_norm: bool) -> dict[str, Any]:
    """Scout (16 experts, all layers) or Maverick (128 experts, every second layer)."""
    text = {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": moe_step,
        "vocab_size": 202048,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": qk_norm,
        "rope_theta": 500000.0,
        "max_position_embeddings": 10485760 if experts == 16 else 1048576,
    }
    if experts == 16:
        text["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": VISION,
        "tie_word_embeddings": False,
    }


QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}

CASES = [
    ("Llama 4 Scout", llama4(16, 1, True), ["llama4-scout-h100", "llama4-scout-h100-int4-attention", "rtn-int4"]),
    ("Llama 4 Maverick", llama4(128, 2, False), ["llama4-scout-h100"]),
    ("Qwen3-30B-A3B", QWEN3, ["qwen3-30b-a3b-24gb"]),
]


def write_hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of real headers and no data."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = load_adapter(folder).disk_shapes(())
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder


def main() -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        for i, (title, config, recipes) in enumerate(CASES):
            folder = write_hollow(Path(name) / str(i), config)
            facts = inspect(str(folder))
            print(f"{title}: {facts['parameters']:,} parameters, {facts['parameters'] * 2:,} bytes in bf16")
            for recipe in recipes:
                began = time.perf_counter()
                planned = plan(str(folder), load_recipe(recipe), "cpu")
                result, ram = planned.plan, planned.cost.ram_bytes
                print(
                    f"  {recipe}: {result.emitted_bytes:,} bytes ({result.emitted_bytes / 1e9:.2f} GB) in "
                    f"{len(result.shards)} files, {result.bits_per_weight:.3f} bits per weight, "
                    f"about {ram / 1e9:.0f} GB to quantize, planned in {time.perf_counter() - began:.1f} s"
                )


if __name__ == "__main__":
    sys.exit(main())
