"""`real.py make`: the model in both forms, the texts in their roles, and what a job is given.

    build/real/model/FORM        mixture (Mixtral, four experts, all chosen) and dense (Llama): the same function
    build/real/texts/ROLE.jsonl  calibration, choice, test, pool (documents.py)
    build/real/inputs/FORM       what benchmarks/peers/contract.py describes; FORM-MIXTURE where calibration is broader

What is there is not made again.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import prepared
import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from onecard.calibration.packing import document_rows, pack_rows
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.source import open_folder
from onecard.core.rows import Row
from onecard.demo import corpus
from onecard.models.families import load_adapter

from . import chat, documents, llama_gguf, mixture, packages

FORMS = {"mixture": "mixtral", "dense": "llama"}
# onecard verifies its own checkpoint in its run. The judge does that again for all, so a few rows are enough.
VERIFIED_DOCUMENTS = 8
# fp32 sums in another order; logits are about 40.
MOST_LOGIT_DIFFERENCE = 1e-3
# A reader of English prose with 135 million weights. A mistake in heads, rotation or tokens gives thousands.
MOST_PERPLEXITY = 40.0
CHECKED_ROWS = 4


def make_model(build: Path) -> None:
    folder = build / "model"
    if all((folder / form / "config.json").exists() for form in FORMS):
        return
    reader = GGUFReader(packages.unpack_model(build))
    config = llama_gguf.config_of(reader)
    tensors = llama_gguf.tensors_of(reader, config)
    made = {
        "dense": (config, tensors),
        "mixture": (mixture.mixture_config(config), mixture.mixture_tensors(tensors)),
    }
    for form, (its_config, its_tensors) in made.items():
        (folder / form).mkdir(parents=True, exist_ok=True)
        llama_gguf.write_tokenizer(reader, folder / form)
        llama_gguf.write_folder(folder / form, its_config, its_tensors)


def make_texts(build: Path) -> dict[str, Any]:
    folder = build / "texts"
    known = folder / "facts.json"
    if known.exists():
        return dict(json.loads(known.read_text()))
    tokenizer = Tokenizer.from_file(str(build / "model" / "dense" / "tokenizer.json"))

    @cache
    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    texts = documents.written(packages.unpack_texts(build), count) + chat.conversations(build / "model" / "dense")
    found = documents.roles(texts, count)
    folder.mkdir(parents=True, exist_ok=True)
    for role, those in found.items():
        corpus.write_jsonl(folder / f"{role}.jsonl", [text.line() for text in those])
    facts = documents.facts(found)
    known.write_text(json.dumps(facts, indent=1))
    return facts


def inputs_of(build: Path, form: str, of_texts: str) -> Path:
    return build / "inputs" / (form if of_texts == "home" else f"{form}-{of_texts}")


def make_inputs(build: Path, form: str, of_texts: str = "home") -> dict[str, Any]:
    """The inputs of a form's jobs. Both forms have the same rows. `of_texts`: a key of documents.MIXTURES."""
    model, folder, texts = build / "model" / form, inputs_of(build, form, of_texts), build / "texts"
    facts = folder / "inputs.json"
    source = open_folder(model)
    kinds = documents.MIXTURES[of_texts]
    read = b"".join((texts / f"{role}.jsonl").read_bytes() for role in (*documents.ROLES, *(["pool"] if kinds else [])))
    identity = hashlib.sha256(source.digest.encode() + read).hexdigest()
    if facts.exists() and json.loads(facts.read_text())["identity"] == identity:
        return dict(json.loads(facts.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    calibration, pool = (corpus.read_jsonl(texts / f"{role}.jsonl") for role in ("calibration", "pool"))
    lines = documents.mixed(calibration, pool, kinds, lambda text: len(tokenizer.encode(text).ids))
    corpus.write_jsonl(folder / "calibration.jsonl", lines)
    corpus.write_jsonl(folder / "choice.jsonl", corpus.read_jsonl(texts / "choice.jsonl")[:VERIFIED_DOCUMENTS])
    encoder = encoder_of(build)
    encoded = encoder.encode_all(read_jsonl(folder / "calibration.jsonl"))
    rows = pack_rows(encoded, documents.ROW_TOKENS, documents.CALIBRATION_ROWS, prepared.SEED)
    save_file({"rows": torch.stack([row.tokens for row in rows])}, folder / "rows.safetensors")
    if not (folder / "canonical").exists():
        (folder / "canonical").symlink_to(Path("../../model") / form)
    weights = mixture.linear_weights(encoder.adapter.config)
    if form == "mixture":
        weights = [name for weight in weights for name in mixture.mixture_names(weight)]
    found = {
        "identity": identity,
        "family": FORMS[form],
        "rows": len(rows),
        "row_tokens": documents.ROW_TOKENS,
        "parameters": sum(math.prod(info.shape) for info in source.infos.values()),
        "source_bytes": source.file_bytes,
        "weights": weights,
        "experts": [name for name in weights if ".experts." in name or ".mlp." in name],
    }
    facts.write_text(json.dumps(found, indent=1))
    return found


def encoder_of(build: Path) -> Encoder:
    model = build / "model" / "mixture"
    return Encoder(model, load_adapter(model))


def evaluation_rows(build: Path, role: str, every: int = 1) -> list[Row]:
    """A row a piece, cut at ROW_TOKENS, of the choice or of the test set; each row knows its kind. `every`: of each
    kind only every n-th."""
    encoded = encoder_of(build).encode_all(read_jsonl(build / "texts" / f"{role}.jsonl"))
    rows = document_rows(encoded, documents.ROW_TOKENS, len(encoded))
    of_kind = {kind: [row for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)}
    return [row for those in of_kind.values() for row in those[::every]]


def check(build: Path) -> dict[str, float]:
    """Whether both folders compute the same, speak English, and give a text back. Raises ValueError."""
    rows = [row for row in evaluation_rows(build, "choice") if row.kind == "handbook"][:CHECKED_ROWS]
    tokenizer = Tokenizer.from_file(str(build / "model" / "dense" / "tokenizer.json"))
    for text in corpus.read_jsonl(build / "texts" / "choice.jsonl"):
        if "text" in text and tokenizer.decode(tokenizer.encode(text["text"]).ids) != text["text"]:
            raise ValueError(f"the tokenizer does not give {text['id']} back")
    tokens = torch.stack([row.tokens for row in rows])
    logits, losses = {}, {}
    for form in FORMS:
        model = AutoModelForCausalLM.from_pretrained(build / "model" / form, dtype=torch.float32)
        with torch.inference_mode():
            found = model(input_ids=tokens, labels=tokens)
        logits[form], losses[form] = found.logits, float(found.loss)
    told = {
        "logit_difference": float((logits["dense"] - logits["mixture"]).abs().max()),
        "perplexity_english": math.exp(losses["dense"]),
    }
    if told["logit_difference"] > MOST_LOGIT_DIFFERENCE or told["perplexity_english"] > MOST_PERPLEXITY:
        raise ValueError(f"the model was not read as it was written: {told}")
    (build / "check.json").write_text(json.dumps(told, indent=1))
    return told
