"""RoutedExperts: every expert computes its own rows and no others.

transformers computes all experts on all rows (Llama 4) or loops with a boolean mask. Here tokens are sorted by expert
once and each expert multiplies its own slice, so the work of a layer grows with tokens x top-k. Whatever the
checkpoint's layout, weights lie in two stacks `[E, out, in]`: one of gates and ups, one of downs. Their dtype may be
narrower than that of the rows; an expert is widened while it computes.

Rows go to the experts and come back by index alone, and sums have a fixed order. Nothing is added in an order that a
GPU's threads decide, neither here nor in the backward pass, so equal inputs give equal bytes.

Shape legend: T tokens, K top-k, S = T K slots in the order of the experts, E experts, H hidden size, M expert
intermediate size, R rows routed to one expert.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.device import on_cuda

# Gets the input of an expert's matrix: ('gate_up' or 'down', expert, token numbers [R] rising, rows [R, in], and what
# multiplies the expert's outputs, [R, 1]; None where the routing weights multiply its inputs).
Observer = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


def _sum_slots(slots_SH: torch.Tensor, place_TK: torch.Tensor, falling: bool) -> torch.Tensor:
    """[T, H]: the sum of each token's slots, one by one, with the experts rising or falling."""
    places = place_TK.unbind(-1)[:: -1 if falling else 1]
    out_TH = slots_SH[places[0]]
    for place_T in places[1:]:
        out_TH += slots_SH[place_T]
    return out_TH


class _Dispatch(torch.autograd.Function):
    """[S, H]: each slot's token. The gradients of a token's slots are added up as autograd would add those of experts
    that are indexed one by one: the last expert first."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, token_S: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_TK)
        return x_TH[token_S]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _sum_slots(gradients[0], ctx.saved_tensors[0], falling=True), None, None


class _Combine(torch.autograd.Function):
    """[T, H]: the sum of each token's slots."""

    @staticmethod
    def forward(ctx: Any, y_SH: torch.Tensor, token_S: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_S)
        return _sum_slots(y_SH, place_TK, falling=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


class RoutedExperts(nn.Module):
    """SwiGLU experts. `scale_input`: the routing weight multiplies the expert's input (Llama 4), not its output (Qwen3
    and most others). The two differ, since SwiGLU is not homogeneous."""

    def __init__(self, n_experts: int, hidden: int, intermediate: int, scale_input: bool) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * intermediate, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(n_experts, hidden, intermediate), requires_grad=False)
        self.intermediate = intermediate
        self.scale_input = scale_input
        # By stack, while it is tuned: a leaf for each expert that shares the stack's memory. The backward pass of a
        # slice of the stack would fill a stack with zeros for every expert.
        self.leaves: dict[str, list[torch.Tensor]] = {}
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

    def matrix(self, stack: str, expert: int) -> torch.Tensor:
        """The matrix of one expert that computes, of the stack 'gate_up' or 'down'."""
        if stack in self.leaves:
            return self.leaves[stack][expert]
        return (self.gate_up if stack == "gate_up" else self.down)[expert]

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs [T, H]; `experts_TK` int64 and `weights_TK` are the router's choice.

        On the meta device there is no choice to go by, and the result has a shape and no values.
        """
        if x_TH.is_meta:
            return torch.empty_like(x_TH)
        if self.tell_routes is not None:
            self.tell_routes(experts_TK.sort(-1).values)
        flat_experts = experts_TK.reshape(-1)
        # A stable sort: equal inputs give equal bytes, whatever the sort's algorithm.
        order_S = torch.argsort(flat_experts, stable=True)
        counts = torch.bincount(flat_experts, minlength=self.gate_up.shape[0]).tolist()
        token_S = order_S // experts_TK.shape[1]
        # Slots are in the order of the experts, so a token's slots in rising order have rising experts.
        slot_TK = torch.argsort(order_S).view_as(experts_TK)
        place_TK = slot_TK.sort(-1).values
        weights = _Dispatch.apply(weights_TK.reshape(-1, 1), order_S, slot_TK.view(-1, 1)).split(counts)
        tokens = token_S.split(counts)
        given = _Dispatch.apply(x_TH, token_S, place_TK).split(counts) if on_cuda(x_TH) or x_TH.requires_grad else None
        ran = [expert for expert, count in enumerate(counts) if count]
        found = (
            self._expert(
                expert, tokens[expert], weights[expert], x_TH[tokens[expert]] if given is None else given[expert]
            )
            for expert in ran
        )
        if on_cuda(x_TH) or torch.is_grad_enabled():
            out_TH: torch.Tensor = _Combine.apply(torch.cat(list(found)), token_S, place_TK)
        else:  # A CPU adds in order by itself, in less memory.
            out_TH = torch.zeros_like(x_TH)
            for expert, y_RH in zip(ran, found, strict=True):
                out_TH.index_add_(0, tokens[expert], y_RH)
        return out_TH

    def _expert(self, expert: int, token_R: torch.Tensor, weight_R1: torch.Tensor, x_RH: torch.Tensor) -> torch.Tensor:
        """What one expert makes of its rows, [R, H]."""
        if self.scale_input:
            x_RH = x_RH * weight_R1
        after = None if self.scale_input else weight_R1
        if self.observer is not None:
            self.observer("gate_up", expert, token_R, x_RH, after)
        gate_RM, up_RM = F.linear(x_RH, self.matrix("gate_up", expert).to(x_RH.dtype)).chunk(2, dim=-1)
        h_RM = F.silu(gate_RM) * up_RM
        if self.observer is not None:
            self.observer("down", expert, token_R, h_RM, after)
        y_RH = F.linear(h_RM, self.matrix("down", expert).to(h_RM.dtype))
        # Some families have fp32 routing weights, whatever the rows are.
        return y_RH if after is None else (y_RH * after).to(y_RH.dtype)
