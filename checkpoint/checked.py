"""When a checkpoint is searched for NaN and Inf: as a whole before the work, or as its blocks are loaded.

On a CPU a run takes hours and the search seconds, so all is searched before. On a GPU a pass over 217 GB would take a
third of a run. There the blocks are looked at as they are loaded, and before the work only what no block is made of:
embedding, last norm, head and vision tower. Where a walk then meets a number that is not finite, the whole checkpoint
is searched after all, so that both ways end in one message, which names every tensor and counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.device import Compute
from ..core.errors import NonfiniteError, UnusableModelError
from .model import Model
from .source_checks import refuse_nonfinite


def check_weights(model: Model, compute: Compute, original: bool = True) -> set[str]:
    """What is searched before the work. Returns and raises as `refuse_nonfinite`."""
    only = None if compute.checks_first else outside_blocks(model)
    return refuse_nonfinite(model.folder, model.name, original, only)


@contextmanager
def checked_as_loaded(compute: Compute, *models: Model) -> Iterator[None]:
    """Around the work on an original and a checkpoint of it, or on an original alone. Raises as `refuse_nonfinite` if
    what the walk met was stored so; otherwise what the walk raised."""
    try:
        yield
    except (UnusableModelError, NonfiniteError):
        if not compute.checks_first:
            for model in models:
                refuse_nonfinite(model.folder, model.name, original=model is models[0])
        raise


def outside_blocks(model: Model) -> set[str]:
    """The stored tensors that loading the blocks does not read."""
    adapter, names = model.adapter, model.source.names
    prefixes = tuple(adapter.block_prefix(block) for block in range(adapter.n_blocks))
    loaded = {adapter.locate(name, names).tensor for name in adapter.expected() if name.startswith(prefixes)}
    packed = model.packed
    return set(model.folder.names).difference(
        *([name] if name not in packed else packed[name].parts.values() for name in loaded)
    )
