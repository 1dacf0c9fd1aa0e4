"""Where the divergence comes from: the error that each block, half and unit adds to the hidden state, and the error of
every expert.

Three things are measured while both versions of a block are in memory:

- `hidden`: how far the two streams are apart where the block ends, on all tokens, as the models run.
- What a half or a unit adds by itself: the reference block with only that part of the other model, given the hidden
  state of the reference. On a sample of the rows, since it costs a pass through half a block for each unit.
- Of every expert its weight error, its weight gain (the least-squares factor of each matrix against the original; the
  one furthest from its fellows' is told), and its output error: what it gives in the other model against what the
  original gives, on tokens of the sample that both models send there. Upstream errors are in it, but all experts of a
  block have those alike, so an expert's `score` says how far it stands out of its block, by output error or by gain.
  Rounding leaves noise, and aiming at the reference's output (quantize/correction.py) a weight error on purpose;
  neither changes a gain by more than a per cent, and so one that stands out is a bias: the mark of a damaged scale.

A hidden state's error is relative token by token (the root of the mean of |h' - h|^2 / |h|^2), as the norm that reads
it next takes it: a few tokens of huge norm would hide all others.

Shape legend: N rows, T tokens of a row, R tokens of one expert, M inputs of its down projection, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from ..core.rows import Row
from ..models.adapter import Adapter, Half, Role
from ..models.walk import Calls, exchanged, expert_stacks, only, run_block, weight_view

# Tokens on which experts are compared, and those that go through half a block for every unit: at most this many, and no
# more than this share, so that the walk is not much longer for it.
EXPERT_TOKENS, UNIT_TOKENS, UNIT_SHARE = 4096, 4096, 1 / 32
LEAST_TOKENS = 1024
WORST_EXPERTS = 10
# Experts whose errors differ by less than a tenth, or whose gains by less than a half per cent, are alike.
LEAST_SPREAD_ERROR, LEAST_SPREAD_GAIN = 0.1, 0.005


def places_of(rows: list[Row], groups: list[list[int]], wanted: int) -> list[list[int]]:
    """Of each batch the places of its sampled rows: every so-manieth row, for about `wanted` tokens."""
    total = sum(len(row.tokens) for row in rows)
    stride = max(1, round(total / max(1, wanted)))
    return [[place for place, number in enumerate(numbers) if number % stride == 0] for numbers in groups]


# What one model's down projections read, on the sample: (batch, expert) -> (token numbers [R] rising, rows [R, M]).
_Seen = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Errors:
    """Errors of all blocks, filled block by block. Made of the rows of a walk and its batches."""

    rows: list[Row]
    groups: list[list[int]]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    _seen: list[_Seen] = field(default_factory=list)
    _hidden: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        total = sum(len(row.tokens) for row in self.rows)
        self.expert_places = places_of(self.rows, self.groups, min(EXPERT_TOKENS, total))
        unit_tokens = max(LEAST_TOKENS, min(UNIT_TOKENS, int(UNIT_SHARE * total)))
        self.unit_places = places_of(self.rows, self.groups, unit_tokens)

    def begin_model(self) -> None:
        """Before the batches of one of the two models go through a block: the reference's, then the other's."""
        self._seen.append({})

    @contextmanager
    def watching(self, block: nn.Module, batch: int, row_tokens: int) -> Iterator[None]:
        """Around the pass of one batch, of rows of so many tokens."""
        stacks, sampled = expert_stacks(block), torch.tensor(self.expert_places[batch])
        if stacks is None or not len(sampled):
            yield
            return
        seen = self._seen[-1]

        def observe(matrix: str, expert: int, tokens_R: torch.Tensor, rows_RM: torch.Tensor) -> None:
            if matrix == "down":
                wanted = torch.isin(tokens_R.cpu() // row_tokens, sampled)
                seen[batch, expert] = tokens_R.cpu()[wanted], rows_RM[wanted.to(rows_RM.device)]

        stacks.observer = observe
        try:
            yield
        finally:
            stacks.observer = None

    def compare_hidden(self, reference_NTH: torch.Tensor, other_NTH: torch.Tensor) -> None:
        """One batch of what leaves the block."""
        self._hidden.append(_relative(other_NTH, reference_NTH))

    def end_block(
        self,
        adapter: Adapter,
        index: int,
        reference: nn.Module,
        other: nn.Module,
        routes: list[torch.Tensor],
        inputs: list[torch.Tensor],
        calls: Calls,
    ) -> None:
        """Both versions of the block have seen all batches. `routes`: the reference's, [tokens, K] a batch; `inputs`:
        what enters it in the reference stream, the sampled rows of every batch that has any, [N, T, H]."""
        found: dict[str, Any] = {"block": index, "hidden": _root_mean(self._hidden)}
        found |= _added(adapter, index, reference, other, inputs, calls)
        self.blocks.append(found)
        if expert_stacks(reference) is not None:
            rows = torch.cat(routes).flatten().bincount(minlength=adapter.n_experts).tolist()
            self.experts += self._of_experts(adapter, index, reference, other, rows)
        self._seen, self._hidden = [], []

    def _of_experts(
        self, adapter: Adapter, index: int, reference: nn.Module, other: nn.Module, rows: list[int]
    ) -> list[dict[str, Any]]:
        sites = [site for site in adapter.sites(index) if site.role is Role.EXPERT]
        downs = next(site for site in sites if site.reaches_residual).members
        found = []
        gains: list[list[float]] = []  # of every expert, matrix by matrix
        for expert, (down,) in enumerate(downs):
            missed = whole = 0.0
            gains.append([])
            for module in (name for site in sites for name in site.members[expert]):
                w, v = (weight_view(adapter, block, index, module).float() for block in (reference, other))
                size = float(w.square().sum()) or 1.0
                gains[-1].append(float((v * w).sum()) / size)
                missed += float((v - w).square().sum())
                whole += size
            views = (weight_view(adapter, block, index, down) for block in (reference, other))
            found.append(
                {
                    "block": index,
                    "expert": expert,
                    "weight_error": (missed / whole) ** 0.5,
                    "output_error": self._output_error(expert, *views),
                    "rows": rows[expert],
                }
            )
        standing = [standing_out(list(matrix), LEAST_SPREAD_GAIN) for matrix in zip(*gains, strict=True)]
        seen = [entry for entry in found if entry["output_error"] is not None]
        errors = dict(
            zip(
                (entry["expert"] for entry in seen),
                standing_out([entry["output_error"] for entry in seen], LEAST_SPREAD_ERROR),
                strict=True,
            )
        )
        for entry in found:
            expert = entry["expert"]
            matrix = max(range(len(standing)), key=lambda m: abs(standing[m][expert]))
            entry["weight_gain"] = gains[expert][matrix]
            entry["score"] = max(errors.get(expert, 0.0), abs(standing[matrix][expert]))
        return found

    def _output_error(self, expert: int, w_HM: torch.Tensor, v_HM: torch.Tensor) -> float | None:
        """Relative, of the other model's outputs against the original's, on tokens that both models send to the expert;
        None without any."""
        missed = whole = 0.0
        first, second = self._seen
        for key in [key for key in first if key[1] == expert and key in second]:
            (tokens, rows_RM), (other_tokens, other_RM) = first[key], second[key]
            both, other_both = torch.isin(tokens, other_tokens), torch.isin(other_tokens, tokens)
            y_RH = rows_RM[both].float() @ w_HM.float().T
            gap_RH = other_RM[other_both].float() @ v_HM.float().T - y_RH
            missed += float(gap_RH.square().sum())
            whole += float(y_RH.square().sum())
        return (missed / whole) ** 0.5 if whole > 0 else None

    def facts(self, calibration_rows: dict[int, list[int]]) -> dict[str, Any]:
        """The record's `errors`. `calibration_rows`: by block, what a run's own record says of its experts."""
        for entry in self.experts:
            counts = calibration_rows.get(entry["block"])
            entry["calibration_rows"] = counts[entry["expert"]] if counts else None
        ranked = sorted(self.experts, key=lambda entry: -entry["score"])
        return {"blocks": self.blocks, "experts": self.experts, "worst_experts": ranked[:WORST_EXPERTS]}


def standing_out(values: list[float], least_spread: float) -> list[float]:
    """How far each stands above the median of all, in robust standard deviations (1.4826 x median absolute deviation,
    Rousseeuw and Croux, JASA 88, 1993), which are no less than `least_spread` of the median."""
    if not values:
        return []
    middle = median(values)
    spread = max(1.4826 * median(abs(value - middle) for value in values), least_spread * abs(middle), 1e-12)
    return [(value - middle) / spread for value in values]


def _relative(other: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared relative error, a token each."""
    gap, whole = (other - reference).float().square().sum(-1), reference.float().square().sum(-1)
    return (gap / whole.clamp_min(torch.finfo(torch.float32).tiny)).flatten().cpu()


def _root_mean(squares: list[torch.Tensor]) -> float:
    return float(torch.cat(squares).double().mean().sqrt()) if squares else 0.0


def _added(
    adapter: Adapter, index: int, reference: nn.Module, other: nn.Module, inputs: list[torch.Tensor], calls: Calls
) -> dict[str, Any]:
    """What each half, and each unit that differs, adds to the hidden state by itself."""
    units: dict[Half, dict[str, list[str]]] = {half: {} for half in Half}
    router = adapter.router_site(index)
    for site in (*adapter.sites(index), *([router] if router is not None else [])):
        for module in (name for member in site.members for name in member):
            units[site.half].setdefault(adapter.unit(module), []).append(module)
    found: dict[str, Any] = {}
    by_unit: dict[str, float] = {}
    prefix = adapter.block_prefix(index)
    entering = inputs
    for half in Half:
        exact = _through(adapter, reference, half, entering, calls, index)

        def added(block: nn.Module, half: Half = half, entering: Any = entering, exact: Any = exact) -> float:
            leaving = _through(adapter, block, half, entering, calls, index)
            return _root_mean([_relative(a, b) for a, b in zip(leaving, exact, strict=True)])

        found[half.value] = added(other)
        differing = {
            unit: names for unit, names in units[half].items() if _differ(adapter, index, reference, other, names)
        }
        for unit, names in differing.items():
            with exchanged(adapter, reference, other, index, names):
                by_unit[unit.removeprefix(prefix)] = added(reference)
        entering = exact
    return found | {"units": by_unit}


def _differ(adapter: Adapter, index: int, a: nn.Module, b: nn.Module, modules: list[str]) -> bool:
    return any(not torch.equal(*(weight_view(adapter, x, index, name) for x in (a, b))) for name in modules)


def _through(
    adapter: Adapter, block: nn.Module, half: Half, inputs: list[torch.Tensor], calls: Calls, index: int
) -> list[torch.Tensor]:
    with only(adapter, block, half):
        return [run_block(block, hidden, calls.of(hidden.shape[1])[index]) for hidden in inputs]
