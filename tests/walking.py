"""A walk over a small model, for tests."""

import torch

from onecard.checkpoint.model import Model
from onecard.core.device import Compute
from onecard.core.rows import Step
from onecard.models.walk import Walk


def cpu_walk(
    model: Model, batch_tokens: int = 1000, dtype: torch.dtype = torch.float32, step: Step | None = None
) -> Walk:
    """A walk on the CPU; without `step` nobody watches it."""
    compute = Compute(device=torch.device("cpu"), dtype=dtype, batch_tokens=batch_tokens)
    return Walk.over(model.adapter, model.source, compute, step)
