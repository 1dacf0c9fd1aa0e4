"""Inputs for the kernels: batches of matrices on which fp32 is exact, and batches of real values.

Where every product and sum is exact, their order does not matter, and two forms must give the same bits.
"""

from dataclasses import dataclass, replace

import torch

from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize import gptq, grid
from onecard.quantize.held import Held, stretches
from onecard.quantize.restarts import Stretch


@dataclass(frozen=True)
class Shape:
    batch: int
    outputs: int
    inputs: int
    width: int


@dataclass(frozen=True)
class ExactSite:
    """Weights in eighths, scales 1/2, 1 or 2 of either sign, whole zero points and moments, and a factor of -1, 0 and 1
    with 1 and 2 on its diagonal. `dtype`: of what is computed."""

    shape: Shape
    scheme: Scheme
    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def _generator(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + more)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, self.dtype)

    def weights(self) -> torch.Tensor:
        size = (self.shape.batch, self.shape.outputs, self.shape.inputs)
        return self._put(torch.randint(-60, 61, size, generator=self._generator()).float() / 8)

    def whole(self, size: int, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(few -1 and 1 above the diagonal, 1, 2 or 4) [B, size, size] and [B, size]."""
        generator, batch = self._generator(100 + more), self.shape.batch
        signs = torch.randint(0, 2, (batch, size, size), generator=generator).float() * 2 - 1
        drawn = torch.rand(signs.shape, generator=generator) < min(0.3, 3 / size)
        return (signs * drawn).triu(1), 2.0 ** torch.randint(0, 3, (batch, size), generator=generator)

    def moment(self) -> torch.Tensor:
        upper, own = self.whole(self.shape.inputs)
        return self._put(upper + upper.transpose(1, 2) + torch.diag_embed(own * 4))

    def order(self, size: int, more: int = 0) -> torch.Tensor:
        generator = self._generator(200 + more)
        return torch.stack([torch.randperm(size, generator=generator) for _ in range(self.shape.batch)]).to(self.device)

    def root(self, size: int, more: int = 0) -> torch.Tensor:
        upper, own = self.whole(size, more)
        return self._put(upper + torch.diag_embed(own.clamp_max(2)))

    def held(self) -> Held:
        """Codes at random, scales in bf16."""
        generator, shape, scheme = self._generator(300), self.shape, self.scheme
        size = (shape.batch, shape.outputs, shape.inputs)
        codes = torch.randint(scheme.code_min, scheme.code_max + 1, size, generator=generator).to(torch.int8)
        groups = (shape.batch, shape.outputs, scheme.groups(shape.inputs))
        scale = 2.0 ** torch.randint(-1, 2, groups, generator=generator)
        if self.seed % 2:
            scale = scale * (2.0 * torch.randint(0, 2, groups, generator=generator) - 1)
        zero = None if scheme.symmetric else torch.randint(-3, 4, groups, generator=generator).to(torch.int8)
        placed = None if zero is None else zero.to(self.device)
        weight = QuantizedWeight(codes.to(self.device), scale.bfloat16().to(self.device), placed, scheme)
        return Held.of(weight, self.weights())

    def stretches(self, tries: int = 2) -> list[Stretch]:
        """Inverses, orders and factors that are drawn, not computed."""
        made = []
        for n, c in enumerate(stretches(self.shape.inputs, self.scheme.width(self.shape.inputs))):
            size = c.stop - c.start
            orders = torch.stack([self.order(size, 10 * n + k) for k in range(tries)])
            roots = torch.stack([self.root(size, 10 * n + k) for k in range(tries)])
            upper, own = self.whole(size, n)
            inverse = self._put((upper + upper.transpose(1, 2) + torch.diag_embed(own * 4)) / 8).contiguous()
            made.append(Stretch(inverse, orders, torch.argsort(orders), roots.contiguous()))
        return made


@dataclass(frozen=True)
class RealSite:
    """Weights [B, O, I] and what GPTQ needs of rows whose columns differ in size."""

    w: torch.Tensor
    moment: torch.Tensor
    prepared: gptq.Prepared
    scale: torch.Tensor
    scheme: Scheme

    @classmethod
    def drawn(cls, shape: Shape, device: torch.device) -> "RealSite":
        generator = torch.Generator(device).manual_seed(1)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        rows = normal(shape.batch, 4 * shape.inputs, shape.inputs) * normal(shape.inputs).abs()
        moment = rows.transpose(1, 2) @ rows / rows.shape[1]
        w, scheme = normal(shape.batch, shape.outputs, shape.inputs), Scheme(4, shape.width, True)
        prepared = gptq.prepare(moment, 0.01)
        scale, _ = grid.absmax_scales(w, scheme, torch.bfloat16)
        return cls(w, moment, prepared, scale, scheme)

    def loss(self, held: Held) -> float:
        """J = tr(E D E^T), in fp64."""
        error, moment = held.error_BIO, self.prepared.objective
        each = [float(((m.double() @ e.double()) * e.double()).sum()) for e, m in zip(error, moment, strict=True)]
        return sum(each)

    def part(self, batch: slice, outputs: slice) -> "RealSite":
        """Some matrices, or some rows of each."""
        factor = self.prepared.factor
        prepared = gptq.Prepared(
            self.prepared.order_BI[batch], replace(factor, root=factor.root[batch]), self.prepared.objective[batch]
        )
        return RealSite(
            self.w[batch, outputs], self.moment[batch], prepared, self.scale[batch, outputs].contiguous(), self.scheme
        )


def copied(held: Held) -> Held:
    zero = held.zero_BGO
    return replace(
        held,
        codes_BIO=held.codes_BIO.clone(),
        scale_BGO=held.scale_BGO.clone(),
        zero_BGO=None if zero is None else zero.clone(),
        error_BIO=held.error_BIO.clone(),
    )
