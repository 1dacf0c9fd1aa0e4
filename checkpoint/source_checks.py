"""Checks of a checkpoint's tensors: names and shapes against config.json, and every value finite."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import DamageError, InputError, UnusableModelError, input_error, several
from ..core.tensors import TORCH_DTYPES, TensorSource
from ..models.adapter import Adapter, read
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
        raise input_error(
            f"{path} contradicts its config.json:",
            problems,
            "Fetch the original checkpoint, config.json and all weights of one revision, in bf16, fp16 or fp32.",
            most=40,
        )


def untied_copy(folder: Folder, adapter: Adapter) -> str | None:
    """What is wrong with a stored copy of a tied head: it must hold the embedding's numbers. None: there is none, or it
    is equal. Raises ResourceError."""
    copy, embedding = adapter.tied_copy, adapter.embedding_name
    if copy is None or copy not in folder.infos:
        return None
    held = folder.infos.get(embedding)
    if (
        held is not None
        and held.shape == folder.infos[copy].shape
        and all(
            _same(ours, theirs)
            for (_, ours), (_, theirs) in zip(pieces(folder, copy), pieces(folder, embedding), strict=True)
        )
    ):
        return None
    return (
        f"{copy} is not {embedding}, though config.json ties them (tie_word_embeddings): some engines would take the "
        "one for the head, some the other"
    )


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, or the same numbers in different dtypes."""
    if ours.dtype == theirs.dtype:
        return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    return torch.equal(ours.double(), theirs.double())


def refuse_untied_copy(folder: Folder, adapter: Adapter) -> None:
    """Raises InputError for what `untied_copy` finds."""
    problem = untied_copy(folder, adapter)
    if problem is not None:
        raise InputError(
            f"{folder.path}: {problem}. If the stored head is meant, set tie_word_embeddings to false in config.json; "
            "if not, remove it from the files"
        )


@dataclass
class Values:
    """What the values of a stored tensor show."""

    nan: int = 0
    inf: int = 0
    # Whether a whole matrix in it may be all zeros; a matrix can be half of an expert's slice of a fused tensor.
    maybe_zeros: bool = False


def refuse_nonfinite(folder: Folder, name: str, original: bool = True, only: Collection[str] | None = None) -> set[str]:
    """Read every weight once and refuse NaN and Inf, which all later steps would carry on silently.

    `only`: the stored tensors to read, if not all. Returns those that may hold matrices of zeros. Raises
    UnusableModelError for the original, DamageError for a checkpoint that is measured against it.
    """
    found = {tensor: _values(folder, tensor) for tensor in folder.names if only is None or tensor in only}
    problems = [
        f"{tensor} holds {values.nan} NaN, {values.inf} Inf"
        for tensor, values in found.items()
        if values.nan or values.inf
    ]
    if problems:
        told = several(f"{name} holds non-finite values:", problems, "The checkpoint is damaged: fetch it again.")
        raise UnusableModelError(told) if original else DamageError(told)
    return {tensor for tensor, values in found.items() if values.maybe_zeros}


def zero_matrices(adapter: Adapter, source: TensorSource, suspects: Collection[str]) -> list[str]:
    """The canonical matrices that are all zeros. `suspects`: the stored tensors that `refuse_nonfinite` names."""
    places = {name: adapter.locate(name, source.names).tensor for name in adapter.expected()} if suspects else {}
    return sorted(
        name for name, tensor in places.items() if tensor in suspects and not read(adapter, source, name).any()
    )


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


def _values(folder: Folder, name: str) -> Values:
    """Read a tensor once."""
    found, shape = Values(), folder.infos[name].shape
    if not TORCH_DTYPES[folder.infos[name].dtype].is_floating_point:
        return found
    anything = False
    for _, stored in pieces(folder, name):
        part = stored.float() if stored.dtype.itemsize == 1 else stored  # torch has no isinf for fp8
        if not part.numel():
            continue
        # The ends show NaN and Inf. On a CPU this pass is thirty times as fast as a sum, and forty as fast as a count.
        ends = torch.stack(torch.aminmax(part))
        if not torch.isfinite(ends).all():
            found.nan += int(torch.isnan(part).sum())
            found.inf += int(torch.isinf(part).sum())
        anything = anything or bool(ends.any())
        if len(shape) == 3:
            # Where a half is zeros, by either axis or interleaved, so is half of the first row or of the first column.
            first = (part[:, 0], part[:, :, 0])
            found.maybe_zeros |= any(bool((2 * line.count_nonzero(1) <= line.shape[1]).any()) for line in first)
    found.maybe_zeros |= len(shape) > 1 and not anything
    return found
