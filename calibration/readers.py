"""Who reads the residual stream after a block, and how much of an error there each of them sees.

A metric of three parts with equal traces: every direction alike (attention and experts to come), the head, and the
routers of later blocks, which all read the stream through a norm's weight. A router is worth a part of its own: a token
that it sends to another expert is the worst error of all.

Shape legend: H hidden size, V vocabulary, E experts.
"""

from collections.abc import Callable

import torch

from ..core.tensors import TensorSource
from ..models.adapter import Adapter, read

# (weight [O, H], norm's weight [H], share of each output [O]) -> [H, H] of trace H: quantize/metric.py's reader_metric.
ReaderMetric = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Readers:
    """Reads routers, norms and head of `source` once. `counts_V`: how often each token occurs in the calibration rows,
    which stands for the head's softmax."""

    def __init__(
        self,
        adapter: Adapter,
        source: TensorSource,
        counts_V: torch.Tensor,
        metric: ReaderMetric,
        device: torch.device,
    ) -> None:
        self.metric, self.device = metric, device

        def reader(norm: str, matrix: str) -> tuple[torch.Tensor, torch.Tensor]:
            return read(adapter, source, matrix).to(device), read(adapter, source, norm).to(device, torch.float32)

        # One more than was counted: a token that calibration lacks may still be said.
        share_V = (counts_V + 1).to(device, torch.float32)
        self.head_HH = metric(*reader(adapter.norm_name, adapter.head_name), share_V / share_V.sum())
        self.routers = {}
        for block in range(adapter.n_blocks):
            site = adapter.router_site(block)
            if site is not None:
                norm = f"{adapter.block_prefix(block)}{adapter.middle_norm}.weight"
                self.routers[block] = reader(norm, f"{site.members[0][0]}.weight")
        self._block, self._total = -1, torch.empty(0)

    def of(self, block: int) -> torch.Tensor:
        """M [H, H] fp32 for errors that `block` adds to the residual stream."""
        if block != self._block:  # one is kept: it is asked for once for every cut of a site
            self._block, self._total = block, self.head_HH.clone()
            self._total.diagonal().add_(1.0)
            later = [reader for index, reader in self.routers.items() if index > block]
            for router, norm in later:
                share = torch.full((len(router),), 1.0 / len(router), device=self.device)
                self._total += self.metric(router, norm, share) / len(later)
        return self._total
