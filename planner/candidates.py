"""List what could be put on a card: what each recipe would emit for an original, or a checkpoint as it is.

Bytes are those of the stored tensors. They come from headers and recipes alone. A full plan lays out files, which takes
a second for a model with many experts. This module weighs several recipes in that time, so it asks the format for sizes
only once per scheme and shape. A test compares the sums with the plan's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod

from ..checkpoint.assign import schemes_of
from ..checkpoint.formats import compressed_tensors_config as ct_config
from ..checkpoint.formats import compressed_tensors_write as ct
from ..checkpoint.model import Model, is_original
from ..checkpoint.plan import Width, scale_dtypes, tally, width_name
from ..checkpoint.stored_widths import stored_weights
from ..core.errors import InputError
from ..core.layout import StoredTensor
from ..core.scheme import Scheme
from ..core.shipped_recipes import recipe_names
from ..core.tensors import TORCH_DTYPES
from ..recipe import Recipe, load_recipe
from .cards import find_card
from .changes import Alternative
from .weights import DeviceWeights, Place, device_weights, place_of

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Candidate:
    """Weights that could be put on the card."""

    name: str
    # The stored bytes, grouped by how they are split over several cards.
    weights: DeviceWeights
    # The same, with every tensor unpacked to the original's dtype.
    dense: DeviceWeights
    # Quantized module -> group size.
    groups: dict[str, int]
    # By role. The engines' remarks need them.
    widths: tuple[Width, ...]
    symmetric: bool
    # Whether transformers unpacks the weights when it loads them.
    unpacked: bool

    def choice(self, dequantizes: bool) -> Alternative:
        return Alternative(self.name, self.dense if dequantizes and self.unpacked else self.weights)


@dataclass(frozen=True)
class Entry:
    """A canonical tensor. It is looked up once and used for all recipes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    place: Place
    # The dtype of its scales where a run quantizes it; None for a tensor that is never quantized.
    scale_dtype: str | None = None

    @property
    def dense_bytes(self) -> int:
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def entries_of(model: Model) -> tuple[Entry, ...]:
    adapter, source = model.adapter, model.source
    scales = scale_dtypes(adapter, source)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        dtype = source.info(adapter.locate(name, source.names).tensor).dtype
        of_scales = scales.get(name.removesuffix(".weight"))
        return Entry(name, shape, dtype, adapter.role(name).value, place_of(adapter, name), of_scales)

    return tuple(entry(name, shape) for name, shape in adapter.expected().items())


@cache
def packed_bytes(scheme: Scheme, outputs: int, inputs: int, dtype: str) -> int:
    """The bytes that the format stores for one weight of shape (outputs, inputs)."""
    stored = ct.layout(scheme, outputs, inputs, dtype)
    return sum(StoredTensor(suffix, kind, shape).nbytes for suffix, (kind, shape) in stored.items())


def bytes_at(entry: Entry, scheme: Scheme | None) -> int:
    """The bytes of a tensor under a scheme. None means the dtype of the source."""
    return entry.dense_bytes if scheme is None else packed_bytes(scheme, *entry.shape, entry.scale_dtype or entry.dtype)


def recipe_candidate(model: Model, entries: tuple[Entry, ...], recipe: Recipe) -> Candidate:
    """What a run with the recipe would emit. Raises InputError if the recipe does not suit the model."""
    schemes = schemes_of(model.adapter, recipe)

    def scheme(entry: Entry) -> Scheme | None:
        return schemes.get(entry.name.removesuffix(".weight")) if entry.name.endswith(".weight") else None

    return _candidate(
        model,
        entries,
        recipe.name,
        lambda entry: bytes_at(entry, scheme(entry)),
        lambda entry: width_name(scheme(entry), entry.dtype),
        {module: found.group_size for module, found in schemes.items()},
        all(found.symmetric for found in schemes.values()),
        unpacked=True,
    )


def own_candidate(model: Model, entries: tuple[Entry, ...]) -> Candidate:
    """The checkpoint as it is stored."""
    stored = stored_weights(model)
    groups, symmetric = {}, True
    for name, found in stored.items():
        try:
            scheme = Scheme.parse(found.width)
        except ValueError:
            continue  # The width is a dtype, or another format's name for a scheme.
        groups[name.removesuffix(".weight")] = scheme.group_size
        symmetric = symmetric and scheme.symmetric
    unpacked = model.quantized and getattr(model.source, "label", "").startswith(ct_config.NAME)
    return _candidate(
        model,
        entries,
        AS_IT_IS,
        lambda entry: stored[entry.name].bytes,
        lambda entry: stored[entry.name].width,
        groups,
        symmetric,
        unpacked,
    )


def _candidate(
    model: Model,
    entries: tuple[Entry, ...],
    name: str,
    size: Callable[[Entry], int],
    width: Callable[[Entry], str],
    groups: dict[str, int],
    symmetric: bool,
    unpacked: bool,
) -> Candidate:
    return Candidate(
        name,
        device_weights(model.adapter, ((entry.place, size(entry)) for entry in entries)),
        device_weights(model.adapter, ((entry.place, entry.dense_bytes) for entry in entries)),
        groups,
        tally(Width(entry.role, width(entry), prod(entry.shape), size(entry)) for entry in entries),
        symmetric,
        unpacked,
    )


def candidates_of(model: Model, recipe: Recipe | None) -> list[Candidate]:
    """All candidates of a model, the most bytes first.

    An original gives itself, the result of `recipe`, and the result of every shipped recipe that suits it. A quantized
    checkpoint gives only itself. Raises InputError if `recipe` does not suit the model.
    """
    entries = entries_of(model)
    found = [own_candidate(model, entries)]
    if not is_original(model):
        return found
    if recipe is not None:
        found.append(recipe_candidate(model, entries, recipe))
    # Demo recipes are left out because they are made for the demo's texts.
    named = [load_recipe(name) for name in recipe_names() if not name.startswith("demo")]
    # Recipes with `bits: fit` are left out because their widths are known only after sensitivities are measured.
    # bitsandbytes is left out because vLLM 0.32 has no loader for its files.
    shipped = [each for each in named if each.widths.bits != "fit" and each.format != "bitsandbytes"]
    # Of two results of the same size, the first is kept. So the family's own recipes come first, and among them those
    # for the fewest cards.
    for each in sorted(shipped, key=lambda r: (r.family is None, find_card(r.card.gpu)[0] if r.card.gpu else 1)):
        if each.family in (None, model.adapter.family) and (recipe is None or each.name != recipe.name):
            try:
                made = recipe_candidate(model, entries, each)
            except InputError:
                continue  # The recipe's groups or roles do not suit this model.
            if all(made.weights.total_bytes != other.weights.total_bytes for other in found):
                found.append(made)
    return sorted(found, key=lambda c: -c.weights.total_bytes)
