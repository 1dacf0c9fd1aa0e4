"""Does it fit: a checkpoint's bytes, a card, and what is asked of them, in one sum; and how far each can go.

    usable = visible memory x the engine's share         left = usable - weights - cache - workspace

on the card that holds most; with tensor parallelism all hold alike. Weights and cache are exact (weights.py, kv.py),
workspace is an estimate (workspace.py). What grows with context or sequences never falls with them, so the most that
fits is found by bisection.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ..models.adapter import Adapter
from ..models.cache import CacheLayer
from .cards import Card
from .engines import ENGINES, Engine
from .kv import CacheBytes, cache_bytes
from .weights import DeviceWeights
from .workspace import Sizes, Workspace, sizes_of, workspace_bytes

# More sequences at once than any engine schedules by default; a search has to end somewhere.
MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Request:
    """What is asked for. context: tokens of each sequence, prompt and answer; sequences: at once; images: of a request,
    their tokens are part of the context. batch_tokens, memory_share, frees: None is the engine's own."""

    context: int
    sequences: int = 1
    kv_dtype: str = "bf16"
    engine: str = "vllm"
    tensor_parallel: int = 1
    vision: bool = True
    images: int = 0
    batch_tokens: int | None = None
    memory_share: float | None = None
    frees: bool | None = None

    @property
    def rules(self) -> Engine:
        return ENGINES[self.engine]


@dataclass(frozen=True)
class Needs:
    """Of a model what does not change with its bits."""

    layers: tuple[CacheLayer, ...]
    sizes: Sizes

    @classmethod
    def of(cls, adapter: Adapter) -> "Needs":
        return cls(adapter.cache_layers(), sizes_of(adapter))

    @property
    def most_context(self) -> int:
        """Positions that the model was made for, or the search's own end."""
        return self.sizes.positions or 2**24


@dataclass(frozen=True)
class Fit:
    """One card's bytes."""

    card: Card
    request: Request
    weight_bytes: int
    cache: CacheBytes
    workspace: Workspace

    @property
    def kv_bytes(self) -> int:
        return self.cache.total_bytes

    @property
    def workspace_bytes(self) -> int:
        return self.workspace.total_bytes

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    @cached_property
    def usable_bytes(self) -> int:
        return usable_bytes(self.card, self.request)

    @property
    def left_bytes(self) -> int:
        """Negative: so much is missing."""
        return self.usable_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        return self.left_bytes >= 0


def usable_bytes(card: Card, request: Request) -> int:
    """What the engine takes of the card."""
    share = request.rules.memory_share if request.memory_share is None else request.memory_share
    return int(card.visible_bytes * share)


def pass_tokens(card: Card, request: Request) -> int | None:
    """Tokens of one pass: what was asked for, else what the engine takes on this card."""
    if request.batch_tokens is not None:
        return request.batch_tokens
    return card.batch_tokens if request.engine == "vllm" else request.rules.batch_tokens


def fit(needs: Needs, card: Card, weight_bytes: int, request: Request) -> Fit:
    """`weight_bytes`: on one card (DeviceWeights.on_card)."""
    batch = pass_tokens(card, request)
    cache = cache_bytes(
        needs.layers,
        request.context,
        request.sequences,
        request.rules,
        request.kv_dtype,
        request.tensor_parallel,
        batch,
        request.frees,
    )
    work = workspace_bytes(
        needs.sizes,
        request.rules,
        request.context,
        request.sequences,
        request.tensor_parallel,
        batch,
        request.images if request.vision else 0,
    )
    return Fit(card, request, weight_bytes, cache, work)


def weight_budget_bytes(needs: Needs, card: Card, request: Request) -> int:
    """The most bytes of weights that fit on each card beside what is asked for; below zero if nothing does."""
    return fit(needs, card, 0, request).left_bytes


def most(good: Callable[[int], bool], limit: int) -> int:
    """The largest n of 1 to `limit` that is good, 0 if none is; whatever is good stays so for smaller n."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def max_context(needs: Needs, card: Card, weight_bytes: int, request: Request) -> int:
    """The longest context that fits, no longer than the model's positions; 0: not one token."""
    return most(lambda n: fit(needs, card, weight_bytes, replace(request, context=n)).fits, needs.most_context)


def max_sequences(needs: Needs, card: Card, weight_bytes: int, request: Request) -> int:
    """The most sequences of that context that fit; 0: not one."""
    return most(lambda n: fit(needs, card, weight_bytes, replace(request, sequences=n)).fits, MOST_SEQUENCES)


def cards_needed(
    needs: Needs, card: Card, weights: DeviceWeights, request: Request, allowed: Callable[[int], bool]
) -> int | None:
    """The least number of such cards (1, 2, 4 ... 64) that holds it, of those that the model can be cut over."""
    for count in (1, 2, 4, 8, 16, 32, 64):
        spread = replace(request, tensor_parallel=count)
        if allowed(count) and fit(needs, card, weights.on_card(count, request.vision), spread).fits:
            return count
    return None


def bits_that_fit(
    needs: Needs, card: Card, request: Request, weights: DeviceWeights, linear_bytes: int, linear_parameters: int
) -> float:
    """Bits that each weight of the text blocks' linear matrices could have, scales included, if all had the same and
    the rest of the checkpoint stayed as it is. Below zero if the rest alone is too much. Several cards: as if the
    matrices were cut evenly."""
    other = weights.on_card(request.tensor_parallel, request.vision) - linear_bytes / request.tensor_parallel
    budget = weight_budget_bytes(needs, card, request) - other
    return 8 * budget * request.tensor_parallel / linear_parameters
