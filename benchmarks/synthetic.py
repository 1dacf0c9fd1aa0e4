"""Synthetic checkpoints for the benchmarks: a family's true layout, random weights, a tokenizer of 256 tokens.

Measure memory and time on them, never quality: the weights mean nothing.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 512
MOST_GROWTH = 0.10


def text_config(blocks: int, hidden: int, intermediate: int, experts: int) -> dict[str, object]:
    """config.json of a text-only Llama 4 of the given width."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": intermediate * 2,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 640),
        "head_dim": 128,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_chunk_size": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes and two special tokens: enough to make rows of texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, blocks: int, hidden: int, intermediate: int, experts: int, device: str = "cpu") -> Path:
    """One shard a block, written tensor by tensor, so that memory for one block is enough. The random numbers are those
    of the device."""
    folder.mkdir(parents=True)
    config = text_config(blocks, hidden, intermediate, experts)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16)
        flat = out.view(-1)
        for start in range(0, flat.numel(), 2**24):
            part = flat[start : start + 2**24]
            part.copy_(torch.randn(part.numel(), generator=generator, device=device) * shape[-1] ** -0.5)
        return out

    heads, kv = hidden, int(str(config["num_key_value_heads"])) * 128
    weight_map: dict[str, str] = {}

    def write(index: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for block in range(blocks):
        p, ff = f"model.layers.{block}.", f"model.layers.{block}.feed_forward."
        write(
            block,
            {
                f"{p}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                f"{p}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                f"{p}self_attn.q_proj.weight": random(heads, hidden),
                f"{p}self_attn.k_proj.weight": random(kv, hidden),
                f"{p}self_attn.v_proj.weight": random(kv, hidden),
                f"{p}self_attn.o_proj.weight": random(hidden, heads),
                f"{ff}router.weight": random(experts, hidden),
                f"{ff}shared_expert.gate_proj.weight": random(intermediate, hidden),
                f"{ff}shared_expert.up_proj.weight": random(intermediate, hidden),
                f"{ff}shared_expert.down_proj.weight": random(hidden, intermediate),
                f"{ff}experts.gate_up_proj": random(experts, hidden, 2 * intermediate),
                f"{ff}experts.down_proj": random(experts, intermediate, hidden),
            },
        )
    write(
        blocks,
        {
            "model.embed_tokens.weight": random(VOCABULARY, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            "lm_head.weight": random(VOCABULARY, hidden),
        },
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_texts(path: Path, documents: int, characters: int, seed: int) -> Path:
    """Texts of random letters, one token a character."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(documents):
        letters = torch.randint(97, 123, (characters,), generator=generator).tolist()
        lines.append(json.dumps({"text": bytes(letters).decode()}))
    path.write_text("\n".join(lines))
    return path


def peaks_by_blocks(measure: Callable[[Path, Path], dict[str, float]]) -> int:
    """Print the peak resident set against the number of blocks, 4, 8 and 16.

    Returns 1 when the largest peak is more than 10 % above the smallest, else 0. `measure(folder, model)` runs a
    command in its own process and gives its JSON line.
    """
    peaks = {}
    print("blocks  source GB  peak RSS GB  seconds")
    for blocks in (4, 8, 16):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = write_model(folder / "model", blocks, hidden=512, intermediate=1024, experts=16)
            source = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            line = measure(folder, model)
        peaks[blocks] = line["peak_rss_bytes"]
        print(f"{blocks:6d}  {source / 1e9:9.3f}  {peaks[blocks] / 1e9:11.3f}  {line['seconds']:7.1f}", flush=True)
    growth = max(peaks.values()) / min(peaks.values()) - 1
    print(f"largest over smallest: {growth:+.1%} (limit {MOST_GROWTH:+.0%})")
    return int(growth > MOST_GROWTH)
