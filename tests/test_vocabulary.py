"""Vocabularies that do not fit together are refused before any work, with both sizes; a padded one is no fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from babies import edit_json
from command_line import Refuse
from onecard.calibration.tokens import Encoder
from onecard.models.families import load_adapter

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def resized(model: Path, rows: int) -> Path:
    """Gives a baby's embedding and head so many rows, and its config that vocabulary."""
    tensors = load_file(model / "model.safetensors")
    for name in EMBEDDINGS:
        old = tensors[name]
        tensors[name] = torch.cat([old, old])[:rows].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_json(model / "config.json", lambda config: config.update(vocab_size=rows))
    return model


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(
    copied: Callable[..., Path], refuse: Refuse, onecard: Callable[..., Result], refused: Refuse, texts: list[str]
) -> None:
    """No text need hold such a token: the first user's text might."""
    model = resized(copied("qwen3"), 250)
    refuse(model, "up to 255", "250 rows", "tokenizer")
    refused(onecard("verify", model, model, *texts[2:]), "up to 255", "250 rows")
    refused(onecard("generate", model, "hello"), "up to 255", "250 rows")


@pytest.mark.parametrize("rows", [256, 320])
def test_an_embedding_with_rows_to_spare_is_no_fault(copied: Callable[..., Path], rows: int) -> None:
    model = resized(copied("qwen3"), rows)
    assert Encoder(model, load_adapter(model)).tokenizer.vocab_size <= rows


def test_two_sides_with_different_vocabularies_are_told_apart(
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    texts: list[str],
) -> None:
    larger = resized(copied("qwen3"), 320)
    refused(onecard("verify", baby("qwen3"), larger, *texts[2:]), "vocabulary 320 in place of 256")
    refused(onecard("flips", larger, baby("qwen3")), "vocabulary 256 in place of 320")


def test_files_whose_vocabulary_is_not_the_configs_are_refused_with_both(
    copied: Callable[..., Path], refuse_model: Refuse
) -> None:
    model = resized(copied("qwen3"), 320)
    edit_json(model / "config.json", lambda config: config.update(vocab_size=256))
    refuse_model(model, *(f"{name} is [320, 64], and config.json says [256, 64]" for name in EMBEDDINGS))


def test_what_else_differs_between_two_sides_is_named(
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    texts: list[str],
) -> None:
    verify = lambda a, b: onecard("verify", a, b, *texts[2:])  # noqa: E731
    refused(verify(baby("llama4-text"), baby("qwen3")), "family qwen3_moe in place of llama4")
    refused(verify(baby("qwen3"), baby("qwen3", 3)), "blocks 3 in place of 2")
    model = copied("qwen3")
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    wider = {
        n: torch.cat([t, t], dim=1 if "down_proj" in n else 0) if ".layers.1.mlp." in n else t
        for n, t in tensors.items()
    }
    save_file({n: t.contiguous() for n, t in wider.items()}, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 320}))
    refused(verify(baby("qwen3"), model), "model.layers.1.mlp.down_proj.weight is [64, 320] in place of [64, 160]")
