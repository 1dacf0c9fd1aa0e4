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
        self.hidden, self.device = adapter.hidden_size, device

        def reader(norm: str, matrix: str, count_O: torch.Tensor) -> torch.Tensor:
            share_O = count_O.to(device, torch.float32)
            norm_H = read(adapter, source, norm).to(device, torch.float32)
            return metric(read(adapter, source, matrix).to(device), norm_H, share_O / share_O.sum())

        # One more than was counted: a token that calibration lacks may still be said.
        self.head_HH = reader(adapter.norm_name, adapter.head_name, counts_V + 1)
        self.router_HH: dict[int, torch.Tensor] = {}
        for block in range(adapter.n_blocks):
            names = adapter.router_reading(block)
            if names is not None:
                self.router_HH[block] = reader(*names, torch.ones(adapter.n_experts))

    def of(self, block: int) -> torch.Tensor:
        """M [H, H] fp32 for errors that `block` adds to the residual stream."""
        total = torch.eye(self.hidden, device=self.device) + self.head_HH
        later = [metric for index, metric in self.router_HH.items() if index > block]
        return total + torch.stack(later).mean(0) if later else total
