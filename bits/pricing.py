"""What each unit of a model costs at each width: measured in KL at the head, in one pass that reads the model once.

The reference stream and, beside it, one variant stream a unit and width: from its unit's block on it goes through the
same blocks as the reference, and is only itself since that unit was rounded. All of them go through a block while its
weights are there. What rounds is the run's own quantizer without its searches, on the reference stream's moments of
rows that the variants do not read; the last streams have every unit at one width, and hold the sum of the prices
(planner/prices.py) against the truth.

Cost: rows x (1 + units x widths / 2) forward passes, as many hidden rows on disk at the end, and the statistics of one
pass over the other rows. After every block what is known is committed: a stopped pass goes on at its block.
"""

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..blocks.streams import QUANTIZED, HalfJob, HalfStatistics, by_module, stacked
from ..calibration.moments import SiteMoments
from ..checkpoint import files
from ..checkpoint.model import Model
from ..checkpoint.workdir import Activations, read_json
from ..core.device import site_budget
from ..core.errors import InputError
from ..core.method import Method
from ..core.recipe_groups import KEEP
from ..core.rows import Row, Step, batches
from ..core.scheme import Scheme
from ..eval.kl import compare_rows
from ..models.adapter import Adapter, Half, Site, read, stored_dtype
from ..models.walk import Calls, embed, exchanged, final_norm, load_block, run_block, weight_view
from ..quantize.site import cuts, quantize_batch
from ..recipe import Recipe
from .prices import Priced, UnitPrices, together

REFERENCE = "reference"
# What a pass has done, in its folder.
STATE = "state.json"


@dataclass(frozen=True)
class Prices:
    """`units`, in the order of the blocks. `together_nats`: width -> (KL measured with every unit at it, KL that the
    units' prices predict). rows, tokens: what the variants read."""

    units: tuple[UnitPrices, ...]
    together_nats: dict[str, tuple[float, float]]
    rows: int
    tokens: int

    @property
    def scale(self) -> float:
        """What the streams with every unit at one width measured over what the units' prices predict for them: the
        geometric mean over widths."""
        ratios = [measured / predicted for measured, predicted in self.together_nats.values() if measured and predicted]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0

    @property
    def held(self) -> tuple[UnitPrices, ...]:
        """The units, their prices scaled to what was measured of all of them together."""
        scale = self.scale
        return tuple(replace(u, smooth=u.smooth * scale, flip=u.flip * scale) for u in self.units)

    def facts(self) -> dict[str, Any]:
        """For the record, and for a file that another run reads."""
        units = [
            {
                "unit": unit.unit,
                "role": unit.role,
                "parameters": unit.parameters,
                "smooth": unit.smooth,
                "flip": unit.flip,
                "widths": [
                    {"width": _said(w.scheme), "bytes": w.bytes, "error": w.error, "kl_nats": w.kl_nats}
                    for w in unit.widths
                ],
            }
            for unit in self.units
        ]
        both = {w: {"measured_nats": m, "predicted_nats": p} for w, (m, p) in self.together_nats.items()}
        return {"units": units, "together": both, "scale": self.scale, "rows": self.rows, "tokens": self.tokens}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Prices":
        """The inverse of facts(). Raises KeyError, TypeError or ValueError for other data."""
        units = tuple(
            UnitPrices.fitted(
                str(unit["unit"]),
                str(unit["role"]),
                int(unit["parameters"]),
                [
                    Priced(_scheme(w["width"]), int(w["bytes"]), float(w["error"]), float(w["kl_nats"]))
                    for w in unit["widths"]
                ],
            )
            for unit in facts["units"]
        )
        both = {str(w): (float(x["measured_nats"]), float(x["predicted_nats"])) for w, x in facts["together"].items()}
        return cls(units, both, int(facts["rows"]), int(facts["tokens"]))


def _said(scheme: Scheme | None) -> str:
    return KEEP if scheme is None else str(scheme)


def _scheme(words: str) -> Scheme | None:
    return None if words == KEEP else Scheme.parse(words)


def priced_rows(rows: list[Row], recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """(rows that the variants read, cut to the recipe's length; rows that give the statistics): every so many-th of
    those without pictures, half of them at most. Raises InputError for less than two."""
    plain = [number for number, row in enumerate(rows) if row.pixels is None]
    count = min(recipe.fit.price_rows, len(plain) // 2)
    if not count:
        raise InputError(
            f"bits: fit prices widths on other calibration rows than those that give the statistics, and there are "
            f"{len(plain)} rows without pictures: give more calibration texts, or fewer calibration_row_tokens"
        )
    taken = {plain[i * len(plain) // count] for i in range(count)}
    read_by_variants = [replace(rows[n], tokens=rows[n].tokens[: recipe.fit.price_row_tokens]) for n in sorted(taken)]
    return read_by_variants, [row for number, row in enumerate(rows) if number not in taken]


def identity_of(
    model: Model, recipe: Recipe, rows: list[Row], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """All that prices depend on, so that one pass serves many budgets, and no other model's."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.numpy().tobytes() + (b"" if row.pixels is None else row.pixels.numpy().tobytes()))
    flat = recipe.model_dump()
    fields = ("quantize_roles", "keep_modules", "schemes", "price_rows", "price_row_tokens", "shrinkage")
    return {
        "onecard": __version__,
        "source": model.folder.digest,
        "calibration texts": digest.hexdigest(),
        "method": str(pricing_method(recipe)),
        "token weighting": _weighting(recipe),
        "widths": ", ".join(words for words in recipe.fit.fit_schemes if words != KEEP),
        "device": device.type,
        "compute dtype": str(dtype).removeprefix("torch."),
        **{f"recipe's {key}": str(flat[key]) for key in fields},
    }


@dataclass(frozen=True)
class _Pass:
    """What the pass over the blocks needs everywhere."""

    adapter: Adapter
    model: Model
    recipe: Recipe
    method: Method
    menu: tuple[Scheme, ...]
    variants: Activations
    groups: list[list[int]]
    statistics: Activations
    statistics_groups: list[list[int]]
    calls: Calls
    device: torch.device
    dtype: torch.dtype
    step: Step

    def forward(self, block: nn.Module, index: int, stream: str, into: str) -> None:
        """One stream through a block."""
        for k in range(len(self.groups)):
            hidden = self.variants.get(index, stream, k).to(self.device)
            self.variants.put(index + 1, into, k, run_block(block, hidden, self.calls.of(hidden.shape[1])[index]))
            self.step.advance(hidden.shape[0] * hidden.shape[1])


def pricing_method(recipe: Recipe) -> Method:
    """The recipe's method without searches and output metric: prices tell units apart, they are not shipped."""
    own = recipe.quantizer
    return Method(
        scale_search=own.scale_search,
        signed_scales=own.signed_scales,
        activation_order=own.activation_order,
        damping=own.damping,
        refine_rounds=1,
        output_blocks=0,
    )


def _weighting(recipe: Recipe) -> str:
    """Gradients would want a walk back: tokens count by their residual rows in their place."""
    return "none" if recipe.quantizer.token_weighting == "none" else "residual"


def is_begun(folder: Path) -> bool:
    """Whether a pass was stopped there, and would go on."""
    return (folder / STATE).exists()


def price(
    model: Model,
    recipe: Recipe,
    rows: list[Row],
    units: dict[str, list[str]],
    menu: tuple[Scheme, ...],
    bytes_of: dict[tuple[str, Scheme | None], int],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    step: Step,
) -> Prices:
    """Prices of `units` (unit -> modules) at every scheme of `menu`, and as they are. `rows`: calibration rows;
    `bytes_of`: (unit, width) -> what the plan says it takes. `folder` is the pass's own, and is resumed."""
    adapter = model.adapter
    read_by_variants, others = priced_rows(rows, recipe)
    groups, statistics_groups = (batches(part, recipe.batch_tokens) for part in (read_by_variants, others))
    walk = _Pass(
        adapter,
        model,
        recipe,
        pricing_method(recipe),
        menu,
        Activations(folder / "variants"),
        groups,
        Activations(folder / "statistics"),
        statistics_groups,
        Calls(adapter, device, dtype),
        device,
        dtype,
        step,
    )
    state_file = folder / STATE
    if state_file.exists():
        state = read_json(state_file)
    else:
        step.begin("price: embed")
        embed(adapter, model.source, read_by_variants, groups, walk.variants, (REFERENCE,), device, dtype)
        embed(adapter, model.source, others, statistics_groups, walk.statistics, (QUANTIZED,), device, dtype)
        walk.variants.settle(0)
        walk.statistics.settle(0)
        state = {"blocks": 0, "streams": [], "errors": {}}
        files.write_json(state_file, state)
    for index in range(state["blocks"], adapter.n_blocks):
        _price_block(walk, index, units, state)
        walk.variants.settle(index + 1)
        walk.statistics.settle(index + 1)
        state["blocks"] = index + 1
        files.write_json(state_file, state)
        walk.variants.drop(index)
        walk.statistics.drop(index)
    streams = {name: _file(number) for number, name in enumerate(state["streams"])}
    streams |= {str(scheme): _together(scheme) for scheme in menu}
    kl = _at_the_head(walk, read_by_variants, streams)
    found = []
    roles = {m: (s.role.value, o * i) for b in range(adapter.n_blocks) for s, m, o, i in adapter.modules(b)}
    for unit, modules in units.items():
        widths = [
            Priced(s, bytes_of[unit, s], float(state["errors"][f"{unit}|{s}"]) ** 0.5, kl[f"{unit}|{s}"]) for s in menu
        ]
        widths.append(Priced(None, bytes_of[unit, None], 0.0, 0.0))
        count = sum(roles[module][1] for module in modules)
        found.append(UnitPrices.fitted(unit, roles[modules[0]][0], count, widths))
    both = {str(s): (kl[str(s)], together(unit.parts(unit.at(s)) for unit in found)) for s in menu}
    return Prices(tuple(found), both, len(read_by_variants), sum(len(row.tokens) for row in read_by_variants))


def _price_block(walk: _Pass, index: int, units: dict[str, list[str]], state: dict[str, Any]) -> None:
    """All streams through one block, and its own units' streams begin."""
    adapter = walk.adapter
    modules = {m for _, m, _, _ in adapter.modules(index)}
    own = {unit: names for unit, names in units.items() if names[0] in modules}
    block = load_block(adapter, walk.model.source, index, walk.device, walk.dtype)
    walk.step.begin("price: streams", index)
    for number, _ in enumerate(state["streams"]):
        walk.forward(block, index, _file(number), _file(number))
    walk.forward(block, index, REFERENCE, REFERENCE)
    moments = _moments(walk, block, index, {name for names in own.values() for name in names})
    target = copy.deepcopy(block)
    streams, errors = list(state["streams"]), dict(state["errors"])
    for scheme in walk.menu:
        walk.step.begin("price: round", index)
        for site, found in moments:
            errors_of = _round_site(walk, site, index, block, target, found, scheme)
            unit = adapter.unit(site.members[0][0])
            errors.setdefault(f"{unit}|{scheme}", []).append(errors_of)
        walk.step.begin("price: streams", index)
        for unit, names in own.items():
            with exchanged(adapter, block, target, index, names):
                walk.forward(block, index, REFERENCE, _file(len(streams)))
            streams.append(f"{unit}|{scheme}")
        everything = _together(scheme)
        walk.forward(target, index, everything if index else REFERENCE, everything)
    # Of a unit of several sites the error is the mean over its weights.
    for key, parts in errors.items():
        if isinstance(parts, list):
            errors[key] = sum(error * count for error, count in parts) / sum(count for _, count in parts)
    state["streams"], state["errors"] = streams, errors


def _file(number: int) -> str:
    """What the stream of a unit at a width is called in the store."""
    return f"v{number:05d}"


def _together(scheme: Scheme) -> str:
    """The stream that has every unit at this width."""
    return f"all-{scheme}".replace(" ", "-")


def _moments(walk: _Pass, block: nn.Module, index: int, wanted: set[str]) -> list[tuple[Site, SiteMoments | None]]:
    """Every site that is priced, with the moments that the reference stream gives it; None where the method asks for
    none. The statistics' rows go on to the next block."""
    sites = [site for site in walk.adapter.sites(index) if site.members[0][0] in wanted]
    walk.step.begin("price: statistics", index)
    found: dict[str, SiteMoments] = {}
    for half in Half:
        job = HalfJob(
            walk.adapter,
            index,
            half,
            walk.statistics_groups,
            walk.statistics,
            walk.calls,
            walk.device,
            False,
            _weighting(walk.recipe),
            {},
            False,
        )
        statistics = HalfStatistics(job, block, block, walk.step)
        here = [site for site in sites if site.half is half]
        if walk.method.needs_statistics and here:
            found |= statistics.of(here)
        statistics.propagate()
    return [(site, found.get(site.key)) for site in sites]


def _round_site(
    walk: _Pass,
    site: Site,
    index: int,
    block: nn.Module,
    target: nn.Module,
    moments: SiteMoments | None,
    scheme: Scheme,
) -> tuple[float, int]:
    """The site of `target` rounded; (relative output error, weights)."""
    outputs = sum(site.out_features)
    stored = stored_dtype(walk.adapter, walk.model.source, f"{site.members[0][0]}.weight")
    total = 0.0
    for cut in cuts(len(site.members), outputs, site.in_features, site_budget(walk.device), walk.method):
        members = site.members[cut]
        w_BOI = torch.stack([stacked(walk.adapter, block, index, member) for member in members])
        moment = None if moments is None else moments.shrunk(walk.recipe.quantizer.shrinkage, cut)
        result = quantize_batch(w_BOI, moment, scheme, walk.method, stored)
        total += sum(result.output_error)
        for i, member in enumerate(members):
            for name, weight in by_module(result.weight, i, member, site):
                weight_view(walk.adapter, target, index, name).copy_(weight.dequantize(stored))
    return total / len(site.members), len(site.members) * outputs * site.in_features


def _at_the_head(walk: _Pass, rows: list[Row], streams: dict[str, str]) -> dict[str, float]:
    """Mean KL over all predicted tokens, of streams by their names in the store."""
    walk.step.begin("price: head")
    adapter = walk.adapter
    norm = final_norm(adapter, walk.model.source, walk.device, walk.dtype)
    head = read(adapter, walk.model.source, adapter.head_name).to(walk.device)

    def normed(stream: str, batch: int) -> torch.Tensor:
        with torch.inference_mode():
            hidden = norm(walk.variants.get(adapter.n_blocks, stream, batch).to(walk.device))
        return hidden[:, :-1].flatten(0, 1)

    totals = dict.fromkeys(streams, 0.0)
    tokens = 0
    for k, numbers in enumerate(walk.groups):
        reference = normed(REFERENCE, k)
        targets = torch.cat([rows[number].tokens[1:] for number in numbers]).to(walk.device)
        tokens += len(targets)
        place = torch.arange(len(targets))
        for stream, name in streams.items():
            results = compare_rows((reference, normed(name, k)), (head, head), targets, place, place)
            totals[stream] += float(results.kl_nats.double().sum())
        walk.step.advance(len(targets))
    return {stream: total / tokens for stream, total in totals.items()}
