"""The judge of the real model: KL by kind of text, as the twin walk gives it, with the original's half of it kept.

Every job is judged on the same rows. The hidden rows that the original's last block gives are therefore computed once,
and lie in build/real/reference; that saves a third of the time.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge
import torch
from safetensors.torch import load_file, save_file

from onecard.checkpoint.activations import Activations
from onecard.checkpoint.source import open_folder
from onecard.core.device import Compute
from onecard.core.rows import Row
from onecard.core.tensors import TensorSource
from onecard.eval.kl import TokenResults, compare_rows, concatenate
from onecard.eval.summary import TokenGroup, summarize_groups
from onecard.models.families import load_adapter
from onecard.models.walk import Walk

from . import documents

# The name of all home kinds together.
HOME = "home"
STREAM = "judged"


def last_rows(walk: Walk, rows: Sequence[Row]) -> torch.Tensor:
    """The normed hidden rows that enter the head, fp32 [N, T, H], in the order of `rows`."""
    with tempfile.TemporaryDirectory(prefix="real-judge-") as scratch, torch.inference_mode():
        hidden = walk.hidden_rows(list(rows), Activations(Path(scratch)))
        hidden.embed(STREAM)
        for index in range(walk.adapter.n_blocks):
            hidden.forward(walk.load(index), STREAM)
            hidden.store.drop(index)
        norm, out = walk.final_norm(), {}
        for batch, numbers in enumerate(hidden.groups):
            normed = norm(hidden.get(walk.adapter.n_blocks, STREAM, batch))
            out |= dict(zip(numbers, normed, strict=True))
        return torch.stack([out[number] for number in range(len(rows))])


def kept_rows(walk: Walk, rows: Sequence[Row], folder: Path) -> torch.Tensor:
    """The original's last rows, from `folder` if it has those of exactly this model and these rows."""
    identity = hashlib.sha256("".join([walk.source.digest, *(row.digest for row in rows)]).encode()).hexdigest()
    path = folder / f"{identity[:16]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file({"rows": last_rows(walk, rows)}, unfinished)
        unfinished.rename(path)
    return load_file(path)["rows"]


def tokens_of(model: Path, quantized: TensorSource, rows: Sequence[Row], folder: Path) -> TokenResults:
    """Every prediction of both models on `rows`, which have one length."""
    adapter = load_adapter(model)
    compute = Compute(device=torch.device("cpu"), dtype=torch.float32, batch_tokens=judge.BATCH_TOKENS)
    reference = Walk.over(adapter, open_folder(model), compute)
    other = reference.beside(adapter, quantized)
    pair = (kept_rows(reference, rows, folder), last_rows(other, rows))
    heads = (reference.head(), other.head())
    found = []
    for number, row in enumerate(rows):
        position = torch.arange(len(row.tokens) - 1)
        hidden = (pair[0][number, :-1], pair[1][number, :-1])
        found.append(compare_rows(hidden, heads, row.tokens[1:], torch.full_like(position, number), position))
    return concatenate(found)


def kinds_of(tokens: TokenResults, rows: Sequence[Row]) -> list[TokenGroup]:
    kinds = {kind: torch.tensor([row.kind == kind for row in rows]) for kind in (*documents.HOME, *documents.AWAY)}
    kinds[HOME] = torch.stack([kinds[kind] for kind in documents.HOME]).any(0)
    return [TokenGroup(kind, member[tokens.document]) for kind, member in kinds.items()]


def kl_by_kind(model: Path, quantized: TensorSource, rows: Sequence[Row], folder: Path) -> dict[str, dict[str, Any]]:
    """Mean KL with its interval over rows, and same top-1, of each kind and of all home kinds together. `folder` is for
    the original's rows."""
    tokens = tokens_of(model, quantized, rows, folder)
    return {bucket.label: bucket.model_dump() for bucket in summarize_groups(tokens, kinds_of(tokens, rows))}
