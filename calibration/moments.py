"""Second moments of what each site really reads, per expert, and what an expert with few rows borrows.

    S_e  = (1 / n_e) sum of x x^T over the n_e rows that expert e got            (fp32)
    S    = the same over all experts of the layer                               (the pooled moment)
    S_e* = (n_e S_e + tau S) / (n_e + tau),   tau = shrinkage * inputs

So an expert with many rows keeps its own statistics, one with none takes the layer's, and none has a singular matrix
while its layer has not. A row never feeds an expert that would not get it.

Shape legend: E experts, I inputs, R rows.
"""

import torch


class SiteMoments:
    """Running sums for one site; kept on the device that computes them."""

    def __init__(self, experts: int, inputs: int, device: torch.device) -> None:
        self.sum_EII = torch.zeros(experts, inputs, inputs, dtype=torch.float32, device=device)
        self.rows: list[int] = [0] * experts

    def add(self, expert: int, x_RI: torch.Tensor) -> None:
        x = x_RI.float()
        self.sum_EII[expert].addmm_(x.T, x)
        self.rows[expert] += len(x)

    def shrunk(self, shrinkage: float, experts: slice) -> torch.Tensor:
        """S_e* [E', I, I] of the given experts, by the formula at the head of this file."""
        inputs = self.sum_EII.shape[-1]
        total = sum(self.rows)
        if total == 0:  # the layer saw nothing: white inputs, for which GPTQ is round-to-nearest
            eye = torch.eye(inputs, device=self.sum_EII.device)
            return eye.expand(len(self.rows[experts]), inputs, inputs).clone()
        tau = shrinkage * inputs if len(self.rows) > 1 else 0.0
        own = self.sum_EII[experts]
        rows = torch.tensor(self.rows[experts], dtype=torch.float32, device=own.device)[:, None, None]
        if tau == 0.0:
            return own / rows.clamp_min(1)
        pooled = self.sum_EII.sum(0) / total
        return (own + tau * pooled) / (rows + tau)
