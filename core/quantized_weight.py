"""QuantizedWeight: the only thing that passes from a quantization method to a file format.

A method of quantize/ decides the codes once; no format rounds again and no method packs bits. bitsandbytes quantizes
and stores in one step, so a weight on one of its grids has no QuantizedWeight.
Shape legend: B batch (experts), O output features, I input features, G groups along I (I / group size).
"""

from dataclasses import dataclass

import torch

from .scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes with their scales. A leading batch axis B (experts of equal shape) is allowed everywhere.

    codes: int8 [(B,) O, I], within [code_min, code_max]
    scales: the stored dtype [(B,) O, G]
    zero_points: int8 [(B,) O, G], or None when the scheme is symmetric
    The weight is `(code - zero_point) * scale`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.int8
        assert self.scales.shape == (*self.codes.shape[:-1], self.scheme.groups(self.codes.shape[-1]))
        assert (self.zero_points is None) == self.scheme.symmetric

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [(B,) O, I] in `dtype`, multiplied in fp32 and rounded once."""
        grouped = self.codes.unflatten(-1, (self.scales.shape[-1], -1)).to(torch.float32)
        if self.zero_points is not None:
            grouped = grouped - self.zero_points.to(torch.float32).unsqueeze(-1)
        return (grouped * self.scales.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)

    def item(self, index: int, rows: slice) -> "QuantizedWeight":
        """One matrix out of a batch, and of it the given rows (gate and up are quantized as one matrix)."""
        zero = None if self.zero_points is None else self.zero_points[index, rows]
        return QuantizedWeight(self.codes[index, rows], self.scales[index, rows], zero, self.scheme)
