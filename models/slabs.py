"""Slabs: what is read from a checkpoint at a time, so that each stored byte is read once.

Several canonical weights may be cut from one stored tensor: the gate and the up of an expert lie side by side in a
fused tensor. Read one by one, each would read the whole expert. A slab is a stored tensor, or one expert of it; all
weights that are wanted of it are cut from what was read, on the device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from ..core.tensors import Index, TensorSource
from .adapter import Adapter, Location

# A stored tensor, and the integers that choose a part of it (an expert).
Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """Where a canonical weight lies in a slab, perhaps as `[in, out]`."""

    name: str
    index: Index
    transposed: bool

    @property
    def turned_index(self) -> Index:
        """The same place in the slab with its two axes exchanged."""
        rows, columns = (*self.index, slice(None), slice(None))[:2]
        return columns, rows


@dataclass(frozen=True)
class Slab:
    """A part of a checkpoint that is read as a whole, and the weights that are cut from it."""

    key: Key
    cuts: tuple[Cut, ...]

    def weights(self, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by name, views; `[out, in]` if they are 2-D.

        The axes are exchanged before the slab is cut: torch has a fast way for a whole matrix only."""
        turned = whole.T.contiguous() if any(cut.transposed for cut in self.cuts) else whole
        for cut in self.cuts:
            yield cut.name, turned[cut.turned_index] if cut.transposed else whole[cut.index]


def slabs_of(adapter: Adapter, source: TensorSource, names: Iterable[str]) -> list[Slab]:
    """The slabs that hold these canonical tensors, in the order in which they are first needed."""
    available = source.names
    found: dict[Key, list[Cut]] = {}
    for name in names:
        where = adapter.locate(name, available)
        cut = Cut(name, where.index[len(_leading(where.index)) :], where.transposed)
        found.setdefault(key_of(where), []).append(cut)
    return [Slab(key, tuple(cuts)) for key, cuts in found.items()]


def key_of(where: Location) -> Key:
    """The slab that holds what lies there."""
    return where.tensor, _leading(where.index)


def _leading(index: Index) -> tuple[int, ...]:
    """The integers that an index begins with."""
    leading: list[int] = []
    for part in index:
        if isinstance(part, slice):
            break
        leading.append(part)
    return tuple(leading)


def dense_bytes(source: TensorSource, slabs: Iterable[Slab]) -> int:
    """Bytes of these slabs, unpacked."""

    def size(tensor: str, leading: tuple[int, ...]) -> int:
        info = source.info(tensor)
        return info.nbytes // prod(info.shape[: len(leading)])

    return sum(size(*slab.key) for slab in slabs)
