"""Babies that llama.cpp's format can hold, with a byte-level BPE; the command line quantizes and exports them."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM

import babies
from command_line import run_onecard
from inputs import write_jsonl, write_recipe
from onecard.checkpoint.gguf import write as gguf_write
from onecard.checkpoint.gguf.tokenizer import QWEN2
from onecard.checkpoint.model import Model, open_model

SPECIAL = ["<|begin_of_text|>", "<|eot|>", "<|pad|>"]
TEXTS = ["the cat sat on the mat", "a dog and a cat", "that is that, then: 12345 of them!"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_bpe(folder: Path, split: str = QWEN2, ignore_merges: bool = False) -> Path:
    """Writes a tokenizer.json within a baby's vocabulary, with a token that begins every text, and a chat template."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()[:0]
    raw.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    raw.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", 0)])
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def sparse_qwen3(folder: Path) -> Path:
    """A Qwen3-MoE baby with experts in every layer, as llama.cpp requires."""
    config = babies.qwen3_config(2)
    config.mlp_only_layers = []
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    babies.randomize(model, 0)
    return babies.save(folder, model.config, babies.split_experts(model.state_dict()))


def make(folder: Path, family: str) -> Path:
    made = sparse_qwen3(folder) if family == "qwen3" else babies.make_baby(folder, family, 4)
    return write_bpe(made)


def quantize(model: Path, out: Path, **changes: object) -> Path:
    """Quantizes experts and dense MLPs by round-to-nearest in groups of 32."""
    texts = write_jsonl(out.with_suffix(".jsonl"), [{"text": text * 3} for text in TEXTS])
    settings = {"method": "rtn", "bits": 4, "group_size": 32, "evaluation_rows": 2} | changes
    recipe = write_recipe(out.with_suffix(".yaml"), **settings)
    done = run_onecard("quantize", model, out, "--recipe", recipe, "--evaluation", texts)
    assert done.exit_code == 0, done.output
    return out


def export(checkpoint: Path, out: Path, floats: str | None = None) -> tuple[Path, Model]:
    """Exports to a folder with the GGUF file; gives it and the checkpoint that it was made from."""
    model = open_model(str(checkpoint))
    out.mkdir()
    planned = gguf_write.plan(model.adapter, model.source, model.path, "baby", floats)
    gguf_write.write(planned, model.adapter, model.source, out / gguf_write.FILE_NAME)
    assert (out / gguf_write.FILE_NAME).stat().st_size == planned.nbytes
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))
    return out, model
