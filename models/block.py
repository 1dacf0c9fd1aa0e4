"""One decoder layer with its weights: run whole or by halves, its inputs watched, its weights reached by name.

The layer is transformers' own, with RoutedExperts for its experts. A Block knows its number, its adapter and the
keyword arguments of its layer, so whoever has one needs nothing else to run it. Loading is models/walk.py's.

Shape legend: N rows, T tokens a row (of routes: of the whole batch), H hidden size, K top-k, R rows of one expert.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.finite import (
    all_finite,
    all_true,
    count_nonfinite,
    finite_flags,
    first_nonfinite,
    nonfinite_error,
    row_flags,
)
from .adapter import Adapter, Half, Site
from .calls import Calls
from .experts import RoutedExperts
from .watched import Watched

# (site, expert, token numbers [R] rising, rows [R, in], what multiplies the expert's outputs [R, 1] or None); a site
# without experts has the expert 0 and None.
Observe = Callable[[Site, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def find_experts(layer: nn.Module) -> RoutedExperts | None:
    """The layer's RoutedExperts, if it has experts."""
    return next((m for m in layer.modules() if isinstance(m, RoutedExperts)), None)


@dataclass(frozen=True)
class Passed:
    """What a pass gives: the hidden rows [N, T, H] that leave it, and the experts of each token, rising, int64 [T, K];
    None where no experts ran."""

    hidden: torch.Tensor
    routes_TK: torch.Tensor | None


class _Silent(nn.Module):
    """Takes the place of one half of a block and returns zeros, with a second value where the half returns one."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


@dataclass(frozen=True)
class Block:
    """A loaded decoder layer. `layer` can be written to: its weights are tuned, rounded and exchanged in place."""

    adapter: Adapter
    index: int
    layer: nn.Module
    calls: Calls
    # Whether the weights are the original's, and the rows that go through too: whose fault it is what is not finite.
    original: bool = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.adapter.sites(self.index)

    @property
    def experts(self) -> RoutedExperts | None:
        return find_experts(self.layer)

    def copy(self) -> "Block":
        """The block with weights of its own, to be quantized."""
        return replace(self, layer=copy.deepcopy(self.layer), original=False)

    def for_quantized_rows(self) -> "Block":
        """The same block for rows that a quantized block gave."""
        return replace(self, original=False)

    def marks(self) -> tuple[int, ...]:
        """Two sums over the bits of each weight, one of them weighted by the row. Whoever writes to a weight changes
        them, but for a deliberate choice."""
        sums = []
        for weight in self.layer.state_dict().values():
            bits = _as_integers(weight.detach().reshape(weight.shape[0] if weight.dim() else 1, -1).contiguous())
            by_row = bits.sum(-1, dtype=torch.int64)
            sums += [by_row.sum(), (by_row * torch.arange(1, len(by_row) + 1, device=by_row.device)).sum()]
        return tuple(torch.stack(sums).tolist()) if sums else ()

    def module(self, name: str) -> nn.Module:
        """The module with this canonical name; experts are none (see `weight`)."""
        return self.layer.get_submodule(name.removeprefix(self.adapter.block_prefix(self.index)))

    def norm(self, name: str) -> nn.Module:
        """The norm with this name inside the layer (`Adapter.first_norm`, `middle_norm`)."""
        return self.layer.get_submodule(name)

    def weight(self, name: str) -> torch.Tensor:
        """A view `[out, in]`, writable in place, of the weight of the module with this canonical name."""
        if ".experts." in name:
            assert self.experts is not None
            expert, projection = name.rsplit(".", 2)[-2:]
            return self.experts.weight(int(expert), projection)
        weight = self.module(name).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def refuse_nonfinite_weights(self) -> None:
        """Raises UnusableModelError or NonfiniteError that names the first weight that is not finite."""
        weights = dict(self.layer.named_parameters())
        if all_finite(*weights.values()):
            return
        experts, where = self.experts, f"block {self.index}"
        expert = None if experts is None else first_nonfinite(experts.gate_up, experts.down)
        if expert is not None:
            raise nonfinite_error(self.original, f"{where}, {Half.FEED_FORWARD.said}, the weights of expert {expert}")
        name = next(name for name, weight in weights.items() if not all_finite(weight))
        attends = name.startswith((self.adapter.half_modules[Half.ATTENTION], self.adapter.first_norm))
        half = Half.ATTENTION if attends else Half.FEED_FORWARD
        raise nonfinite_error(self.original, f"{where}, {half.said}, the weight {name}")

    def joined(self, member: tuple[str, ...]) -> torch.Tensor:
        """The weights of one entry of a site, one below the other [O, I], in the dtype in which they are held. An
        expert's are not copied."""
        if self.experts is not None and ".experts." in member[0] and len(member) == 2:
            return self.experts.gate_up[int(member[0].rsplit(".", 2)[-2])]
        weights = [self.weight(name) for name in member]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def stacked(self, member: tuple[str, ...]) -> torch.Tensor:
        """The weights of one entry of a site, stacked along the outputs; fp32 [O, I]."""
        return torch.cat([self.weight(name).float() for name in member])

    def forward(self, hidden_NTH: torch.Tensor, half: Half | None = None) -> torch.Tensor:
        """A batch through the block, or through one of its halves; in inference mode. Raises UnusableModelError or
        NonfiniteError when a number that leaves it is not finite; so do the other passes."""
        with torch.inference_mode():
            return self._call(hidden_NTH, half)

    def routed(self, hidden_NTH: torch.Tensor, half: Half | None = None) -> Passed:
        """As `forward`, with the routes."""
        with torch.inference_mode():
            return self._routed(hidden_NTH, half)

    def differentiable(self, hidden_NTH: torch.Tensor, half: Half | None = None) -> Passed:
        """As `routed`, with a graph for autograd."""
        with torch.enable_grad():
            return self._routed(hidden_NTH, half)

    def _call(self, hidden_NTH: torch.Tensor, half: Half | None) -> torch.Tensor:
        out, sound = self._called(hidden_NTH, half)
        if not sound:
            raise nonfinite_error(self.original, self._fault(hidden_NTH.detach(), half))
        return out

    def _fault(self, hidden_NTH: torch.Tensor, half: Half | None) -> str:
        """Where a pass that is not finite went wrong: half by half, and in the feed-forward half expert by expert."""
        if not all_true(row_flags(hidden_NTH)):
            return f"what enters block {self.index}"
        for part in Half if half is None else [half]:
            with torch.no_grad(), self._looked_at() as experts:
                hidden_NTH, sound = self._called(hidden_NTH, part)
            if not sound:
                which = f", expert {experts[0]}" if experts else ""
                return f"block {self.index}, {part.said}{which} gives {count_nonfinite(hidden_NTH)}"
        return f"what leaves block {self.index}"

    @contextmanager
    def _looked_at(self) -> Iterator[list[int]]:
        """While open, the yielded list gets the experts whose outputs are not finite although their inputs are."""
        found: list[int] = []
        experts = self.experts
        if experts is None:
            yield found
            return
        known, sound = experts.observer, set[int]()

        def look(matrix: str, expert: int, _tokens: torch.Tensor, rows: torch.Tensor, *_: object) -> None:
            if matrix == "gate_up":
                sound.update({expert} if all_finite(rows) else ())
            elif expert in sound:
                out = F.linear(rows, experts.down[expert].to(rows.dtype))
                found.extend([] if all_true(finite_flags(rows) + row_flags(out)) else [expert])

        experts.observer = look
        try:
            yield found
        finally:
            experts.observer = known

    def _called(self, hidden_NTH: torch.Tensor, half: Half | None) -> tuple[torch.Tensor, bool]:
        """The rows [N, T, H] that leave, and whether they and what the layer hides are finite: one look a batch."""
        with Watched(self._router) as watched, self._only(half) if half is not None else nullcontext():
            out = self.layer(hidden_NTH, **self.calls.of(self.index, hidden_NTH.shape[1]))
        out = out[0] if isinstance(out, tuple) else out
        return out, all_true(watched.flags + row_flags(out))

    @property
    def _router(self) -> torch.Tensor | None:
        site = self.adapter.router_site(self.index)
        return None if site is None else self.weight(site.first_module)

    def _routed(self, hidden_NTH: torch.Tensor, half: Half | None) -> Passed:
        experts, routes = self.experts, list[torch.Tensor]()
        if experts is None:
            return Passed(self._call(hidden_NTH, half), None)
        experts.tell_routes = routes.append
        try:
            out = self._call(hidden_NTH, half)
        finally:
            experts.tell_routes = None
        return Passed(out, routes[0] if routes else None)

    @contextmanager
    def _only(self, half: Half) -> Iterator[None]:
        """While open, the layer computes one half. Both halves in turn equal the layer to the bit: the silent half adds
        zeros, which change no number."""
        other = Half.FEED_FORWARD if half is Half.ATTENTION else Half.ATTENTION
        name = self.adapter.half_modules[other]
        module = self.layer.get_submodule(name)
        setattr(self.layer, name, _Silent(other is Half.ATTENTION or getattr(module, "gives_logits", False)))
        try:
            yield
        finally:
            setattr(self.layer, name, module)

    @contextmanager
    def exchanged(self, other: "Block", modules: Iterable[str]) -> Iterator["Block"]:
        """While open, this block computes with the named modules of `other`, the same block of another checkpoint. The
        yielded one is this block, no longer the original. Experts are exchanged all together, since they are one
        module."""
        stacks = {name for name, module in self.layer.named_modules() if isinstance(module, RoutedExperts)}
        prefix = self.adapter.block_prefix(self.index)
        local = {name.removeprefix(prefix) for name in modules}
        places = {next((stack for stack in stacks if name.startswith(f"{stack}.")), name) for name in local}
        own = {place: self.layer.get_submodule(place) for place in places}
        for place in places:
            self.layer.set_submodule(place, other.layer.get_submodule(place))
        try:
            yield self.for_quantized_rows()
        finally:
            for place, module in own.items():
                self.layer.set_submodule(place, module)

    @contextmanager
    def observed(self, observe: Observe) -> Iterator[None]:
        """While open, `observe` gets the inputs of every site that runs."""
        sites = {site.key: site for site in self.sites}
        handles = []
        for site in sites.values():
            if ".experts." in site.key:
                continue

            def hook(_module: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])
                observe(site, 0, torch.arange(len(rows), device=rows.device), rows, None)

            handles.append(self.module(site.first_module).register_forward_pre_hook(hook))
        experts = self.experts
        if experts is not None:
            by_input = {key.rpartition(".")[2]: site for key, site in sites.items() if ".experts." in key}
            experts.observer = lambda name, *seen: observe(by_input[name], *seen)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if experts is not None:
                experts.observer = None


def _as_integers(rows: torch.Tensor) -> torch.Tensor:
    """The bits of rows [R, B], read as the widest integers that fit into a row: a CPU adds int64 sixty times as fast as
    int16, which it has to widen one by one."""
    spare = (rows.shape[1] | int(rows.storage_offset())) * rows.dtype.itemsize
    return rows.view(next(dtype for dtype in _INTEGERS if spare % dtype.itemsize == 0))
