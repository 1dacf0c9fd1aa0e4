"""Second moments of a site's real inputs, per expert; an expert with few rows borrows from its layer.

    S_e  = sum of w x x^T / sum of w over the n_e rows that expert e got        (fp32)
    S    = the same over all experts of the layer                               (the pooled moment)
    S_e* = (n_e S_e + tau S) / (n_e + tau),   tau = shrinkage * inputs

So an expert with many rows keeps its own statistics, and one with none takes the layer's. An expert's matrix is
singular only if the layer's is. No expert is fed a row that its router does not send to it. The weights w are 1 unless
the caller knows which tokens an error hurts more.

The x are the quantized stream's. A second sum takes what they miss of the reference stream,

    M_e* = n_e / (n_e + tau) * sum of w m x^T / sum of w,

where the sum of m x^T runs over the tokens with the same route in both streams. m is the reference stream minus the
quantized one, at the site's input or at the block's output. quantize/correction.py uses it.

Sites of gates and ups keep a third sum, K = sum of w v v^T over the slopes v that quantize/metric.py defines. It is
averaged and shrunk like S, with tau = shrinkage * size of K.

Shape legend: E experts, I inputs, X rows of the miss, P slopes, R rows of an expert, S rows of all experts, one below
the other.
"""

import torch

from ..core.finite import first_nonfinite, nonfinite_error
from ..core.products import add_outer, add_outers


def scaled(rows_RI: torch.Tensor, weight_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows by the root of their weights, in this dtype. Products of two such rows carry the weight once.

    On a GPU it is the walk's dtype, bf16 as a rule: one product then does for a moment, which stays symmetric. Rounding
    here adds to the rows what their own rounding has added already (benchmarks/moment_error.py)."""
    return (rows_RI * weight_R.sqrt()[:, None]).to(dtype)


class SiteMoments:
    """Running sums for one site, fp32 on `device`. `miss_rows`, `slopes`: sizes of the other sums, 0 for none."""

    def __init__(self, experts: int, inputs: int, device: torch.device, miss_rows: int = 0, slopes: int = 0) -> None:
        self.sum_EII = torch.zeros(experts, inputs, inputs, dtype=torch.float32, device=device)
        self.miss_EXI = torch.zeros(experts, miss_rows, inputs, device=device) if miss_rows else None
        self.slope_EPP = torch.zeros(experts, slopes, slopes, device=device) if slopes else None
        self.weight_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.rows: list[int] = [0] * experts

    def add(self, expert: int, x_RI: torch.Tensor, weight_R: torch.Tensor | None = None) -> None:
        """Adds rows that `expert` reads; `weight_R` fp32, positive, or None for ones."""
        # Weights multiply one side, which becomes fp32; the other keeps the dtype of the rows.
        add_outer(self.sum_EII[expert], x_RI if weight_R is None else x_RI * weight_R[:, None], x_RI)
        self.weight_E[expert] += len(x_RI) if weight_R is None else weight_R.sum(dtype=torch.float64)
        self.rows[expert] += len(x_RI)

    def add_miss(
        self, expert: int, x_RI: torch.Tensor, miss_RX: torch.Tensor, weight_R: torch.Tensor | None = None
    ) -> None:
        """Adds rows that both streams send to `expert`; `miss_RX` has the same tokens in the same order."""
        assert self.miss_EXI is not None
        add_outer(self.miss_EXI[expert], miss_RX if weight_R is None else miss_RX * weight_R[:, None], x_RI)

    def add_all(self, rows: list[int], scaled_SI: torch.Tensor, weight_S: torch.Tensor) -> None:
        """`add` for all experts: the first rows[0] of `scaled_SI` are the first expert's, and so on. Rows are scaled by
        the roots of their weights (`scaled`)."""
        add_outers(self.sum_EII, scaled_SI, scaled_SI, rows)
        self.weight_E += torch.stack([weight.sum(dtype=torch.float64) for weight in weight_S.split(rows)])
        self.rows = [before + more for before, more in zip(self.rows, rows, strict=True)]

    def add_all_misses(self, rows: list[int], scaled_SI: torch.Tensor, scaled_miss_SX: torch.Tensor) -> None:
        """`add_miss` for all experts."""
        assert self.miss_EXI is not None
        add_outers(self.miss_EXI, scaled_miss_SX, scaled_SI, rows)

    def add_slopes(self, expert: int, v_RP: torch.Tensor, weight_R: torch.Tensor | None = None) -> None:
        """Adds the slopes of rows that `add` got, with the same weights."""
        assert self.slope_EPP is not None
        add_outer(self.slope_EPP[expert], v_RP if weight_R is None else v_RP * weight_R[:, None], v_RP)

    def refuse_nonfinite(self, original: bool, where: str, by_expert: bool) -> None:
        """Raises UnusableModelError or NonfiniteError for sums that are not finite. `where` the site stands; with
        `by_expert` its entries are experts."""
        sums = (self.sum_EII, self.miss_EXI, self.slope_EPP, self.weight_E)
        expert = first_nonfinite(*(each for each in sums if each is not None))
        if expert is not None:
            which = f", expert {expert}" if by_expert else ""
            raise nonfinite_error(original, f"{where}{which}: the second moment of what it reads")

    def _tau(self, shrinkage: float, size: int) -> float:
        return shrinkage * size if len(self.rows) > 1 else 0.0

    def _rows(self, experts: slice) -> torch.Tensor:
        return torch.tensor(self.rows[experts], dtype=torch.float32, device=self.sum_EII.device)[:, None, None]

    def _mean(self, sums: torch.Tensor, experts: slice) -> torch.Tensor:
        """Sums divided by the sum of the weights; zero for an expert without rows."""
        weight = self.weight_E[experts].float()[:, None, None]
        return (sums / weight).masked_fill_(weight <= 0, 0.0)

    def shrunk(self, shrinkage: float, experts: slice) -> torch.Tensor:
        """S_e* [E', I, I] of the given experts."""
        return self._shrunk(self.sum_EII, shrinkage, experts)

    def slopes(self, shrinkage: float, experts: slice) -> torch.Tensor:
        """K_e* [E', P, P] of the given experts."""
        assert self.slope_EPP is not None
        return self._shrunk(self.slope_EPP, shrinkage, experts)

    def _shrunk(self, sums_ENN: torch.Tensor, shrinkage: float, experts: slice) -> torch.Tensor:
        size = sums_ENN.shape[-1]
        if sum(self.rows) == 0:  # no rows in the layer: the identity, with which GPTQ is round-to-nearest
            eye = torch.eye(size, device=sums_ENN.device)
            return eye.expand(len(self.rows[experts]), size, size).clone()
        own, tau = self._mean(sums_ENN[experts], experts), self._tau(shrinkage, size)
        if tau == 0.0:
            return own
        rows, pooled = self._rows(experts), sums_ENN.sum(0) / self.weight_E.sum().float()
        return own.mul_(rows).add_(pooled.mul_(tau)).div_(rows + tau)

    def miss(self, shrinkage: float, experts: slice) -> torch.Tensor | None:
        """M_e* [E', X, I] of the given experts; None where misses were not taken."""
        if self.miss_EXI is None:
            return None
        rows = self._rows(experts)
        tau = self._tau(shrinkage, self.sum_EII.shape[-1])
        return self._mean(self.miss_EXI[experts], experts).mul_(rows).div_((rows + tau).clamp_min(1))
