"""Changed routes: the share of tokens that two models send to different experts, against transformers' own routers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForConditionalGeneration

from inputs import write_jsonl, write_recipe

TEXTS = ["the quick brown fox jumps over", "a lazy dog sleeps all day in the", "sun and nobody minds it, not at all"]


def routes_by_transformers(folder: Path, rows: list[torch.Tensor], top_k: int) -> dict[int, list[list[frozenset[int]]]]:
    """Block -> row -> the set of experts of each token, from the router's logits of the whole model."""
    llama = "llama4" in json.loads((folder / "config.json").read_text())["model_type"]
    cls: Any = Llama4ForConditionalGeneration if llama else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    found: dict[int, list[list[frozenset[int]]]] = {}
    for name, module in model.named_modules():
        if name.endswith((".router", ".mlp.gate")):
            block = int(name.split(".layers.")[1].split(".")[0])

            def hook(module: Any, args: Any, _out: Any, block: int = block) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                chosen = torch.nn.functional.linear(x, module.weight).topk(top_k).indices
                found.setdefault(block, []).append([frozenset(token.tolist()) for token in chosen])

            module.register_forward_hook(hook)
    with torch.inference_mode():
        for row in rows:
            model(input_ids=row[None])
    return found


@pytest.mark.parametrize(("family", "top_k"), [("scout", 1), ("qwen3", 2)])
def test_changed_routes_are_those_of_transformers(
    family: str,
    top_k: int,
    baby: Callable[..., Path],
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    tmp_path: Path,
) -> None:
    original, moved = baby(family), copied(family)
    weights = load_file(moved / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if name.endswith((".router.weight", ".mlp.gate.weight")):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.3
            weights[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    recipe = write_recipe(tmp_path / "r.yaml", evaluation_row_tokens=24)
    result = onecard("verify", original, moved, "--recipe", recipe, "--evaluation", texts)
    assert result.exit_code == 0, result.stderr
    share = json.loads(result.stdout)["changed_routes"]
    tokenizer = AutoTokenizer.from_pretrained(original)
    rows = [torch.tensor(tokenizer(text)["input_ids"][:24]) for text in TEXTS]
    a, b = (routes_by_transformers(folder, rows, top_k) for folder in (original, moved))
    by_block = []
    for block, ours in a.items():
        pairs = [(x, y) for row, other in zip(ours, b[block], strict=True) for x, y in zip(row, other, strict=True)]
        by_block.append(sum(x != y for x, y in pairs) / len(pairs))
    assert share == pytest.approx(sum(by_block) / len(by_block), abs=1e-6)
    assert share > 0.02, "the routers were moved"


def test_a_model_against_itself_changes_no_route(
    baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    recipe = write_recipe(tmp_path / "r.yaml")
    result = onecard("verify", baby("scout"), baby("scout"), "--recipe", recipe, "--evaluation", texts)
    assert json.loads(result.stdout)["changed_routes"] == 0.0
