"""What each unit of a model costs at each width: the KL at the head, measured in one pass that reads the model once.

Beside the reference stream there is one variant stream per unit and width. It leaves the reference in its unit's
block, where that unit is rounded, and goes through the unrounded later blocks. All streams go through a block while its
weights are in memory. Units are rounded by the run's own quantizer without its searches, with moments of the reference
stream on rows that no variant reads. Further streams have every unit at one width; they test the sum of the prices
(bits/prices.py).

Cost: rows x (1 + units x widths / 2) forward passes, (1 + units x widths) streams on disk at the end, and one pass with
statistics over the other rows. The state is committed after every block, and a stopped pass goes on there.
"""

import hashlib
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..blocks.streams import QUANTIZED, REFERENCE, HalfJob, Known, by_module, propagate, take_statistics
from ..calibration.moments import SiteMoments
from ..checkpoint import files
from ..checkpoint.activations import Activations
from ..checkpoint.model import Model
from ..checkpoint.workdir import read_json
from ..core.device import Compute, site_budget
from ..core.errors import InputError
from ..core.finite import nonfinite_error
from ..core.json_text import nonfinite
from ..core.method import Method
from ..core.recipe_groups import KEEP
from ..core.rows import Row
from ..core.scheme import Scheme
from ..eval.kl import compare_rows
from ..models.adapter import Half, Role, Site
from ..models.block import Block
from ..models.walk import HiddenRows, Walk
from ..quantize.site import batch_slices, quantize_batch
from ..recipe import Recipe
from .prices import Priced, UnitPrices, together

# The file, in the pass's folder, that says how far it is.
STATE = "state.json"


@dataclass(frozen=True)
class Prices:
    """The result of a pricing pass."""

    units: tuple[UnitPrices, ...]  # in the order of the blocks
    together_nats: dict[str, tuple[float, float]]  # width -> KL with every unit at it: (measured, predicted by prices)
    rows: int  # read by the variants
    tokens: int

    @property
    def scale(self) -> float:
        """Measured over predicted KL with every unit at one width: the geometric mean over widths."""
        ratios = [measured / predicted for measured, predicted in self.together_nats.values() if measured and predicted]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0

    @property
    def held(self) -> tuple[UnitPrices, ...]:
        """The units, their prices scaled so that they predict the KL measured with all units at one width."""
        scale = self.scale
        return tuple(replace(u, smooth=u.smooth * scale, flip=u.flip * scale) for u in self.units)

    def facts(self) -> dict[str, Any]:
        """As data for JSON: for the record, and for a price file that another run reads."""
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
        if nonfinite(facts):
            raise ValueError(", ".join(f"{place} is {word}" for place, word in nonfinite(facts)))
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
    """(rows that the variants read, cut to the recipe's length; all other rows, which give the statistics). The first
    are every n-th row without images, half of those at most. Raises InputError for fewer than two without images."""
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


def identity_of(model: Model, recipe: Recipe, rows: list[Row], compute: Compute) -> dict[str, str]:
    """All that prices depend on. Prices serve every budget of the same model, and no other model."""
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
        "device": compute.device.type,
        "compute dtype": compute.dtype_name,
        **{f"recipe's {key}": str(flat[key]) for key in fields},
    }


@dataclass(frozen=True)
class _Pass:
    """What the pass needs in every block."""

    recipe: Recipe
    method: Method
    menu: tuple[Scheme, ...]
    units: dict[str, list[str]]  # unit -> its modules
    variants: HiddenRows  # the reference and all variant streams
    statistics: HiddenRows

    @property
    def walk(self) -> Walk:
        return self.variants.walk


def pricing_method(recipe: Recipe) -> Method:
    """The recipe's method without searches and output metric. Its codes are never emitted; they only price units."""
    own = recipe.quantizer
    return Method(
        # One name for all methods with statistics, since they share prices.
        method="best" if own.needs_statistics else own.method,
        scale_search=own.scale_search,
        signed_scales=own.signed_scales,
        activation_order=own.activation_order,
        damping=own.damping,
        correlation_damping=own.correlation_damping,
        refine_rounds=1,
        output_blocks=0,
    )


def _weighting(recipe: Recipe) -> str:
    """The recipe's token weighting, but 'residual' for 'gradient', which would need a walk back."""
    return "none" if recipe.quantizer.token_weighting == "none" else "residual"


def is_begun(folder: Path) -> bool:
    """Whether a pass was stopped in this folder, and would go on."""
    return (folder / STATE).exists()


def price(
    walk: Walk,
    recipe: Recipe,
    rows: list[Row],
    *,
    units: dict[str, list[str]],
    menu: tuple[Scheme, ...],
    bytes_of: dict[tuple[str, Scheme | None], int],
    folder: Path,
) -> Prices:
    """Prices of `units` (unit -> modules) at every scheme of `menu`, and unquantized. `rows`: calibration rows;
    `bytes_of`: (unit, width) -> its bytes in the plan. `folder` belongs to the pass; a stopped one is resumed there."""
    read_by_variants, others = priced_rows(rows, recipe)
    stores = Activations(folder / "variants", walk.device), Activations(folder / "statistics", walk.device)
    task = _Pass(
        recipe=recipe,
        method=pricing_method(recipe),
        menu=menu,
        units=units,
        variants=walk.hidden_rows(read_by_variants, stores[0]),
        statistics=walk.hidden_rows(others, stores[1]),
    )
    state_file = folder / STATE
    if state_file.exists():
        state = read_json(state_file)
    else:
        walk.step.begin("price: embed")
        task.variants.embed(REFERENCE)
        task.statistics.embed(QUANTIZED)
        for store in stores:
            store.settle(0)
        state = {"blocks": 0, "streams": [], "errors": {}}
        files.write_json(state_file, state)
    for index in range(state["blocks"], walk.adapter.n_blocks):
        _price_block(task, index, state)
        for store in stores:
            store.settle(index + 1)
        state["blocks"] = index + 1
        files.write_json(state_file, state)
        for store in stores:
            store.drop(index)
    streams = {name: _file(number) for number, name in enumerate(state["streams"])}
    streams |= {str(scheme): _together(scheme) for scheme in menu}
    kl = _at_the_head(task, streams)
    sizes = {m: (s.role, o * i) for b in range(walk.adapter.n_blocks) for s, m, o, i in walk.adapter.modules(b)}
    found = [_unit_prices(task, unit, sizes, bytes_of, state["errors"], kl) for unit in units]
    both = {str(s): (kl[str(s)], together(unit.parts(unit.at(s)) for unit in found)) for s in menu}
    tokens = sum(len(row.tokens) for row in read_by_variants)
    return Prices(units=tuple(found), together_nats=both, rows=len(read_by_variants), tokens=tokens)


def _unit_prices(
    task: _Pass,
    unit: str,
    sizes: dict[str, tuple[Role, int]],
    bytes_of: dict[tuple[str, Scheme | None], int],
    errors: dict[str, float],
    kl: dict[str, float],
) -> UnitPrices:
    """One unit's prices. `sizes`: (role, weights) of each module; squared errors and KL are by `unit|width`."""
    modules = task.units[unit]
    widths = [
        Priced(scheme, bytes_of[unit, scheme], float(errors[f"{unit}|{scheme}"]) ** 0.5, kl[f"{unit}|{scheme}"])
        for scheme in task.menu
    ]
    widths.append(Priced(None, bytes_of[unit, None], 0.0, 0.0))
    parameters = sum(sizes[module][1] for module in modules)
    return UnitPrices.fitted(unit, sizes[modules[0]][0].value, parameters, widths)


def _price_block(task: _Pass, index: int, state: dict[str, Any]) -> None:
    """All streams through one block; the streams of its own units begin."""
    adapter, step = task.walk.adapter, task.walk.step
    modules = {m for _, m, _, _ in adapter.modules(index)}
    own = {unit: names for unit, names in task.units.items() if names[0] in modules}
    block = task.walk.load(index)
    task.walk.expect(index + 1)
    step.begin("price: streams", index)
    for number, _ in enumerate(state["streams"]):
        task.variants.forward(block.for_quantized_rows(), _file(number))
    task.variants.forward(block, REFERENCE)
    moments = _moments(task, block, {name for names in own.values() for name in names})
    target = block.copy()
    streams, errors = list(state["streams"]), dict(state["errors"])
    for scheme in task.menu:
        step.begin("price: round", index)
        for site, found in moments:
            errors_of = _round_site(task, site, block, target, found, scheme)
            errors.setdefault(f"{adapter.unit(site.first_module)}|{scheme}", []).append(errors_of)
        step.begin("price: streams", index)
        for unit, names in own.items():
            with block.exchanged(target, names) as mixed:
                task.variants.forward(mixed, REFERENCE, into=_file(len(streams)))
            streams.append(f"{unit}|{scheme}")
        everything = _together(scheme)
        task.variants.forward(target, everything if index else REFERENCE, into=everything)
    # The error of a unit of several sites is the mean over its weights.
    for key, parts in errors.items():
        if isinstance(parts, list):
            errors[key] = sum(error * count for error, count in parts) / sum(count for _, count in parts)
    state["streams"], state["errors"] = streams, errors


def _file(number: int) -> str:
    """The name in the store of the stream with this number (one unit at one width)."""
    return f"v{number:05d}"


def _together(scheme: Scheme) -> str:
    """The name in the store of the stream with every unit at this width."""
    return f"all-{scheme}".replace(" ", "-")


def _moments(task: _Pass, block: Block, wanted: set[str]) -> list[tuple[Site, SiteMoments | None]]:
    """Every priced site with its moments, by the rows for statistics; None where the method needs none. Those rows go
    on to the next block."""
    sites = [site for site in block.sites if site.first_module in wanted]
    task.walk.step.begin("price: statistics", block.index)
    found: dict[str, SiteMoments] = {}
    for half in Half:
        weighting = _weighting(task.recipe)
        job = HalfJob(hidden=task.statistics, original=block, target=block, half=half, weighting=weighting)
        here, known = [site for site in sites if site.half is half], Known()
        if task.method.needs_statistics and here:
            moments, known = take_statistics(job, here, known)
            found |= moments
        propagate(job, known)
    return [(site, found.get(site.key)) for site in sites]


def _round_site(
    task: _Pass, site: Site, block: Block, target: Block, moments: SiteMoments | None, scheme: Scheme
) -> tuple[float, int]:
    """Rounds the site of `target`; returns (relative output error, weights)."""
    outputs = sum(site.out_features)
    stored = task.walk.scale_dtype(site)
    total = 0.0
    for cut in batch_slices(len(site.members), outputs, site.in_features, site_budget(task.walk.device), task.method):
        members = site.members[cut]
        w_BOI = torch.stack([block.stacked(member) for member in members])
        moment = None if moments is None else moments.shrunk(task.recipe.quantizer.shrinkage, cut)
        result = quantize_batch(w_BOI, moment, scheme, task.method, stored)
        total += sum(result.output_error)
        if not isfinite(total):
            raise nonfinite_error(False, f"block {block.index}, {site.half.said}, {site.key}: the error at {scheme}")
        for i, member in enumerate(members):
            for name, weight in by_module(result.weight, i, member, site):
                target.weight(name).copy_(weight.dequantize(stored))
    return total / len(site.members), len(site.members) * outputs * site.in_features


def _at_the_head(task: _Pass, streams: dict[str, str]) -> dict[str, float]:
    """The mean KL in nats over all predicted tokens, for every stream (key -> name in the store)."""
    walk, variants = task.walk, task.variants
    walk.step.begin("price: head")
    norm, head = walk.final_norm(), walk.head()

    def normed(stream: str, batch: int) -> torch.Tensor:
        with torch.inference_mode():
            hidden = norm(variants.get(walk.adapter.n_blocks, stream, batch))
        return hidden[:, :-1].flatten(0, 1)

    totals = dict.fromkeys(streams, 0.0)
    tokens = 0
    for k, numbers in enumerate(variants.groups):
        reference = normed(REFERENCE, k)
        targets = torch.cat([variants.rows[number].tokens[1:] for number in numbers]).to(walk.device)
        tokens += len(targets)
        place = torch.arange(len(targets))
        for stream, name in streams.items():
            results = compare_rows((reference, normed(name, k)), (head, head), targets, place, place)
            totals[stream] += float(results.kl_nats.double().sum())
        walk.step.advance(len(targets))
    return {stream: total / tokens for stream, total in totals.items()}
