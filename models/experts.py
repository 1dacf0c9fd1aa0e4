"""RoutedExperts: every expert computes its own rows and no others.

transformers computes all experts on all rows (Llama 4) or loops with a boolean mask. Here tokens are sorted by expert
once and each expert multiplies its own slice, so the work of a layer grows with tokens x top-k. Whatever the
checkpoint's layout, weights lie in two stacks `[E, out, in]`: one of gates and ups, one of downs. Their dtype may be
narrower than that of the rows; an expert is widened while it computes.

Shape legend: T tokens, K top-k, E experts, H hidden size, M expert intermediate size, R rows routed to one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# Gets the input of an expert's matrix: ('gate_up' or 'down', expert, token numbers [R] rising, rows [R, in]).
Observer = Callable[[str, int, torch.Tensor, torch.Tensor], None]


class RoutedExperts(nn.Module):
    """SwiGLU experts. `scale_input`: the routing weight multiplies the expert's input (Llama 4), not its output (Qwen3
    and most others). The two differ, since SwiGLU is not homogeneous."""

    def __init__(self, n_experts: int, hidden: int, intermediate: int, scale_input: bool) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * intermediate, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(n_experts, hidden, intermediate), requires_grad=False)
        self.intermediate = intermediate
        self.scale_input = scale_input
        self.observer: Observer | None = None
        self.tell_routes: Callable[[torch.Tensor], None] | None = (
            None  # gets each token's experts, rising, int64 [T, K]
        )

    def weight(self, expert: int, projection: str) -> torch.Tensor:
        """A view `[out, in]` of one expert's 'gate_proj', 'up_proj' or 'down_proj' (Mixtral's 'w1', 'w3' and 'w2')."""
        match projection:
            case "gate_proj" | "w1":
                return self.gate_up[expert, : self.intermediate]
            case "up_proj" | "w3":
                return self.gate_up[expert, self.intermediate :]
            case "down_proj" | "w2":
                return self.down[expert]
        raise AssertionError(projection)

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs [T, H]; `experts_TK` int64 and `weights_TK` are the router's choice.

        On the meta device there is no choice to go by, and the result has a shape and no values.
        """
        if x_TH.is_meta:
            return torch.empty_like(x_TH)
        top_k = experts_TK.shape[1]
        if self.tell_routes is not None:
            self.tell_routes(experts_TK.sort(-1).values)
        flat_experts = experts_TK.reshape(-1)
        # A stable sort: equal inputs give equal bytes, whatever the sort's algorithm.
        order = torch.argsort(flat_experts, stable=True)
        counts = torch.bincount(flat_experts, minlength=self.gate_up.shape[0]).tolist()
        token = order // top_k
        weight = weights_TK.reshape(-1)[order].unsqueeze(-1)
        out_TH = torch.zeros_like(x_TH)
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            rows = slice(start, start + count)
            start += count
            x_RH = x_TH[token[rows]]
            if self.scale_input:
                x_RH = x_RH * weight[rows]
            if self.observer is not None:
                self.observer("gate_up", expert, token[rows], x_RH)
            gate_RM, up_RM = F.linear(x_RH, self.gate_up[expert].to(x_RH.dtype)).chunk(2, dim=-1)
            h_RM = F.silu(gate_RM) * up_RM
            if self.observer is not None:
                self.observer("down", expert, token[rows], h_RM)
            y_RH = F.linear(h_RM, self.down[expert].to(h_RM.dtype))
            if not self.scale_input:
                # Some families have fp32 routing weights, whatever the rows are.
                y_RH = (y_RH * weight[rows]).to(out_TH.dtype)
            out_TH.index_add_(0, token[rows], y_RH)
        return out_TH
