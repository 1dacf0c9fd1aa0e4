"""The adapter contract: everything that is known of one family of checkpoints, in one place.

Canonical names. Checkpoints of one family spell the same weight differently: Llama 4's experts are one fused 3-D
tensor on disk and one 2-D Linear an expert in the file that an engine loads. Every weight therefore has one canonical
name, the unfused one with a 2-D weight `[out, in]`, and `locate` says where a given checkpoint keeps it. Reading an
original and reading an emitted checkpoint are then the same call.

Nobody outside models/ may test a tensor name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.tensors import TORCH_DTYPES, Index, TensorSource


class Role(StrEnum):
    """What a tensor is for. Recipes choose what to quantize by role."""

    EXPERT = "expert"
    SHARED = "shared_expert"
    MLP = "mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    VISION = "vision"


# Roles whose weights are Linear matrices of the text blocks: the only ones that may be quantized.
QUANTIZABLE = (Role.EXPERT, Role.SHARED, Role.MLP, Role.ATTENTION)


class Half(StrEnum):
    """A decoder layer is two halves, each of which adds what it computes to the residual stream."""

    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


@dataclass(frozen=True)
class Location:
    """Where one canonical weight lies in a checkpoint: a tensor, a part of it, and whether it is stored `[in, out]`."""

    tensor: str
    index: Index = ()
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """Weights of one block that read the same input, and so share one second moment.

    `members[e]` are the canonical module names whose weights, stacked along the outputs, are quantized as one matrix:
    gate and up of expert e. A site that is no expert site has one entry. All entries have equal shapes. Sites of one
    `stage` are quantized together, after those of earlier stages. `adds_to_residual`: the outputs are added to the
    residual stream as they are, unscaled. `reaches_residual`: so they are, or after a routing weight. `feeds`, of a
    site of gates and ups: the module that reads silu(gate) * up of each entry. `reads_norm`: the norm, by its name in
    the block, whose output every row of the site is.
    """

    key: str
    role: Role
    members: tuple[tuple[str, ...], ...]
    out_features: tuple[int, ...]
    in_features: int
    stage: int
    adds_to_residual: bool = False
    reaches_residual: bool = False
    feeds: tuple[str, ...] = ()
    reads_norm: str | None = None

    @property
    def half(self) -> Half:
        return Half.ATTENTION if self.role is Role.ATTENTION else Half.FEED_FORWARD


class Adapter(ABC):
    """One family, bound to one config. `config` is the transformers config object of the whole model."""

    family: str
    n_blocks: int
    n_experts: int
    top_k: int
    vocab_size: int
    hidden_size: int
    tied_head: bool
    image_token_id: int | None = None
    has_vision: bool = False
    embedding_name: str
    head_name: str
    norm_name: str
    # Names inside a decoder layer: the module of each half, and the norm that each half begins with.
    half_modules: ClassVar[dict[Half, str]]
    first_norm = "input_layernorm"
    middle_norm = "post_attention_layernorm"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """The config of the text model: what the decoder layers are built from."""

    @abstractmethod
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor that config.json promises."""

    @abstractmethod
    def locate(self, name: str, available: Collection[str]) -> Location:
        """Where a checkpoint with the tensors `available` keeps the canonical tensor `name`."""

    @abstractmethod
    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of every tensor, in the layout (fused or not) that the checkpoint uses."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """The role of a tensor, by its canonical or its stored name."""

    @abstractmethod
    def block_prefix(self, block: int) -> str: ...

    @abstractmethod
    def sites(self, block: int) -> tuple[Site, ...]:
        """Every site of a block, in the order of the computation."""

    def attention_sites(self, prefix: str, q: int, kv: int, hidden: int) -> list[Site]:
        """q, k and v each by itself: which tokens an error matters at differs between them by orders of magnitude."""

        def site(name: str, outputs: int, inputs: int, stage: int, **more: Any) -> Site:
            module = ((f"{prefix}self_attn.{name}_proj",),)
            return Site(f"self_attn.{name}", Role.ATTENTION, module, (outputs,), inputs, stage, **more)

        return [
            *(site(n, width, hidden, 0, reads_norm=self.first_norm) for n, width in (("q", q), ("k", kv), ("v", kv))),
            site("o", hidden, q, 1, adds_to_residual=True, reaches_residual=True),
        ]

    @abstractmethod
    def build_block(self, block: int) -> nn.Module:
        """The family's decoder layer on the meta device, its experts replaced by RoutedExperts."""

    @abstractmethod
    def text_skeleton(self) -> nn.Module:
        """The family's text model on the meta device: used to record what a layer is called with."""

    @abstractmethod
    def router_site(self, block: int) -> Site | None:
        """The router of a block with experts, as a site that is never quantized; it reads what `middle_norm` gives."""

    @abstractmethod
    def unit(self, module_name: str) -> str:
        """The unit of a canonical module, by the engine's name for it (`...self_attn.qkv_proj`,
        `...feed_forward.experts`): what the engine fuses, and so what must share one scheme. A module that is fused
        with no other is its own."""

    def permuted_at_load(self, module_name: str) -> bool:
        """Whether engines permute the rows of this module's weight when they load it, by the name of the tensor that
        stores it: a layout whose names they do not know is then loaded wrong."""
        return False

    def image_features(
        self, source: TensorSource, pixels: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Vision tower and projector: pixels fp32 [N, 3, S, S] -> features [N * tokens an image, hidden]."""
        raise AssertionError(f"{self.family} has no vision tower")

    def image_token_count(self) -> int:
        """Placeholder tokens that one image tile takes in a row."""
        raise AssertionError(f"{self.family} has no vision tower")

    def image_text(self) -> str:
        """What the chat template's image marker becomes in a row: markers and placeholders of one tile."""
        raise AssertionError(f"{self.family} has no vision tower")

    @staticmethod
    def mended(raw_config: dict[str, Any]) -> dict[str, Any]:
        """config.json with published values that transformers refuses by now written as it wants them; what is emitted
        has them so. `faults` warns of each."""
        return raw_config

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        """Known published faults found in config.json, each with what it should be. Warned of, not refused."""
        return []

    def modules(self, block: int) -> Iterator[tuple[Site, str, int, int]]:
        """Every quantizable module of a block: (site, canonical module name, outputs, inputs)."""
        for site in self.sites(block):
            for member in site.members:
                for name, out in zip(member, site.out_features, strict=True):
                    yield site, name, out, site.in_features


def read(adapter: Adapter, source: TensorSource, name: str) -> torch.Tensor:
    """The canonical tensor `name`, 2-D weights as `[out, in]`, whatever the checkpoint's layout."""
    where = adapter.locate(name, source.names)
    tensor = source.get(where.tensor, where.index)
    return tensor.T.contiguous() if where.transposed else tensor


def stored_dtype(adapter: Adapter, source: TensorSource, name: str) -> torch.dtype:
    """What the checkpoint keeps the canonical tensor `name` in."""
    return TORCH_DTYPES[source.info(adapter.locate(name, source.names).tensor).dtype]
