"""The judge: whether a peer's weights are int4 at all, and the KL of the model that they make.

Weights come first, because a mixed-up axis or name gives a KL that looks like bad quantization. Four bits leave a
relative error of 0.05 to 0.15 in a weight matrix; above MOST_ERROR the row is refused as stored wrong. A method that
moves scale between matrices (AWQ) is compared after fitting one factor a row and one a column by least squares.

KL comes from our twin walk (eval/twin.py) in fp32, the same for all.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from onecard.checkpoint.activations import Activations
from onecard.checkpoint.source import Folder, open_folder
from onecard.core.device import Compute
from onecard.core.rows import Row
from onecard.core.tensors import TensorSource
from onecard.eval.summary import summarize
from onecard.eval.twin import twin_walk
from onecard.models.families import load_adapter
from onecard.models.walk import Walk

MOST_ERROR = 0.9
LEVELS = 16  # the values of four bits
BATCH_TOKENS = 16384
FITTING_ROUNDS = 10


def rescaled(reference_OI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """The reference times one factor a row and one a column: the least squares fit to `weight_OI`, alternating."""
    fitted = reference_OI.clone()
    for turn in range(FITTING_ROUNDS):
        dim = turn % 2
        fitted = fitted * (
            (fitted * weight_OI).sum(dim, keepdim=True) / fitted.square().sum(dim, keepdim=True).clamp_min(1e-30)
        )
    return fitted


def levels(weight_OI: torch.Tensor, group: int) -> int:
    """The greatest number of distinct values in a group of a row. Equal codes of a group give equal bits."""
    if weight_OI.shape[1] % group:
        return 1 << 30
    ordered = weight_OI.unflatten(1, (-1, group)).sort(dim=-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def check_weights(
    source: Folder, dense: Folder, weights: list[str], experts: list[str], group: int, rescales: bool
) -> dict[str, Any]:
    """How far each weight is from the source, and how many are stored in four bits."""
    errors: dict[str, float] = {}
    low_bit, zeros = set(), []
    for name in weights:
        a, b = source.get(name).float(), dense.get(name).float()
        if torch.equal(a, b):
            errors[name] = 0.0
            continue
        if not b.any():  # some tools store an expert without rows as zeros; that is no mix-up of ours
            zeros.append(name)
            continue
        target = rescaled(a, b) if rescales else a
        errors[name] = float((b - target).norm() / target.norm())
        if levels(b, group) <= LEVELS:
            low_bit.add(name)
    changed = [name for name, error in errors.items() if error > 0]
    others = [
        n
        for n in source.names
        if n not in set(weights) and not torch.equal(source.get(n).float(), dense.get(n).float())
    ]
    return {
        "expert_matrices": len(experts),
        "expert_matrices_int4": len(low_bit.intersection(experts)),
        "expert_matrices_changed": sum(errors.get(name, 1.0) > 0 for name in experts),
        "other_matrices": len(weights) - len(experts),
        "other_matrices_int4": len(low_bit.difference(experts)),
        "error_mean": sum(errors[n] for n in changed) / max(1, len(changed)),
        "error_max": max(errors.values(), default=0.0),
        "error_max_at": max(errors, key=lambda n: errors[n], default=""),
        "other_tensors_changed": len(others),
        "not_finite": [n for n in weights if not dense.get(n).isfinite().all()],
        "all_zero": zeros,
    }


def kl(model: Path, quantized: TensorSource, rows: list[Row]) -> dict[str, Any]:
    adapter = load_adapter(model)
    compute = Compute(device=torch.device("cpu"), dtype=torch.float32, batch_tokens=BATCH_TOKENS)
    reference = Walk.over(adapter, open_folder(model), compute)
    with tempfile.TemporaryDirectory(prefix="peers-judge-") as scratch:
        twin = twin_walk(reference, reference.beside(adapter, quantized), rows, Activations(Path(scratch)))
    return summarize(twin.tokens).model_dump() | {"changed_routes": twin.mean_changed_routes}
