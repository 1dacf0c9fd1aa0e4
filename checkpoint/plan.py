"""Plan: every tensor that a run will write, in its shard, with exact sizes, computed from headers alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from ..core.layout import StoredTensor, file_bytes, index_json, json_bytes, shard_name, split_shards
from ..core.scheme import Scheme
from ..core.tensors import DTYPE_NAMES, TensorSource
from ..models.adapter import Adapter, scale_dtype
from .source import INDEX_NAME, SINGLE_NAME

# How a format stores one weight: (scheme, outputs, inputs, model dtype) -> suffix -> (dtype, shape).
Layout = Callable[[Scheme, int, int, str], dict[str, tuple[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint."""

    file: str
    # The block that it belongs to, or the number of blocks for tensors outside the blocks; None for the whole model.
    part: int | None
    tensors: tuple[StoredTensor, ...]

    @cached_property
    def file_bytes(self) -> int:
        return file_bytes(list(self.tensors))

    @property
    def data_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Width:
    """How much of one role is stored at one width (`int4 group 128`, `BF16`)."""

    role: str
    width: str
    parameters: int
    # Codes, scales and shapes together.
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will write."""

    # What a run writes block by block into its work directory.
    pieces: tuple[Shard, ...]
    # The checkpoint's files: the pieces, or one file that is joined from them.
    shards: tuple[Shard, ...]
    # Module -> Scheme.
    schemes: dict[str, Scheme]
    # All weights of the model, quantized or not.
    parameters: int
    quantized_parameters: int
    quantized_bytes: int
    # The source's safetensors files, headers included.
    source_bytes: int
    # Largest first.
    widths: tuple[Width, ...]

    @property
    def role_bytes(self) -> dict[str, int]:
        """Role -> bytes of its tensors, largest first."""
        roles = [width.role for width in self.widths]
        sums = {role: sum(width.bytes for width in self.widths if width.role == role) for role in roles}
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def emitted_bytes(self) -> int:
        """All safetensors files, headers included."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def weight_bytes(self) -> int:
        """The tensors alone: `emitted_bytes` without the files' headers."""
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def disk_bytes(self) -> int:
        """The most that the files need on disk: a file that is joined from pieces lies beside them for a while."""
        joined = self.shards != self.pieces
        return self.emitted_bytes + (sum(piece.file_bytes for piece in self.pieces) if joined else 0)

    @cached_property
    def index_bytes(self) -> int:
        """The index file, which maps each tensor to its shard; 0 for a single file, which has none."""
        return sum(map(len, index_files(self.shards).values()))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all shards per parameter, unquantized parameters included."""
        return self.emitted_bytes * 8 / self.parameters

    @property
    def quantized_bits_per_weight(self) -> float:
        """Bits of codes, scales and shapes per quantized weight."""
        return self.quantized_bytes * 8 / self.quantized_parameters

    def facts(self) -> dict[str, Any]:
        """The record's section `plan`."""
        return {
            "emitted_bytes": self.emitted_bytes,
            "weight_bytes": self.weight_bytes,
            "index_bytes": self.index_bytes,
            "source_bytes": self.source_bytes,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "quantized_share": self.quantized_parameters / self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "shards": len(self.shards),
            "widths": [asdict(width) for width in self.widths],
        }

    def tensors(self) -> Iterator[tuple[Shard, StoredTensor]]:
        for shard in self.shards:
            for tensor in shard.tensors:
                yield shard, tensor


def width_name(scheme: Scheme | None, dtype: str) -> str:
    """A weight's width in words: its scheme if it is quantized, otherwise its dtype."""
    return dtype if scheme is None else str(scheme)


def tally(stored: Iterable[Width]) -> tuple[Width, ...]:
    """Add up the entries of each role and width, largest first."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for entry in stored:
        parameters, count = sums.get((entry.role, entry.width), (0, 0))
        sums[entry.role, entry.width] = parameters + entry.parameters, count + entry.bytes
    return tuple(Width(*key, *value) for key, value in sorted(sums.items(), key=lambda item: -item[1][1]))


def make_plan(
    adapter: Adapter,
    source: TensorSource,
    schemes: dict[str, Scheme],
    layout: Layout,
    max_shard_bytes: int,
    source_bytes: int,
    scale_dtypes: Mapping[str, str] | None = None,
) -> Plan:
    """Lay out the whole checkpoint from names and shapes alone. `scale_dtypes`: module -> the dtype of its scales;
    without one, a module's scales have the dtype of its weight."""
    shapes = adapter.expected()
    quantized = quantized_bytes = 0
    widths: list[Width] = []

    def atom(name: str) -> list[StoredTensor]:
        nonlocal quantized, quantized_bytes
        dtype = source.info(adapter.locate(name, source.names).tensor).dtype
        module = name.removesuffix(".weight")
        if module in schemes and name.endswith(".weight"):
            outputs, inputs = shapes[name]
            stored = layout(schemes[module], outputs, inputs, (scale_dtypes or {}).get(module, dtype))
            tensors = [StoredTensor(f"{module}.{suffix}", d, s) for suffix, (d, s) in stored.items()]
            quantized += outputs * inputs
            quantized_bytes += sum(t.nbytes for t in tensors)
        else:
            tensors = [StoredTensor(name, dtype, shapes[name])]
        width = width_name(schemes.get(module) if name.endswith(".weight") else None, dtype)
        stored_bytes = sum(t.nbytes for t in tensors)
        widths.append(Width(adapter.role(name).value, width, prod(shapes[name]), stored_bytes))
        return tensors

    parts = [[atom(name) for name in names] for names in by_part(adapter, shapes)]
    pieces = pieces_of(parts, max_shard_bytes)
    return Plan(
        pieces=pieces,
        shards=shards_of(pieces, max_shard_bytes),
        schemes=schemes,
        parameters=sum(prod(shape) for shape in shapes.values()),
        quantized_parameters=quantized,
        quantized_bytes=quantized_bytes,
        source_bytes=source_bytes,
        widths=tally(widths),
    )


def scale_dtypes(adapter: Adapter, source: TensorSource) -> dict[str, str]:
    """Quantizable module -> the dtype of the scales that a run gives it."""
    return {
        name: dtype
        for block in range(adapter.n_blocks)
        for site in adapter.sites(block)
        for dtype in [DTYPE_NAMES[scale_dtype(adapter, source, site)]]
        for member in site.members
        for name in member
    }


def by_part(adapter: Adapter, names: Iterable[str]) -> list[list[str]]:
    """Names sorted within each block, one list per block; the last list holds the names outside the blocks."""
    prefixes = [adapter.block_prefix(block) for block in range(adapter.n_blocks)]
    by_prefix: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    rest: list[str] = []
    for name in sorted(names):
        prefix = _block_prefix(name, by_prefix)
        (rest if prefix is None else by_prefix[prefix]).append(name)
    return [*(by_prefix[prefix] for prefix in prefixes), rest]


def pieces_of(parts: list[list[list[StoredTensor]]], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Files that each hold tensors of one part only; the inner lists of tensors stay together."""
    split = split_shards(parts, max_shard_bytes)
    return tuple(Shard(shard_name(i, len(split)), part, tuple(tensors)) for i, (part, tensors) in enumerate(split))


def shards_of(pieces: tuple[Shard, ...], max_shard_bytes: int) -> tuple[Shard, ...]:
    """A checkpoint's files: one if all tensors fit into `max_shard_bytes`, named as transformers does; otherwise the
    pieces."""
    whole = Shard(SINGLE_NAME, None, tuple(tensor for piece in pieces for tensor in piece.tensors))
    return (whole,) if whole.file_bytes <= max_shard_bytes else pieces


def index_files(shards: Iterable[Shard]) -> dict[str, bytes]:
    """Name -> content of the index. A single file has none, as transformers writes it and loaders expect it."""
    shards = tuple(shards)
    return {} if [shard.file for shard in shards] == [SINGLE_NAME] else {INDEX_NAME: json_bytes(index_json(shards))}


def _block_prefix(name: str, prefixes: dict[str, list[str]]) -> str | None:
    """The prefix of the block that `name` belongs to: 'a.layers.12.' of 'a.layers.12.x.weight'."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end]) + "."
        if prefix in prefixes:
            return prefix
    return None
