"""A Llama in GGUF, as transformers has it: tensors under its names, config.json and tokenizer.json.

llama.cpp rotates neighbouring pairs of a head (its NORM), transformers the two halves. The converter therefore permutes
the rows of q and k, and here that is undone. Weights become bf16, the dtype of a published checkpoint: four bits and
their fp16 scale and minimum do not all fit into it, so the model made here is what is to be quantized, not a copy of
the one that was published.

Shape legend: O outputs, I inputs.
"""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig

from onecard.models import gguf

# llama.cpp's name -> transformers'.
TOP = {theirs: ours if ours == "lm_head" else f"model.{ours}" for ours, theirs in gguf.TOP.items()}
IN_BLOCK = {theirs: ours for ours, theirs in gguf.ATTENTION.items()}
IN_BLOCK |= {f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
# Of llama.cpp's types of a token: those that no text spells by accident.
CONTROL, USER_DEFINED = 3, 4
# llama.cpp's name of a pre-tokenizer -> whether digits are split one by one.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False}


def halves_rotated(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """q or k with the rows of each head in transformers' order: first all that pairs begin with, then all that they end
    with."""
    return weight_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def field(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def config_of(reader: GGUFReader) -> LlamaConfig:
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"the file holds a {architecture}; only llama is read here")
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    return LlamaConfig(
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=field(reader, "llama.attention.head_count"),
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        # A decimal number that was stored in 32 bits.
        rms_norm_eps=float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.3g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(field(reader, "llama.rope.freq_base"))},
        max_position_embeddings=field(reader, "llama.context_length"),
        vocab_size=int(embedding.shape[1]),
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tensors_of(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Every tensor in bf16, under transformers' name and in its order of rows."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    out = {}
    for tensor in reader.tensors:
        stem, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if leaf in heads:
            value = halves_rotated(value, heads[leaf])
        name = f"model.layers.{stem.removeprefix('blk.')}.{IN_BLOCK[leaf]}" if stem else TOP[leaf]
        out[f"{name}.weight"] = value.to(torch.bfloat16).contiguous()
    return out


def tokenizer_of(reader: GGUFReader) -> Tokenizer:
    """GPT-2's byte-level BPE from the file's tokens and merges."""
    tokens, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    types, split = field(reader, "tokenizer.ggml.token_type"), field(reader, "tokenizer.ggml.pre")
    if split not in SPLITS_DIGITS:
        raise ValueError(f"unknown pre-tokenizer {split}; known: {', '.join(SPLITS_DIGITS)}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if SPLITS_DIGITS[split] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    tokens = field(reader, "tokenizer.ggml.tokens")
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: field(reader, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()}
    tokenizer_of(reader).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(field(reader, "tokenizer.chat_template"))


def write_folder(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Weights and config.json; config.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
