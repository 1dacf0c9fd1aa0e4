"""Inputs for the command line: a tokenizer for babies, JSONL files and recipes."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from babies import PATCH, VOCAB

SPECIAL = {
    "<s>": 0,
    "</s>": 1,
    "<pad>": 2,
    "<unk>": 3,
    "<|patch|>": PATCH,
    "<|image|>": 251,
    "<|image_start|>": 252,
    "<|image_end|>": 253,
    "<|user|>": 254,
    "<|assistant|>": 255,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant may speak') }}{% endif %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECIPE: dict[str, Any] = {
    "name": "test",
    "description": "For babies.",
    "method": "balanced",
    "group_size": 32,
    "quantize_roles": ["expert", "shared_expert", "mlp"],
    "warn_below_expert_rows": 0,
    "calibration_rows": 8,
    "calibration_row_tokens": 24,
    "evaluation_rows": 6,
    "evaluation_row_tokens": 24,
    "batch_tokens": 96,
    "max_shard_bytes": 150_000,  # no baby fits into one shard: tests/test_one_file.py is about those that do
}


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token for each ASCII character, the special tokens of a baby Llama 4, and a chat
    template."""
    vocab = SPECIAL | {chr(c): 4 + i for i, c in enumerate([10, *range(32, 127)])}
    assert max(vocab.values()) < VOCAB
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    raw.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Writes one JSON value per line; a string is written unchanged."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False), encoding="utf-8")
    return path
