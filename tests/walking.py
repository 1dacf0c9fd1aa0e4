"""Walks over small models: rows for them, and logits by the walk and by transformers."""

from typing import Any

import torch

import babies
from onecard.checkpoint.model import Model
from onecard.core.device import Compute
from onecard.core.rows import Row, Step, batches
from onecard.core.tensors import TensorSource
from onecard.models.adapter import Adapter
from onecard.models.walk import Embedder, Walk

IMAGE_TOKENS = 4  # the babies' tile: (16 / 4)^2 patches, shuffled 2 x 2 into one


def cpu_walk(
    model: Model, batch_tokens: int = 1000, dtype: torch.dtype = torch.float32, step: Step | None = None
) -> Walk:
    """A walk on the CPU; without `step` nobody watches it."""
    compute = Compute(device=torch.device("cpu"), dtype=dtype, batch_tokens=batch_tokens)
    return Walk.over(model.adapter, model.source, compute, step)


def make_rows(adapter: Adapter) -> list[Row]:
    """Rows of lengths below, at, just over and far over the attention chunk of 8. Some share a length, some have
    images."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for number, length in enumerate([33, 33, 8, 9, 9, 33, 5, 1]):
        tokens = torch.randint(3, 240, (length,), generator=generator)
        pixels = None
        if adapter.has_vision and number in (0, 3, 5):
            images = 2 if number == 5 else 1
            pixels = torch.randn(images, 3, 16, 16, generator=generator)
            for image in range(images):
                start = 2 + image * (IMAGE_TOKENS + 3)
                tokens[start : start + IMAGE_TOKENS] = babies.PATCH
        rows.append(Row(f"row-{number}", "text", tokens, pixels))
    return rows


def walk_logits(
    adapter: Adapter, source: TensorSource, rows: list[Row], batch_tokens: int = 70, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Logits [T, V] of each row, by the parts of the walk."""
    groups = batches(rows, batch_tokens)
    walk = Walk.over(adapter, source, Compute(torch.device("cpu"), dtype, batch_tokens))
    embedder = Embedder(walk, rows)
    hidden = [embedder.batch(numbers) for numbers in groups]
    for index in range(adapter.n_blocks):
        block = walk.load(index)
        hidden = [block.forward(h) for h in hidden]
    norm, head = walk.final_norm(), walk.head().to(dtype)
    logits: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for numbers, h in zip(groups, hidden, strict=True):
            logits |= dict(zip(numbers, norm(h) @ head.T, strict=True))
    return [logits[n] for n in range(len(rows))]


def whole_logits(model: Any, row: Row) -> torch.Tensor:
    """Logits [T, V] of one row, by transformers."""
    inputs: dict[str, Any] = {"input_ids": row.tokens[None]}
    if row.pixels is not None:
        inputs["pixel_values"] = row.pixels.to(model.dtype)
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of b."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
