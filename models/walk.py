"""The walk: a model of any known family, one block at a time, from a TensorSource.

A decoder layer of transformers is built on the meta device, gets its weights from the source, sees all rows, and is
freed. Memory never holds more than one block of a model. A Walk is one model with all that is needed to compute with
it. HiddenRows are rows on their way through it, kept in a store between blocks. Nothing is padded here: the rows of a
batch have one length.

Shape legend: N rows, T tokens a row, H hidden size.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import torch
from torch import nn

from ..core.device import Compute, on_cuda
from ..core.errors import InputError
from ..core.finite import all_true, nonfinite_error, row_flags
from ..core.rows import Row, RowStore, Step, Unwatched, batches
from ..core.tensors import CPU, TensorSource
from .adapter import Adapter, Role, Site, read, scale_dtype, site_dtypes, stored_dtype
from .block import Block, find_experts
from .calls import Calls
from .norms import fuse_norms
from .prefetch import ReadAhead, pinned
from .scan import Scan
from .slabs import dense_bytes, slabs_of


class Embedder:
    """Token rows -> hidden rows, images included. The embedding is read, and the vision tower run, once.

    `rows` is read again for every batch: a text in it may grow, but its images may not change."""

    def __init__(self, walk: "Walk", rows: list[Row]) -> None:
        self.walk, self.rows = walk, rows
        self.table = walk.read(walk.adapter.embedding_name)
        pixels = [row.pixels for row in rows if row.pixels is not None]
        self.features: dict[int, torch.Tensor] = {}
        if pixels:
            features = walk.adapter.image_features(walk.source, torch.cat(pixels), walk.compute)
            start = 0
            for number, row in enumerate(rows):
                if row.pixels is not None:
                    length = len(row.pixels) * walk.adapter.image_token_count()
                    self.features[number] = features[start : start + length]
                    start += length

    def batch(self, numbers: list[int]) -> torch.Tensor:
        """Hidden rows [N, T, H] of rows of one length."""
        device, dtype = self.walk.device, self.walk.compute.dtype
        input_ids = torch.stack([self.rows[n].tokens for n in numbers])
        hidden = self.table[input_ids].to(device, dtype)
        for i, number in enumerate(numbers):
            if number in self.features:
                mask = input_ids[i].eq(self.walk.adapter.image_token_id or 0)
                if int(mask.sum()) != len(self.features[number]):
                    raise InputError(
                        f"{self.rows[number].document} has {len(self.features[number])} placeholders of pictures, and "
                        f"{int(mask.sum())} tokens are image_token_index of config.json "
                        f"({self.walk.adapter.image_token_id}): it is not the config of the tokenizer that gave the row"
                    )
                hidden[i, mask.to(device)] = self.features[number].to(device, dtype)
        if not all_true(row_flags(hidden)):
            raise nonfinite_error(self.walk.original, "what the embedding or the vision tower gives")
        return hidden


@dataclass(frozen=True)
class Walk:
    """One model with all that is needed to compute with it. `Walk.over` makes one, `beside` one for a second checkpoint
    of the model."""

    adapter: Adapter
    source: TensorSource
    compute: Compute
    step: Step  # told how far the walk is
    calls: Calls
    # Whether the model is the original: whose fault it is what is not finite.
    original: bool = True
    # What reads the next block while this one computes. None on a CPU: there the system's cache does it, in memory
    # that the walk may need.
    ahead: ReadAhead | None = None
    # Looks at the weights of blocks as they are read; None where all were looked at before.
    scan: Scan | None = None

    @classmethod
    def over(cls, adapter: Adapter, source: TensorSource, compute: Compute, step: Step | None = None) -> "Walk":
        ahead = ReadAhead(source, pinned) if compute.device.type == "cuda" else None
        return cls(
            adapter=adapter,
            source=source,
            compute=compute,
            step=step or Unwatched(),
            calls=Calls(adapter, compute),
            ahead=ahead,
        )

    def beside(self, adapter: Adapter, source: TensorSource) -> "Walk":
        """The walk over another checkpoint of the same model, on the same device. Its layers are called with what its
        own config.json makes of a row's length."""
        return replace(Walk.over(adapter, source, self.compute, self.step), original=False)

    def reading(self, source: TensorSource) -> "Walk":
        """The same walk over weights in another source, of which nothing is read ahead."""
        return replace(self, source=source, ahead=None)

    @property
    def device(self) -> torch.device:
        return self.compute.device

    def read(self, name: str) -> torch.Tensor:
        """The canonical tensor `name`, on the CPU, in the dtype in which it is stored."""
        return read(self.adapter, self.source, name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the canonical tensor `name` is stored."""
        return stored_dtype(self.adapter, self.source, name)

    def site_dtypes(self, site: Site) -> frozenset[torch.dtype]:
        """The dtypes in which the weights of a site are stored."""
        return site_dtypes(self.adapter, self.source, site)

    def scale_dtype(self, site: Site) -> torch.dtype:
        """The dtype of the scales that a site gets."""
        return scale_dtype(self.adapter, self.source, site)

    def final_norm(self) -> nn.Module:
        """The norm behind the last block, loaded."""
        norm = self.adapter.text_skeleton().get_submodule("norm")
        weight = self.read(self.adapter.norm_name).to(self.device, self.compute.dtype)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm

    def head(self) -> torch.Tensor:
        """The output head [vocabulary, H] on the device, in the dtype in which it is stored."""
        return self.read(self.adapter.head_name).to(self.device)

    def hidden_rows(self, rows: list[Row], store: RowStore) -> "HiddenRows":
        """These rows in batches, with their place in `store`; nothing is embedded yet."""
        return HiddenRows(walk=self, rows=rows, groups=batches(rows, self.compute.batch_tokens), store=store)

    def expect(self, index: int) -> None:
        """Begins to read block `index`, which will be needed next. Nothing happens where nothing is read ahead, or for
        a block that does not exist."""
        if self.ahead is not None and 0 <= index < self.adapter.n_blocks:
            slabs = slabs_of(self.adapter, self.source, self._names(index))
            self.ahead.expect(index, [slab.key for slab in slabs], dense_bytes(self.source, slabs))

    def read_each(self, names: Iterable[str], device: torch.device = CPU) -> Iterator[tuple[str, torch.Tensor]]:
        """The canonical tensors `names` on `device`, in the dtypes in which they are stored. Each stored byte is read
        once, whatever is cut from it; weights of one stored tensor come one after the other. Raises as `load` does, if
        the weights were not looked at before."""
        for name, value in self._cut(names, device):
            self._judge()
            yield name, value.contiguous()

    def load(self, index: int) -> Block:
        """Block `index` on the device, read expert by expert.

        Weights take the walk's dtype, but the router is fp32: its logits are never rounded, whatever the rows are. (In
        bf16 transformers rounds them, which sends tokens near a tie elsewhere: that is left out.) Expert stacks stay in
        the checkpoint's dtype where that is narrower, and each expert is widened when it is used: an fp32 walk over a
        bf16 model then needs half the memory. Raises UnusableModelError or NonfiniteError for a weight that is not
        finite as it is read back: a product of code and scale can be, where both are finite.
        """
        self.expect(index)
        block = Block(self.adapter, index, self.adapter.build_block(index), self.calls, self.original)
        experts = find_experts(block.layer)
        for name, stack in [] if experts is None else list(experts.named_parameters()):
            value = torch.empty(stack.shape, device=self.device, dtype=self._expert_dtype(index))
            setattr(experts, name, nn.Parameter(value, requires_grad=False))
        for name, value in self._cut(self._names(index), self.device):
            if ".experts." in name:
                block.weight(name.removesuffix(".weight")).copy_(value)
            else:
                self._place(block, name, value)
        parameters = list(block.layer.parameters())
        assert not any(parameter.is_meta for parameter in parameters), index
        if on_cuda(parameters[0]):
            fuse_norms(block.layer)
        self._judge()
        block.refuse_nonfinite_weights()
        return block

    def _place(self, block: Block, name: str, value: torch.Tensor) -> None:
        """Gives a tensor outside the experts to the layer. Stored buffers (the bias that a router ranks with) keep
        their dtype."""
        owner, _, leaf = name.removeprefix(self.adapter.block_prefix(block.index)).rpartition(".")
        module = block.layer.get_submodule(owner)
        if leaf in dict(module.named_buffers(recurse=False)):
            setattr(module, leaf, value)
        else:
            is_router = self.adapter.role(name) is Role.ROUTER
            value = value.to(torch.float32 if is_router else self.compute.dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _cut(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """As `read_each`; the tensors are views of what was read. One slab is on the device at a time."""
        for slab in slabs_of(self.adapter, self.source, names):
            stored = self.source.stored(*slab.key) if self.ahead is None else self.ahead.take(slab.key)
            whole = stored.on(device)
            del stored  # its memory is used again
            for name, value in slab.weights(whole):
                if self.scan is not None:
                    self.scan.look(name, value)
                yield name, value

    def _judge(self) -> None:
        """Raises UnusableModelError or NonfiniteError for what was read and is not finite."""
        if self.scan is not None:
            self.scan.refuse_nonfinite(self.original)

    def _names(self, index: int) -> list[str]:
        """The canonical names of a block's tensors, in the order of files that are sorted by name."""
        prefix = self.adapter.block_prefix(index)
        first = bisect_left(self._every_name, prefix)
        return list(takewhile(lambda name: name.startswith(prefix), self._every_name[first:]))

    @cached_property
    def _every_name(self) -> list[str]:
        return sorted(self.adapter.expected())

    def _expert_dtype(self, index: int) -> torch.dtype:
        """The narrower of the dtype in which the block's experts are stored and the walk's own. The walk's own if they
        are stored in several, none of which holds the others' values."""
        sites = [site for site in self.adapter.sites(index) if site.role is Role.EXPERT]
        stored, own = frozenset[torch.dtype]().union(*map(self.site_dtypes, sites)), self.compute.dtype
        return next((dtype for dtype in stored if len(stored) == 1 and dtype.itemsize < own.itemsize), own)


@dataclass(frozen=True)
class HiddenRows:
    """Rows on their way through a model. `groups` has the row numbers of each batch. Between blocks the hidden rows of
    a batch lie in `store`, under (block that they enter, stream, batch); a stream is one version of the rows."""

    walk: Walk
    rows: list[Row]
    groups: list[list[int]]
    store: RowStore

    def get(self, block: int, stream: str, batch: int) -> torch.Tensor:
        """Hidden rows [N, T, H] that enter `block`, on the device."""
        return self.store.get(block, stream, batch).to(self.walk.device)

    def embed(self, *streams: str) -> None:
        """Store the hidden rows that enter block 0, the same for each stream."""
        embedder = Embedder(self.walk, self.rows)
        for k, numbers in enumerate(self.groups):
            hidden = embedder.batch(numbers)
            for stream in streams:
                self.store.put(0, stream, k, hidden)

    def forward(self, block: Block, stream: str, into: str | None = None) -> None:
        """All batches of a stream through a block; the output is stored as the stream `into`, by default its own."""
        for k in range(len(self.groups)):
            hidden = self.get(block.index, stream, k)
            self.store.put(block.index + 1, into or stream, k, block.forward(hidden))
            self.walk.step.advance(hidden.shape[0] * hidden.shape[1])
