"""Where the divergence comes from: the errors of each block, half, unit and expert.

Three things are measured while both versions of a block are in memory:

- `hidden`: the distance of the two streams where the block ends, on all tokens, as the models run.
- What a half or a unit adds by itself: the reference block, with only that part taken from the other model, reads the
  reference's hidden state. This costs a pass through half a block per unit, so it is measured on a sample of the rows.
- For every expert its weight error; its weight gain, the least-squares factor of a matrix against the original (for
  the matrix that differs most from those of the other experts); and its output error, of its outputs in the other
  model against its outputs in the original, on sampled tokens that both models send to it. Upstream errors count too,
  but alike for all experts of a block. So an expert's `score` is how far it stands out in its block, by output error or
  by gain. Rounding leaves noise, and aiming at the reference's output (quantize/correction.py) changes weights on
  purpose, but neither changes a gain by more than a per cent. A gain that stands out is a bias: the mark of a damaged
  scale.

A hidden state's error is relative per token (the root of the mean of |h' - h|^2 / |h|^2), since the norm that reads it
next normalises each token. Otherwise a few tokens of huge norm would hide all others.

Shape legend: N rows, T tokens of a row, K top-k, H hidden size, R tokens of one expert, M inputs of its down matrix.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median
from typing import Any

import torch

from ..core.finite import nonfinite_error
from ..core.json_text import nonfinite
from ..core.rows import Row
from ..models.adapter import Half, Role
from ..models.block import Block

# The most tokens on which experts are compared, and that go through half a block for every unit; and the largest share
# of all tokens for the latter. The walk is then not much longer.
EXPERT_TOKENS, UNIT_TOKENS, UNIT_SHARE = 4096, 4096, 1 / 32
LEAST_TOKENS = 1024
WORST_EXPERTS = 10
# Differences below a tenth between experts' errors, or below half a per cent between their gains, do not count.
LEAST_SPREAD_ERROR, LEAST_SPREAD_GAIN = 0.1, 0.005


def places_of(rows: list[Row], groups: list[list[int]], wanted: int) -> list[list[int]]:
    """The places of the sampled rows in each batch: every n-th row, for about `wanted` tokens."""
    total = sum(len(row.tokens) for row in rows)
    stride = max(1, round(total / max(1, wanted)))
    return [[place for place, number in enumerate(numbers) if number % stride == 0] for numbers in groups]


@dataclass(frozen=True)
class Shown:
    """What one model's passes through its version of a block have shown; filled batch by batch."""

    # Each token's experts, rising, int64 [T, K], for each batch; empty for a block without experts.
    routes: list[torch.Tensor] = field(default_factory=list)
    # What the down projections read, on sampled rows: (batch, expert) -> (token numbers [R] rising, rows [R, M]).
    down_rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    # Squared relative errors of what leaves the block, fp32 [tokens] for each batch; empty for the reference.
    squared_errors: list[torch.Tensor] = field(default_factory=list)


Pair = tuple[Block, Block]  # the reference's version of a block, and the other model's


@dataclass
class ErrorSample:
    """The rows of a walk on which errors are measured, in its batches."""

    rows: list[Row]
    groups: list[list[int]]

    def __post_init__(self) -> None:
        total = sum(len(row.tokens) for row in self.rows)
        self.expert_places = places_of(self.rows, self.groups, min(EXPERT_TOKENS, total))
        unit_tokens = max(LEAST_TOKENS, min(UNIT_TOKENS, int(UNIT_SHARE * total)))
        self.unit_places = places_of(self.rows, self.groups, unit_tokens)

    @contextmanager
    def watching(self, block: Block, batch: int, row_tokens: int, shown: Shown) -> Iterator[None]:
        """While open, the pass of one batch fills `shown.down_rows`. Its rows have `row_tokens` tokens each."""
        experts, sampled = block.experts, torch.tensor(self.expert_places[batch])
        if experts is None or not len(sampled):
            yield
            return

        def observe(matrix: str, expert: int, tokens_R: torch.Tensor, rows_RM: torch.Tensor, *_: object) -> None:
            if matrix == "down":
                wanted = torch.isin(tokens_R.cpu() // row_tokens, sampled)
                shown.down_rows[batch, expert] = tokens_R.cpu()[wanted], rows_RM[wanted.to(rows_RM.device)]

        experts.observer = observe
        try:
            yield
        finally:
            experts.observer = None

    def of_block(
        self, pair: Pair, shown: tuple[Shown, Shown], inputs: list[torch.Tensor]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The entries of a block and of its experts, whose versions have seen all batches. `inputs`: what enters it in
        the reference stream, the sampled rows of every batch that has any, [N, T, H]."""
        (reference, other), (ours, theirs) = pair, shown
        # Modules go by the reference's names: those of a format without the vision tower lack its prefix.
        pair = reference, replace(other, adapter=reference.adapter)
        found: dict[str, Any] = {"block": reference.index, "hidden": _root_mean(theirs.squared_errors)}
        found |= _added(pair, inputs)
        if nonfinite(found):
            places = ", ".join(place for place, _ in nonfinite(found))
            raise nonfinite_error(False, f"block {reference.index}, the errors of {places}")
        if reference.experts is None:
            return found, []
        rows = torch.cat(ours.routes).flatten().bincount(minlength=reference.adapter.n_experts).tolist()
        return found, _of_experts(pair, shown, rows)


@dataclass(frozen=True)
class WalkErrors:
    """The entries of all blocks and experts of a walk."""

    blocks: list[dict[str, Any]]
    experts: list[dict[str, Any]]

    def facts(self, calibration_rows: Mapping[int, list[int]]) -> dict[str, Any]:
        """The record's `errors`. `calibration_rows`: the experts' rows by block, from the run's own record."""
        for entry in self.experts:
            counts = calibration_rows.get(entry["block"])
            entry["calibration_rows"] = counts[entry["expert"]] if counts else None
        ranked = sorted(self.experts, key=lambda entry: -entry["score"])
        return {"blocks": self.blocks, "experts": self.experts, "worst_experts": ranked[:WORST_EXPERTS]}


@dataclass(frozen=True)
class _Compared:
    """One expert in both models: gains by matrix, relative errors of its weights and, where both gave it tokens, of its
    outputs."""

    gains: list[float]
    weight_error: float
    output_error: float | None


def _compare(pair: Pair, shown: tuple[Shown, Shown], expert: int, dtype: torch.dtype = torch.float32) -> _Compared:
    """In `dtype`. Weights whose squares fp32 cannot hold are compared in fp64."""
    reference, other = pair
    sites = [site for site in reference.sites if site.role is Role.EXPERT]
    missed = whole = 0.0
    gains = []
    for module in (name for site in sites for name in site.members[expert]):
        w, v = reference.weight(module).to(dtype), other.weight(module).to(dtype)
        size = float(w.square().sum()) or 1.0
        gains.append(float((v * w).sum()) / size)
        missed += float((v - w).square().sum())
        whole += size
    (down,) = next(site for site in sites if site.adds_to_residual).members[expert]
    error = _output_error(shown, expert, reference.weight(down).to(dtype), other.weight(down).to(dtype))
    weight_error = (missed / whole) ** 0.5
    if all(map(isfinite, (*gains, weight_error, error or 0.0))):
        return _Compared(gains=gains, weight_error=weight_error, output_error=error)
    if dtype == torch.float32:
        return _compare(pair, shown, expert, torch.float64)
    raise nonfinite_error(False, f"block {reference.index}, {Half.FEED_FORWARD.said}, the error of expert {expert}")


def _of_experts(pair: Pair, shown: tuple[Shown, Shown], rows: list[int]) -> list[dict[str, Any]]:
    """An entry for every expert of the block. `rows`: how many tokens the reference sends to each."""
    compared = [_compare(pair, shown, expert) for expert in range(len(rows))]
    by_matrix = zip(*(one.gains for one in compared), strict=True)
    standing = [standing_out(list(gains), LEAST_SPREAD_GAIN) for gains in by_matrix]
    errors = {expert: one.output_error for expert, one in enumerate(compared) if one.output_error is not None}
    scores = dict(zip(errors, standing_out(list(errors.values()), LEAST_SPREAD_ERROR), strict=True))
    found = []
    for expert, one in enumerate(compared):
        matrix = max(range(len(standing)), key=lambda m: abs(standing[m][expert]))
        found.append(
            {
                "block": pair[0].index,
                "expert": expert,
                "weight_error": one.weight_error,
                "output_error": one.output_error,
                "rows": rows[expert],
                "weight_gain": one.gains[matrix],
                "score": max(scores.get(expert, 0.0), abs(standing[matrix][expert])),
            }
        )
    return found


def _output_error(shown: tuple[Shown, Shown], expert: int, w_HM: torch.Tensor, v_HM: torch.Tensor) -> float | None:
    """The relative error of the other model's outputs, on the tokens that both models send to the expert, if any."""
    missed = whole = 0.0
    first, second = (one.down_rows for one in shown)
    for key in [key for key in first if key[1] == expert and key in second]:
        (tokens, rows_RM), (other_tokens, other_RM) = first[key], second[key]
        both, other_both = torch.isin(tokens, other_tokens), torch.isin(other_tokens, tokens)
        y_RH = rows_RM[both].to(w_HM.dtype) @ w_HM.T
        gap_RH = other_RM[other_both].to(v_HM.dtype) @ v_HM.T - y_RH
        missed += float(gap_RH.square().sum())
        whole += float(y_RH.square().sum())
    return (missed / whole) ** 0.5 if whole > 0 else None


def standing_out(values: list[float], least_spread: float) -> list[float]:
    """How far each value is above the median, in robust standard deviations (1.4826 x median absolute deviation,
    Rousseeuw and Croux, JASA 88, 1993) of at least `least_spread` times the median."""
    if not values:
        return []
    middle = median(values)
    spread = max(1.4826 * median(abs(value - middle) for value in values), least_spread * abs(middle), 1e-12)
    return [(value - middle) / spread for value in values]


def squared_error(other: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The squared relative error of each token's hidden state, fp32 [tokens] on the CPU."""
    gap, whole = (other - reference).float().square().sum(-1), reference.float().square().sum(-1)
    return (gap / whole.clamp_min(torch.finfo(torch.float32).tiny)).flatten().cpu()


def _root_mean(squares: list[torch.Tensor]) -> float:
    return float(torch.cat(squares).double().mean().sqrt()) if squares else 0.0


def _added(pair: Pair, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """What each half, and each unit that differs, adds to the hidden state by itself."""
    reference, other = pair
    adapter = reference.adapter
    units: dict[Half, dict[str, list[str]]] = {half: {} for half in Half}
    router = adapter.router_site(reference.index)
    for site in (*reference.sites, *([router] if router is not None else [])):
        for module in (name for member in site.members for name in member):
            units[site.half].setdefault(adapter.unit(module), []).append(module)
    found: dict[str, Any] = {}
    by_unit: dict[str, float] = {}
    prefix = adapter.block_prefix(reference.index)
    entering = inputs
    for half in Half:
        exact = [reference.forward(hidden, half) for hidden in entering]
        found[half.value] = _half_error(other, half, entering, exact)
        for unit, names in units[half].items():
            if any(not torch.equal(reference.weight(name), other.weight(name)) for name in names):
                with reference.exchanged(other, names) as mixed:
                    by_unit[unit.removeprefix(prefix)] = _half_error(mixed, half, entering, exact)
        entering = exact
    return found | {"units": by_unit}


def _half_error(block: Block, half: Half, entering: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    leaving = [block.forward(hidden, half) for hidden in entering]
    return _root_mean([squared_error(a, b) for a, b in zip(leaving, exact, strict=True)])
