"""Size up a model or a finished checkpoint for a request, on one card or on all known cards. Reads headers only.

planner/fit.py has the sum. This module finds the candidates (what recipes would emit, and the checkpoint as it is) and
chooses one. It then gathers what the plan reports: the longest context and the most sequences, the changes that would
make it fit, the other recipes, the other cards, and the known traps.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.model import Model, said_name
from ..core.errors import InputError, input_error
from ..models.adapter import QUANTIZABLE, Adapter
from ..recipe import Recipe
from .candidates import Candidate, candidates_of
from .cards import CARDS, Card
from .changes import PASS_COST, Change, changes
from .engines import engine_named
from .fit import (
    Fit,
    Needs,
    Request,
    bits_that_fit,
    cards_needed,
    fit,
    max_context,
    max_sequences,
    pass_tokens,
    usable_bytes,
)
from .kv import cache_rates
from .traps import traps
from .weights import cut_problems
from .workspace import image_tokens

# Points on each curve of memory against context.
CURVE_POINTS = 64


@dataclass(frozen=True)
class CandidateFit:
    """How one candidate fits on one card."""

    name: str
    fit: Fit
    max_context: int
    max_sequences: int


@dataclass(frozen=True)
class CardRow:
    """One line of the table over all known cards."""

    card: Card
    # The candidate with the most bytes among those that fit.
    best: CandidateFit | None
    # How many of these cards the smallest candidate needs.
    cards_needed: int | None


@dataclass(frozen=True)
class Sizing:
    """What `onecard plan` reports about memory."""

    model: Model
    request: Request
    needs: Needs
    # None if the user named no card and gets only the table over cards.
    card: Card | None
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    row: CandidateFit | None
    rows: tuple[CandidateFit, ...]
    changes: tuple[Change, ...]
    better: Change | None
    cards_needed: int | None
    bits: float | None
    table: tuple[CardRow, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        return None if self.row is None else self.row.fit.fits

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """The bytes needed on the card at each context, for every candidate. Empty if no card was named."""
        card = self.card
        if card is None or self.row is None:
            return []
        reach = max(self.request.context, *(row.max_context for row in self.rows))
        end = min(max(self.needs.most_context, self.request.context), reach + reach // 4)
        contexts = sorted({max(1, end * i // CURVE_POINTS) for i in range(CURVE_POINTS + 1)})
        out = []
        for candidate in self.candidates:
            choice = candidate.choice(self.request.rules.dequantizes)
            weights = choice.weights.on_card(self.request.tensor_parallel, self.request.vision)
            made = [fit(self.needs, card, weights, replace(self.request, context=n)).needed_bytes for n in contexts]
            out.append({"name": candidate.name, "contexts": contexts, "bytes": made})
        return out

    @property
    def serve(self) -> str | None:
        """The vLLM command that serves the plan. None without vLLM or a card, or if the plan cannot be served."""
        # vLLM does not start a model with a context longer than its positions.
        longer = self.request.context > self.needs.most_context
        if self.request.engine != "vllm" or self.card is None or not self.fits or longer:
            return None
        r = self.request
        parts = [
            "vllm serve FOLDER",
            f"--max-model-len {r.context}",
            f"--max-num-seqs {r.sequences}",
            f"--max-num-batched-tokens {pass_tokens(self.card, r)}",
            f"--gpu-memory-utilization {r.rules.memory_share if r.memory_share is None else r.memory_share:g}",
        ]
        parts += [f"--kv-cache-dtype {r.kv_dtype}"] if r.kv_dtype != "bf16" else []
        parts += [f"--tensor-parallel-size {r.tensor_parallel}"] if r.tensor_parallel > 1 else []
        parts += ["--language-model-only"] if self.model.adapter.has_vision and not r.vision else []
        parts += ["--disable-hybrid-kv-cache-manager"] if r.frees is False else []
        return " ".join(parts)

    def facts(self) -> dict[str, Any]:
        """The whole plan as plain data, for scripts and for the record."""
        r, rules = self.request, self.request.rules
        rates = cache_rates(self.needs.layers, rules, r.kv_dtype, r.tensor_parallel, r.frees)
        said: dict[str, Any] = {
            "model": said_name(self.model.name),
            "family": self.model.adapter.family,
            "candidate": self.chosen.name,
            "gpu": None if self.card is None else self.card.key,
            "memory_share": rules.memory_share if r.memory_share is None else r.memory_share,
            "cards": r.tensor_parallel,
            **{k: getattr(r, k) for k in ("engine", "context", "sequences", "kv_dtype", "vision", "images")},
            "kv_per_token_bytes": rates.per_token_bytes,
            "kv_per_sequence_bytes": rates.per_sequence_bytes,
            "model_max_context": self.needs.most_context,
            "fits": self.fits,
        }
        if self.card is not None and self.row is not None:
            made = self.row.fit
            said |= {
                "batch_tokens": pass_tokens(self.card, r),
                **_numbers(self.row),
                "kv": asdict(made.cache),
                "workspace": asdict(made.workspace),
                "changes": [_change(change) for change in self.changes],
                "better": _change(self.better) if self.better is not None else None,
                "cards_needed": self.cards_needed,
                "bits_that_fit": self.bits,
                "serve": self.serve,
                "curves": self.curves,
            }
        rows = {row.name: row for row in self.rows}
        said["candidates"] = [
            {
                "name": c.name,
                "weight_bytes": c.choice(rules.dequantizes).weights.on_card(r.tensor_parallel, r.vision),
                **(_numbers(rows[c.name]) if c.name in rows else {}),
            }
            for c in self.candidates
        ]
        said["table"] = [
            {
                "gpu": entry.card.key,
                "name": entry.card.name,
                "source": entry.card.source,
                "cards_needed": entry.cards_needed,
                "all_usable_bytes": usable_bytes(entry.card, r),
                "candidate": entry.best.name if entry.best else None,
                **(_numbers(entry.best) if entry.best else {"fits": False}),
            }
            for entry in self.table
        ]
        return said | {"fit_warnings": list(self.warnings)}


def _change(change: Change) -> dict[str, Any]:
    return {"steps": list(change.steps), "candidate": change.choice, "left_bytes": change.fit.left_bytes}


def _numbers(row: CandidateFit) -> dict[str, Any]:
    made = row.fit
    return {
        "weight_bytes": made.weight_bytes,
        "kv_bytes": made.kv_bytes,
        "workspace_bytes": made.workspace_bytes,
        "usable_bytes": made.usable_bytes,
        "left_bytes": made.left_bytes,
        "fits": made.fits,
        "max_context": row.max_context,
        "max_sequences": row.max_sequences,
    }


def _refuse_images(adapter: Adapter, needs: Needs, request: Request) -> None:
    """Raise InputError if no vision tower would read the images, or if they take more tokens than the context has."""
    if request.images and not (adapter.has_vision and request.vision):
        why = "the vision tower is left out" if adapter.has_vision else f"{adapter.family} has none"
        raise InputError(f"--images {request.images} needs a vision tower, and {why}")
    if image_tokens(needs.sizes, request.images) > request.context:
        raise InputError(
            f"{request.images} images take up to {image_tokens(needs.sizes, request.images):,} tokens, and the context "
            f"has {request.context:,}: ask for fewer images, or a longer context"
        )


def _allowed(model: Model, request: Request, wanted: list[Candidate]) -> list[Candidate]:
    """The candidates of `wanted` that can be cut over the request's cards. Raises InputError if there are none."""
    adapter = model.adapter
    allowed = [c for c in wanted if not cut_problems(adapter, request.tensor_parallel, c.groups)]
    if not allowed:
        raise input_error(
            f"{model.name} cannot be cut over {request.tensor_parallel} cards:",
            cut_problems(adapter, request.tensor_parallel, wanted[-1].groups),
            "Take another number of cards, or a recipe with smaller groups.",
        )

    return allowed


def size_up(model: Model, request: Request, card: Card | None = None, recipe: Recipe | None = None) -> Sizing:
    """Plan the memory for a request without reading any weight.

    Raises InputError if the engine cannot do what is asked, if the images cannot be used, or if the model cannot be cut
    over the number of cards.
    """
    rules = engine_named(request.engine, request.kv_dtype, request.tensor_parallel)
    adapter = model.adapter
    needs = Needs.of(adapter)
    _refuse_images(adapter, needs, request)
    found = candidates_of(model, recipe)
    allowed = _allowed(model, request, [c for c in found if recipe is None or c.name == recipe.name])

    def row(candidate: Candidate, on: Card, asked: Request) -> CandidateFit:
        weights = candidate.choice(rules.dequantizes).weights.on_card(asked.tensor_parallel, asked.vision)
        made = fit(needs, on, weights, asked)
        return CandidateFit(
            candidate.name, made, max_context(needs, on, weights, asked), max_sequences(needs, on, weights, asked)
        )

    def best(on: Card) -> CandidateFit | None:
        """The first candidate that fits, or None. The one with the most bytes comes first."""
        return next((made for made in (row(c, on, request) for c in allowed) if made.fit.fits), None)

    def cards(candidate: Candidate, on: Card) -> int | None:
        weights = candidate.choice(rules.dequantizes).weights
        return cards_needed(needs, on, weights, request, lambda n: n >= request.tensor_parallel and cuts(candidate, n))

    def cuts(candidate: Candidate, count: int) -> bool:
        return (count == 1 or rules.tensor_parallel) and not cut_problems(adapter, count, candidate.groups)

    table = [CardRow(on, best(on), cards(allowed[-1], on)) for on in CARDS]
    rows = [] if card is None else [row(c, card, request) for c in found if cuts(c, request.tensor_parallel)]
    by_name = {made.name: made for made in rows}
    chosen = next((c for c in allowed if c.name in by_name and by_name[c.name].fit.fits), allowed[-1])
    own = by_name.get(chosen.name)
    offered: list[Change] = []
    needed = bits = better = None
    if card is not None and own is not None and own.fit.fits and recipe is None:
        # Find the first larger candidate that fits with smaller passes alone. Those do not change the answers.
        for larger in (c for c in allowed[: allowed.index(chosen)] if c.name in by_name):
            ways = changes(needs, card, larger.choice(rules.dequantizes), [], request, keep_tower=True)
            better = better or next((way for way in ways if way.cost <= PASS_COST), None)
    if card is not None and own is not None and not own.fit.fits:
        others = [c.choice(rules.dequantizes) for c in found if c.name in by_name]
        offered = changes(needs, card, chosen.choice(rules.dequantizes), others, request)
        needed = cards(chosen, card)
        bits = _bits(needs, card, request, chosen)
    return Sizing(
        model=model,
        request=request,
        needs=needs,
        card=card,
        chosen=chosen,
        candidates=tuple(found),
        row=own,
        rows=tuple(rows),
        changes=tuple(offered),
        better=better,
        cards_needed=needed,
        bits=bits,
        table=tuple(table),
        warnings=tuple(traps(model, needs, chosen, request, card)),
    )


def _bits(needs: Needs, card: Card, request: Request, chosen: Candidate) -> float:
    roles = {role.value for role in QUANTIZABLE}
    linear = [width for width in chosen.widths if width.role in roles]
    stored, parameters = sum(width.bytes for width in linear), sum(width.parameters for width in linear)
    return bits_that_fit(needs, card, request, chosen.weights, stored, parameters)
