"""Greedy texts of several engines from the same weights, compared with transformers'.

transformers is the twin: it reads the whole text anew for every token, in fp32, without a cache. An engine's text is
the same token for token, or differs from some token on. The margin between transformers' two best logits there says how
near the choice was. `nearest_choice` is the smallest margin of all: an engine whose logits are off by less than half of
it cannot choose differently.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dense import run

from onecard.checkpoint.loading import load_with_transformers

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Told:
    """transformers' greedy tokens for a prompt, and the logits behind each choice, fp32 [tokens, V]."""

    tokens: list[int]
    logits: torch.Tensor

    def margins(self) -> torch.Tensor:
        """The margin between the two best logits of each token [tokens]."""
        best = self.logits.topk(2).values
        return best[:, 0] - best[:, 1]


def by_transformers(folder: Path, prompts: list[list[int]], ends: set[int], new_tokens: int) -> list[Told]:
    """Up to `new_tokens`, ended by the first of `ends`, with the same limits as the other engines."""
    model = load_with_transformers(folder, torch.float32)
    told = []
    for prompt in prompts:
        ids, logits = list(prompt), []
        with torch.inference_mode():
            for _ in range(new_tokens):
                logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids.append(int(logits[-1].argmax()))
                if ids[-1] in ends:
                    break
        told.append(Told(ids[len(prompt) :], torch.stack(logits)))
    return told


def by_vllm(python: Path, folder: Path, prompts: list[list[int]], work: Path, new_tokens: int) -> list[list[int]]:
    """vLLM on the CPU in fp32, in its own environment; it goes on past an end."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.json").write_text(json.dumps(prompts))
    run(
        python,
        HERE / "with_vllm.py",
        "serve",
        folder,
        work,
        "--prompts",
        work / "prompts.json",
        "--tokens",
        new_tokens,
        "--dtype",
        "float32",
        ours=False,
    )
    return list(json.loads((work / "served.json").read_text()))


def compare(found: list[list[int]], wanted: list[Told]) -> dict[str, Any]:
    """How many texts are the same, and the margins where the others begin to differ.

    A text that goes on past the end of transformers' counts as the same."""
    margins, same_tokens = [], 0
    for ours, told in zip(found, wanted, strict=True):
        pairs = enumerate(zip(ours, told.tokens, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), len(ours) if len(ours) < len(told.tokens) else None)
        same_tokens += len(told.tokens) if first is None else first
        if first is not None:
            margins.append(float(told.margins()[first]))
    return {
        "texts": len(found),
        "same": len(found) - len(margins),
        "tokens": sum(len(told.tokens) for told in wanted),
        "same_tokens": same_tokens,
        "margins_where_they_part": [round(margin, 5) for margin in margins],
        "nearest_choice": round(min(float(told.margins().min()) for told in wanted), 5),
    }
