"""Held: the codes of a batch of matrices while they are searched, and the error that they leave.

After GPTQ, every search lowers J = tr(E S E^T), E = W - Q, part by part: a stretch of neighbouring columns changes
while all others stay. Of W a search needs E alone. For a stretch c it needs the slope G_c = (E S)_c, one product [C, I]
x [I, O], and its own moment S_cc: J is a quadratic in what the stretch's values move by, with these two as
coefficients. The slope is computed from E for each stretch, so no error of an update can add up over a search.

Shape legend: B matrices, O outputs (rows), I inputs, C columns of a stretch, G groups. Inputs come before outputs here:
a column is contiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..core.quantized_weight import QuantizedWeight
from ..core.scheme import Scheme
from .card import kernels_for

# Columns of a stretch, and between two updates of all later columns in GPTQ (the paper's lazy batch). Their moment, 64
# KB in fp32, stays in the cache of a CPU's core and in the first-level cache of a GPU's.
BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class Held:
    """Codes, scales and error of a batch. The searches change all three in place."""

    # int8 [B, I, O].
    codes_BIO: torch.Tensor
    # [B, G, O], in the dtype of the error; every scale is a number of `stored`.
    scale_BGO: torch.Tensor
    zero_BGO: torch.Tensor | None
    # W - Q [B, I, O], fp32 or fp64.
    error_BIO: torch.Tensor
    # Columns of a group.
    width: int
    scheme: Scheme
    stored: torch.dtype

    @classmethod
    def of(cls, weight: QuantizedWeight, w_BOI: torch.Tensor) -> "Held":
        zero = weight.zero_points
        return cls(
            codes_BIO=weight.codes.transpose(1, 2).contiguous(),
            scale_BGO=weight.scales.to(w_BOI.dtype).transpose(1, 2).contiguous(),
            zero_BGO=None if zero is None else zero.to(w_BOI.dtype).transpose(1, 2).contiguous(),
            error_BIO=(w_BOI - weight.dequantize(w_BOI.dtype)).transpose(1, 2).contiguous(),
            width=weight.scheme.width(w_BOI.shape[-1]),
            scheme=weight.scheme,
            stored=weight.scales.dtype,
        )

    def weight(self) -> QuantizedWeight:
        zero = None if self.zero_BGO is None else self.zero_BGO.to(torch.int8).transpose(1, 2).contiguous()
        scales = self.scale_BGO.to(self.stored).transpose(1, 2).contiguous()
        return QuantizedWeight(self.codes_BIO.transpose(1, 2).contiguous(), scales, zero, self.scheme)

    def part(self, columns: slice) -> "Held":
        """Whole groups of columns, as views: what changes there changes here. `columns` may also lie inside one
        group."""
        groups = slice(columns.start // self.width, -(-columns.stop // self.width))
        return replace(
            self,
            codes_BIO=self.codes_BIO[:, columns],
            scale_BGO=self.scale_BGO[:, groups],
            zero_BGO=None if self.zero_BGO is None else self.zero_BGO[:, groups],
            error_BIO=self.error_BIO[:, columns],
            width=min(self.width, columns.stop - columns.start),
        )

    def by_column(self, x_BGO: torch.Tensor) -> torch.Tensor:
        """A number of each group, for each of its columns: [B, I, O]."""
        return x_BGO.repeat_interleave(self.width, dim=1)

    def value(self) -> torch.Tensor:
        """Q [B, I, O]: (code - zero point) x scale."""
        codes = self.codes_BIO.to(self.error_BIO.dtype)
        if self.zero_BGO is not None:
            codes -= self.by_column(self.zero_BGO)
        return codes.mul_(self.by_column(self.scale_BGO))


def product(a_BCI: torch.Tensor, x_BIO: torch.Tensor) -> torch.Tensor:
    """a x [B, C, O]. On a GPU it takes numbers in two bf16 parts: what it decides are near ties among moves."""
    kernels = kernels_for(x_BIO)
    return torch.bmm(a_BCI, x_BIO) if kernels is None else kernels.product(a_BCI, x_BIO)


def stretches(inputs: int, width: int) -> list[slice]:
    """Slices of the columns: whole groups of about BLOCK_COLUMNS columns. `width`: the columns of a group."""
    step = max(1, BLOCK_COLUMNS // width) * width
    return [slice(begin, min(begin + step, inputs)) for begin in range(0, inputs, step)]


def walk(held: Held, moment_BII: torch.Tensor) -> Iterator[tuple[Held, torch.Tensor, torch.Tensor]]:
    """For each stretch in turn its part, its slope [B, C, O], which the caller may change, and its own moment [B, C,
    C]. A slope has all changes of the stretches before it."""
    for columns in stretches(held.codes_BIO.shape[1], held.width):
        slope_BCO = product(moment_BII[:, columns], held.error_BIO)
        yield held.part(columns), slope_BCO, moment_BII[:, columns, columns]
