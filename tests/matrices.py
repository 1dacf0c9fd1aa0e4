"""Weights with correlated inputs for tests of quantizers, and their errors computed slowly and plainly."""

import math

import pytest
import torch

from onecard.core.method import Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import Scheme
from onecard.quantize.gptq import prepare
from onecard.quantize.held import Held
from onecard.quantize.refine import refine
from onecard.quantize.restarts import Stretch, restart
from onecard.quantize.tabu import tabu_search

SCHEMES = [Scheme(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]
NAMES = [f"{s.bits} bits, {'symmetric' if s.symmetric else 'asymmetric'}" for s in SCHEMES]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)


def correlated(batch: int, rows: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [B, 12, I], second moments [B, I, I]) in fp64; inputs share a few directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = normal(batch, inputs // 4, inputs) * torch.exp(normal(batch, 1, inputs))
    x = normal(batch, rows, inputs // 4) @ mix + 0.1 * normal(batch, rows, inputs)
    return 0.05 * normal(batch, 12, inputs) + 0.01, x.transpose(1, 2) @ x / rows


def output_error(w_OI: torch.Tensor, q_OI: torch.Tensor, moment_II: torch.Tensor) -> float:
    """Expected squared error of the output, row by row: sum of e H e^T."""
    return math.fsum(float(e @ moment_II @ e) for e in (w_OI - q_OI).double())


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """(code - zero) * scale in fp64, by columns and not by groups."""
    size = weight.scheme.group_size
    columns = []
    for i in range(weight.codes.shape[-1]):
        code, scale = weight.codes[..., i].double(), weight.scales[..., i // size].double()
        zero = 0.0 if weight.zero_points is None else weight.zero_points[..., i // size].double()
        columns.append((code - zero) * scale)
    return torch.stack(columns, -1)


def limits(scheme: Scheme) -> tuple[int, int]:
    return (-8, 7) if scheme.bits == 4 else (-128, 127)


METHODS = {
    "absmax scales": Method(scale_search=False, refine_rounds=0),
    "searched scales": Method(refine_rounds=0),
    "refined": Method(refine_rounds=2),
    "refined, restarted": Method(refine_rounds=1, restarts=3),
    "refined, searched": Method(refine_rounds=1, tabu_moves=20),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def problem(seed: int, batch: int = 2, outputs: int = 6, inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the damped second moment of correlated inputs, fp64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, outputs, inputs, generator=g, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5
    x = torch.randn(batch, 3 * inputs, inputs, generator=g, dtype=torch.float64) @ mix
    return w, prepare(x.transpose(1, 2) @ x / x.shape[1], 0.01).objective


def rows_objective(weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The diagonal of E S E^T [B, O]: each row's share of the objective."""
    e = w - weight.dequantize(torch.float64)
    return torch.stack([torch.stack([row @ moment[b] @ row for row in e[b]]) for b in range(len(w))])


def refined(weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor, rounds: int) -> QuantizedWeight:
    held = Held.of(weight, w)
    refine(held, moment, rounds)
    return held.weight()


def restarted(
    weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor, stretches: list[Stretch], rounds: int
) -> QuantizedWeight:
    held = Held.of(weight, w)
    restart(held, moment, stretches, rounds)
    return held.weight()


def tabu_searched(weight: QuantizedWeight, w: torch.Tensor, moment: torch.Tensor, moves: int) -> QuantizedWeight:
    held = Held.of(weight, w)
    tabu_search(held, moment, moves)
    return held.weight()
