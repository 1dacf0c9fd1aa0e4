"""Decide whether a checkpoint fits a card for a request, and find the longest context and the most sequences that fit.

    usable = visible memory x the engine's share         left = usable - weights - cache - workspace

The sum is for the fullest card; with tensor parallelism all cards hold the same. Weights and cache are exact
(weights.py, kv.py). The workspace is an estimate (workspace.py). The bytes never fall as context or sequences grow, so
bisection finds the largest value that fits.
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

# The search for sequences ends here. No engine schedules this many at once by default.
MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Request:
    """What the user wants to run."""

    # Tokens of each sequence: prompt and answer.
    context: int
    # Sequences served at the same time.
    sequences: int = 1
    kv_dtype: str = "bf16"
    engine: str = "vllm"
    tensor_parallel: int = 1
    vision: bool = True
    # Images in each request. Their tokens count as part of the context.
    images: int = 0
    # For the three below, None means the engine's default.
    batch_tokens: int | None = None
    memory_share: float | None = None
    frees: bool | None = None

    @property
    def rules(self) -> Engine:
        return ENGINES[self.engine]


@dataclass(frozen=True)
class Needs:
    """The facts about a model that do not depend on the width of its weights."""

    layers: tuple[CacheLayer, ...]
    sizes: Sizes

    @classmethod
    def of(cls, adapter: Adapter) -> "Needs":
        return cls(adapter.cache_layers(), sizes_of(adapter))

    @property
    def most_context(self) -> int:
        """The model's number of positions, or the search's limit if the config has none."""
        return self.sizes.positions or 2**24


@dataclass(frozen=True)
class Fit:
    """The bytes that a request needs on one card."""

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
        """Bytes left over. A negative value is the number of bytes missing."""
        return self.usable_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        return self.left_bytes >= 0


def usable_bytes(card: Card, request: Request) -> int:
    """Bytes of the card that the engine uses."""
    share = request.rules.memory_share if request.memory_share is None else request.memory_share
    return int(card.visible_bytes * share)


def pass_tokens(card: Card, request: Request) -> int | None:
    """Tokens of one forward pass: the request's value, or the engine's default on this card. None: the whole prompt."""
    if request.batch_tokens is not None:
        return request.batch_tokens
    return card.batch_tokens if request.engine == "vllm" else request.rules.batch_tokens


def fit(needs: Needs, card: Card, weight_bytes: int, request: Request) -> Fit:
    """Add up the bytes on one card. `weight_bytes` is one card's share of the weights (DeviceWeights.on_card)."""
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
    """The most bytes of weights that fit on each card beside the request. Negative if that alone does not fit."""
    return fit(needs, card, 0, request).left_bytes


def most(good: Callable[[int], bool], limit: int) -> int:
    """The largest n from 1 to `limit` with good(n), or 0. If good(n) holds, it must hold for every smaller n too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def max_context(needs: Needs, card: Card, weight_bytes: int, request: Request) -> int:
    """The longest context that fits, at most the model's positions. 0 means that not one token fits."""
    return most(lambda n: fit(needs, card, weight_bytes, replace(request, context=n)).fits, needs.most_context)


def max_sequences(needs: Needs, card: Card, weight_bytes: int, request: Request) -> int:
    """The most sequences of the request's context that fit, at most MOST_SEQUENCES. 0 means that none fits."""
    return most(lambda n: fit(needs, card, weight_bytes, replace(request, sequences=n)).fits, MOST_SEQUENCES)


def cards_needed(
    needs: Needs, card: Card, weights: DeviceWeights, request: Request, allowed: Callable[[int], bool]
) -> int | None:
    """The smallest number of these cards (1, 2, 4 ... 64) that holds the request, or None if none of them does.

    `allowed(count)` says whether the model can be cut over `count` cards.
    """
    for count in (1, 2, 4, 8, 16, 32, 64):
        spread = replace(request, tensor_parallel=count)
        if allowed(count) and fit(needs, card, weights.on_card(count, request.vision), spread).fits:
            return count
    return None


def bits_that_fit(
    needs: Needs, card: Card, request: Request, weights: DeviceWeights, linear_bytes: int, linear_parameters: int
) -> float:
    """The bits per weight, scales included, at which the text blocks' linear matrices would just fit.

    All matrices get the same width, and the rest of the checkpoint stays as it is. The result is negative if the rest
    alone does not fit. With several cards, the matrices are taken to be cut evenly.
    """
    other = weights.on_card(request.tensor_parallel, request.vision) - linear_bytes / request.tensor_parallel
    budget = weight_budget_bytes(needs, card, request) - other
    return 8 * budget * request.tensor_parallel / linear_parameters
