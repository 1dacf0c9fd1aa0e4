"""Whole runs without the command line: texts and a tokenizer with one token for each word, a recipe, and `quantize`."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onecard.core.record.schema import Record
from onecard.pipeline import Options, quantize
from onecard.recipe import Recipe

WORDS = [f"w{n}" for n in range(200)]


def write_texts(path: Path, seed: int, documents: int) -> Path:
    rng = random.Random(seed)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=30))}) for _ in range(documents)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token for each word: ids 4 to 203, below the babies' image placeholders."""
    raw = Tokenizer(models.WordLevel({"<unk>": 3} | {w: 4 + n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(str(folder))


def make_recipe(**keys: Any) -> Recipe:
    keys = {"quantize_roles": ("expert", "shared_expert", "mlp"), "group_size": 32} | keys
    return Recipe(
        name="baby",
        description="",
        calibration_rows=12,
        calibration_row_tokens=24,
        evaluation_rows=3,
        evaluation_row_tokens=24,
        warn_below_expert_rows=0,
        max_shard_bytes=150_000,
        **keys,
    )


def run_pipeline(source: Path, out: Path, recipe: Recipe) -> Record:
    calibration = write_texts(out.parent / "calibration.jsonl", 0, 12)
    evaluation = write_texts(out.parent / "evaluation.jsonl", 1, 3)
    options = Options("cpu", calibration=calibration, evaluation=evaluation)
    return quantize(str(source), out, recipe, options, quiet=True)


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor, read by safetensors' specification without its library."""
    out: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert name not in out
            out[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return out
