"""The walk: any model of a known family, one block at a time, from a TensorSource.

A decoder layer of transformers is built on the meta device, its weights are put in from the source, rows go through it,
and it is freed; never more than one block's weights are in memory. What a layer is called with (masks, positions,
rotary tables) is not written again here: the family's own text model makes it once, on stub layers that record it.
The walk makes no key-value cache and never pads: a batch holds rows of one length.

Shape legend: N rows, T tokens a row, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.rows import Row, RowStore
from ..core.tensors import TensorSource
from .adapter import Adapter, Half, Site, read, stored_dtype
from .experts import RoutedExperts
from .meta import materialize_buffers

# (site, expert, token numbers [R] rising, rows [R, in]); the expert is 0 at a site that is no expert site.
Observe = Callable[[Site, int, torch.Tensor, torch.Tensor], None]


class _Recorder(nn.Module):
    """Stands for a decoder layer and keeps the keyword arguments it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kwargs = kwargs
        return hidden


class Calls:
    """For rows of each length, the keyword arguments that every block is called with (they broadcast over rows)."""

    def __init__(self, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> None:
        self.adapter, self.device, self.dtype = adapter, device, dtype
        self._model = adapter.text_skeleton()
        rotary = self._model.get_submodule("rotary_emb")
        # Its tables are computed when it is built, so on the meta device they have no values.
        materialize_buffers(rotary, type(rotary)(config=adapter.text_config).to(device))
        self._recorders = [_Recorder() for _ in range(adapter.n_blocks)]
        self._model.layers = nn.ModuleList(self._recorders)
        self._model.norm = nn.Identity()
        self._known: dict[int, list[dict[str, Any]]] = {}

    def of(self, tokens: int) -> list[dict[str, Any]]:
        """One dict a block, for rows of `tokens` tokens."""
        if tokens not in self._known:
            empty = torch.zeros(1, tokens, self.adapter.hidden_size, device=self.device, dtype=self.dtype)
            with torch.no_grad():  # not inference_mode: a walk with gradients is called with them too
                self._model(inputs_embeds=empty, use_cache=False)
            self._known[tokens] = [recorder.kwargs for recorder in self._recorders]
        return self._known[tokens]


def expert_stacks(block: nn.Module) -> RoutedExperts | None:
    """The block's RoutedExperts, if it has experts."""
    return next((m for m in block.modules() if isinstance(m, RoutedExperts)), None)


def weight_view(adapter: Adapter, block: nn.Module, index: int, module_name: str) -> torch.Tensor:
    """A view `[out, in]`, writable in place, of a canonical module's weight inside a loaded block."""
    local = module_name.removeprefix(adapter.block_prefix(index))
    if ".experts." in local:
        stacks = expert_stacks(block)
        assert stacks is not None
        expert, projection = local.rsplit(".", 2)[-2:]
        return stacks.weight(int(expert), projection)
    weight = block.get_submodule(local).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _narrower(adapter: Adapter, source: TensorSource, index: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the block's experts are stored in, or `dtype` if that is no wider."""
    name = next(name for _, name, _, _ in adapter.modules(index) if ".experts." in name)
    stored = stored_dtype(adapter, source, f"{name}.weight")
    return stored if stored.itemsize < dtype.itemsize else dtype


def load_block(
    adapter: Adapter, source: TensorSource, index: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Block `index` with its weights on `device` in `dtype`, read expert by expert.

    Expert stacks stay in the checkpoint's dtype when that is the narrower one, and are widened one expert at a time
    when they are used: an fp32 walk over a bf16 model then needs half the memory.
    """
    block = adapter.build_block(index)
    stacks = expert_stacks(block)
    prefix = adapter.block_prefix(index)
    expert_parameters = {id(p) for p in stacks.parameters()} if stacks else set()
    for name, parameter in list(block.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if id(parameter) in expert_parameters:
            value = torch.empty(parameter.shape, device=device, dtype=_narrower(adapter, source, index, dtype))
        else:
            value = read(adapter, source, prefix + name).to(device, dtype)
        setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    # Stored numbers that are no weights (the bias that a router ranks with) keep their dtype.
    for name in block.state_dict().keys() - dict(block.named_parameters()).keys():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, read(adapter, source, prefix + name).to(device))
    if stacks is not None:
        for _, module_name, _, _ in adapter.modules(index):
            if ".experts." in module_name:
                view = weight_view(adapter, block, index, module_name)
                view.copy_(read(adapter, source, f"{module_name}.weight"))
    return block


class _Silent(nn.Module):
    """Stands for one half of a block and adds nothing: zeros, with a second value where the half gives one."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


@contextmanager
def only(adapter: Adapter, block: nn.Module, half: Half) -> Iterator[None]:
    """While open, the block computes one half alone. One after the other they give what the block gives, to the bit,
    since adding zeros changes nothing."""
    other = Half.FEED_FORWARD if half is Half.ATTENTION else Half.ATTENTION
    name = adapter.half_modules[other]
    module = block.get_submodule(name)
    setattr(block, name, _Silent(other is Half.ATTENTION or getattr(module, "gives_logits", False)))
    try:
        yield
    finally:
        setattr(block, name, module)


@contextmanager
def exchanged(
    adapter: Adapter, block: nn.Module, other: nn.Module, index: int, modules: Iterable[str]
) -> Iterator[None]:
    """While open, `block` computes with the named modules of `other`, the same block of another checkpoint. Experts are
    exchanged all together, since they are one module."""
    stacks = {name for name, module in block.named_modules() if isinstance(module, RoutedExperts)}
    prefix = adapter.block_prefix(index)
    local = {name.removeprefix(prefix) for name in modules}
    places = {next((stack for stack in stacks if name.startswith(f"{stack}.")), name) for name in local}
    own = {place: block.get_submodule(place) for place in places}
    for place in places:
        block.set_submodule(place, other.get_submodule(place))
    try:
        yield
    finally:
        for place, module in own.items():
            block.set_submodule(place, module)


def run_block(block: nn.Module, hidden_NTH: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """One block over a batch of rows."""
    with torch.inference_mode():
        out = block(hidden_NTH, **call)
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def observed(adapter: Adapter, block: nn.Module, index: int, observe: Observe) -> Iterator[None]:
    """While open, `observe(site, expert, tokens [R], rows [R, in])` is called with every site's real inputs."""
    sites: dict[str, Site] = {site.key: site for site in adapter.sites(index)}
    handles = []
    for site in sites.values():
        if ".experts." in site.key:
            continue
        local = site.members[0][0].removeprefix(adapter.block_prefix(index))

        def hook(_module: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            observe(site, 0, torch.arange(len(rows), device=rows.device), rows)

        handles.append(block.get_submodule(local).register_forward_pre_hook(hook))
    stacks = expert_stacks(block)
    if stacks is not None:
        by_input = {key.rpartition(".")[2]: site for key, site in sites.items() if ".experts." in key}
        stacks.observer = lambda name, expert, tokens, rows: observe(by_input[name], expert, tokens, rows)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if stacks is not None:
            stacks.observer = None


class Embedder:
    """Token rows -> hidden rows, images included. Loads the embedding and runs the vision tower once."""

    def __init__(
        self, adapter: Adapter, source: TensorSource, rows: list[Row], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.adapter, self.rows, self.device, self.dtype = adapter, rows, device, dtype
        self.table = read(adapter, source, adapter.embedding_name)
        pixels = [row.pixels for row in rows if row.pixels is not None]
        self.features: dict[int, torch.Tensor] = {}
        if pixels:
            features = adapter.image_features(source, torch.cat(pixels), device, dtype)
            start = 0
            for number, row in enumerate(rows):
                if row.pixels is not None:
                    length = len(row.pixels) * adapter.image_token_count()
                    self.features[number] = features[start : start + length]
                    start += length

    def batch(self, numbers: list[int]) -> torch.Tensor:
        """Hidden rows [N, T, H] of rows of one length."""
        input_ids = torch.stack([self.rows[n].tokens for n in numbers])
        hidden = self.table[input_ids].to(self.device, self.dtype)
        for i, number in enumerate(numbers):
            if number in self.features:
                mask = input_ids[i].eq(self.adapter.image_token_id or 0)
                assert int(mask.sum()) == len(self.features[number]), "one feature row for each image placeholder"
                hidden[i, mask.to(self.device)] = self.features[number].to(self.device, self.dtype)
        return hidden


def embed(
    adapter: Adapter,
    source: TensorSource,
    rows: list[Row],
    groups: list[list[int]],
    store: RowStore,
    streams: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put what enters block 0 into the store, for each of the streams."""
    embedder = Embedder(adapter, source, rows, device, dtype)
    for k, numbers in enumerate(groups):
        hidden = embedder.batch(numbers)
        for stream in streams:
            store.put(0, stream, k, hidden)


def final_norm(adapter: Adapter, source: TensorSource, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The family's last norm, loaded."""
    norm = adapter.text_skeleton().get_submodule("norm")
    weight = read(adapter, source, adapter.norm_name).to(device, dtype)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm
