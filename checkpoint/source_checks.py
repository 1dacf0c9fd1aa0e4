"""Checks of a checkpoint's tensors: names and shapes against config.json, and every value finite."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from ..core.errors import InputError, input_error
from ..core.tensors import TORCH_DTYPES, TensorSource
from ..models.adapter import Adapter
from .source import Folder


def check_shapes(
    path: Path, source: TensorSource, expected: dict[str, tuple[int, ...]], left_aside: Collection[str]
) -> None:
    """Check that the source has every tensor that config.json promises, in its shape and a floating-point dtype.

    `left_aside`: other tensors that may be there. Raises InputError with all problems (40 shown).
    """
    problems = [f"{name} is missing" for name in expected if name not in source.names]
    for name in expected.keys() & source.names:
        info, shape = source.info(name), expected[name]
        if info.shape != shape:
            problems.append(f"{name} is {list(info.shape)}, and config.json says {list(shape)}")
        if info.dtype not in ("BF16", "F16", "F32"):
            problems.append(f"{name} is stored as {info.dtype}: onecard reads BF16, F16 and F32 weights")
    unknown = [name for name in source.names if name not in expected and name not in left_aside]
    problems.sort()
    problems += [f"{name} is in the checkpoint and config.json knows no such tensor" for name in unknown]
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise input_error(
            f"{path} contradicts its config.json:",
            shown,
            "Fetch the original checkpoint, config.json and all weights of one revision, in bf16, fp16 or fp32.",
        )


def untied_copy(folder: Folder, adapter: Adapter) -> str | None:
    """What is wrong with a stored copy of a tied head: it must have the embedding's bytes. None: there is none, or it
    is equal. Raises ResourceError."""
    copy, embedding = adapter.tied_copy, adapter.embedding_name
    if copy is None or copy not in folder.infos:
        return None
    if folder.infos.get(embedding) == folder.infos[copy] and all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        for (_, ours), (_, theirs) in zip(pieces(folder, copy), pieces(folder, embedding), strict=True)
    ):
        return None
    return (
        f"{copy} is not {embedding}, though config.json ties them (tie_word_embeddings): some engines would take the "
        "one for the head, some the other"
    )


def refuse_untied_copy(folder: Folder, adapter: Adapter) -> None:
    """Raises InputError for what `untied_copy` finds."""
    problem = untied_copy(folder, adapter)
    if problem is not None:
        raise InputError(
            f"{folder.path}: {problem}. If the stored head is meant, set tie_word_embeddings to false in config.json; "
            "if not, remove it from the files"
        )


def refuse_nonfinite(folder: Folder, name: str) -> None:
    """Read every weight once and refuse NaN and Inf, which all later steps would carry on silently.

    Raises InputError.
    """
    found = {tensor: nonfinite(folder, tensor) for tensor in folder.names}
    problems = [f"{tensor} holds {what}" for tensor, what in found.items() if what]
    if problems:
        raise input_error(f"{name} holds non-finite values:", problems, "The checkpoint is damaged: fetch it again.")


def pieces(folder: Folder, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a tensor in slices of its first axis: (first index, slice). Memory stays small; a scalar comes as [1]."""
    shape = folder.infos[name].shape
    if not shape:
        yield 0, folder.get(name)[None]
        return
    # 64 Mi values per slice: 128 MB in bf16.
    rows = max(1, 2**26 // max(1, int(torch.Size(shape[1:]).numel())))
    for start in range(0, shape[0], rows):
        yield start, folder.get(name, (slice(start, start + rows),))


def nonfinite(folder: Folder, name: str) -> str | None:
    """'3 NaN, 1 Inf' when the tensor holds non-finite values, otherwise None."""
    if not TORCH_DTYPES[folder.infos[name].dtype].is_floating_point:
        return None
    nan = inf = 0
    for _, stored in pieces(folder, name):
        part = stored.float() if stored.dtype.itemsize == 1 else stored  # torch has no isinf for fp8
        # A sum of finite bf16 values in fp64 is finite, so one cheap pass is usually enough.
        if not torch.isfinite(part.sum(dtype=torch.float64)):
            nan += int(torch.isnan(part).sum())
            inf += int(torch.isinf(part).sum())
    return f"{nan} NaN, {inf} Inf" if nan or inf else None
