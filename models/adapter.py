"""The adapter contract: one class holds everything that is known of one family of checkpoints.

Canonical names. Checkpoints of one family spell the same weight differently: Llama 4's experts are one fused 3-D
tensor in the original and one 2-D Linear per expert in a file that an engine loads. Every weight therefore has one
canonical name, that of the unfused 2-D weight `[out, in]`, and `locate` says where a checkpoint keeps it. An original
and an emitted checkpoint are then read by the same call.

Nobody outside models/ may test a tensor name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.device import Compute
from ..core.tensors import TORCH_DTYPES, Index, TensorSource
from .cache import SPLITS, CacheLayer, Split, attention_caches


class Role(StrEnum):
    """The purpose of a tensor. Recipes choose by role which tensors are quantized."""

    EXPERT = "expert"
    SHARED = "shared_expert"
    MLP = "mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    VISION = "vision"


# The roles that may be quantized: their weights are the Linear matrices of the text blocks.
QUANTIZABLE = (Role.EXPERT, Role.SHARED, Role.MLP, Role.ATTENTION)


class Half(StrEnum):
    """A decoder layer has two halves. Each adds its output to the residual stream."""

    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"

    @property
    def said(self) -> str:
        """In a message."""
        return f"{self.value.replace('_', '-')} half"


@dataclass(frozen=True)
class Location:
    """Where a checkpoint keeps one canonical weight: a stored tensor or a part of it, perhaps as `[in, out]`."""

    tensor: str
    index: Index = ()
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """Weights of one block that read the same input, and so share one second moment."""

    key: str  # unique in the block
    role: Role
    # For each expert (one entry without experts), the canonical names of the modules whose weights, stacked along the
    # outputs, are quantized as one matrix: its gate and up, say. All entries have equal shapes.
    members: tuple[tuple[str, ...], ...]
    out_features: tuple[int, ...]  # of each module of an entry
    in_features: int
    # Sites of one turn are quantized together, after those of lower turns.
    turn: int
    # Whether the outputs are added to the residual stream: as they are, or multiplied by a routing weight.
    adds_to_residual: bool = False
    # How many entries each token meets.
    entries_per_token: int = 1
    # For gates and ups: the module that reads silu(gate) * up, for each entry.
    feeds: tuple[str, ...] = ()
    # The norm whose output every row of the site is, by its name in the block. Only a norm that begins a half counts.
    reads_norm: str | None = None

    @property
    def first_module(self) -> str:
        """Stands for the site where all its modules agree: in their scheme, their stored dtype, their unit."""
        return self.members[0][0]

    @property
    def half(self) -> Half:
        return Half.ATTENTION if self.role is Role.ATTENTION else Half.FEED_FORWARD


FUSED_QKV = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
FUSED_GATE_UP = dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


class Adapter(ABC):
    """One family with one config, the transformers config object of the whole model."""

    family: str
    n_blocks: int
    n_experts: int
    top_k: int
    vocab_size: int
    hidden_size: int
    tied_head: bool
    image_token_id: int | None = None
    has_vision: bool = False
    image_tiles: int = 1  # the most tiles that one image is cut into
    embedding_name: str
    head_name: str
    norm_name: str
    # Names inside a decoder layer: the module of each half, and the norm that begins each half.
    half_modules: ClassVar[dict[Half, str]]
    first_norm = "input_layernorm"
    middle_norm = "post_attention_layernorm"
    # The router, by its name in a decoder layer.
    router_name: ClassVar[str]
    # The leaf names of gate, up and down.
    projections: ClassVar = ("gate_proj", "up_proj", "down_proj")
    # Leaf name -> the module into which engines fuse it with others. Any other module is a unit of its own.
    fused_leaves: ClassVar[dict[str, str]] = FUSED_QKV | FUSED_GATE_UP
    # Leaf name -> how tensor parallelism splits it. Any other leaf is copied to every card.
    splits: ClassVar[dict[str, Split]] = SPLITS
    # Whether the family's makers publish fp8, so that an fp8 checkpoint is an original.
    published_in_fp8 = False
    # Classes that an `auto_map` may name because transformers' own class computes the same. They are never run.
    known_code: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """The config of the text model, from which the decoder layers are built."""

    def text_only(self) -> "Adapter":
        """The same model without its vision tower, for formats that hold none. Names lose the multimodal prefix."""
        assert not self.has_vision
        return self

    @abstractmethod
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor that config.json promises."""

    @abstractmethod
    def locate(self, name: str, available: Collection[str]) -> Location:
        """Where a checkpoint with the tensors `available` keeps the canonical tensor `name`."""

    def stored_twice(self, available: Collection[str]) -> list[str]:
        """The stored tensors of which `available` holds a second copy in another layout; a line each."""
        return []

    @abstractmethod
    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of every tensor, in the checkpoint's own layout (fused or not)."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """The role of a tensor, given its canonical or its stored name."""

    @abstractmethod
    def block_prefix(self, block: int) -> str: ...

    @abstractmethod
    def is_moe(self, block: int) -> bool:
        """Whether the block has routed experts."""

    @abstractmethod
    def sites(self, block: int) -> tuple[Site, ...]:
        """Every site of a block, in the order of computation."""

    def attention_sites(self, prefix: str, q: int, kv: int, hidden: int) -> list[Site]:
        """q, k, v and o, given the widths. q, k and v are three sites although they read the same rows: which tokens
        their errors matter at differs by orders of magnitude."""

        def site(name: str, outputs: int, inputs: int, turn: int, **more: Any) -> Site:
            return Site(
                key=f"self_attn.{name}",
                role=Role.ATTENTION,
                members=((f"{prefix}self_attn.{name}_proj",),),
                out_features=(outputs,),
                in_features=inputs,
                turn=turn,
                **more,
            )

        return [
            *(site(n, width, hidden, 0, reads_norm=self.first_norm) for n, width in (("q", q), ("k", kv), ("v", kv))),
            site("o", hidden, q, 1, adds_to_residual=True),
        ]

    def swiglu_sites(self, key: str, role: Role, prefixes: Sequence[str], width: int) -> list[Site]:
        """Two sites, gates with ups and downs, of one SwiGLU or of all experts. `prefixes`: the module prefix of each;
        `width`: the intermediate size of each.

        A shared expert's down projection takes the last turn: it sees every token and mends the others' errors."""
        gate, up, down = self.projections
        downs = tuple(f"{prefix}{down}" for prefix in prefixes)
        at_once = self.top_k if role is Role.EXPERT else 1
        return [
            Site(
                key=f"{key}gate_up",
                role=role,
                members=tuple((f"{prefix}{gate}", f"{prefix}{up}") for prefix in prefixes),
                out_features=(width, width),
                in_features=self.hidden_size,
                turn=3,
                feeds=downs,
                entries_per_token=at_once,
            ),
            Site(
                key=f"{key}down",
                role=role,
                members=tuple((name,) for name in downs),
                out_features=(self.hidden_size,),
                in_features=width,
                turn=5 if role is Role.SHARED else 4,
                adds_to_residual=True,
                entries_per_token=at_once,
            ),
        ]

    def router_site(self, block: int) -> Site | None:
        """The router of a block with experts, as a site that is never quantized. It reads `middle_norm`'s output."""
        if not self.is_moe(block):
            return None
        return Site(
            key=self.router_name,
            role=Role.ROUTER,
            members=((f"{self.block_prefix(block)}{self.router_name}",),),
            out_features=(self.n_experts,),
            in_features=self.hidden_size,
            turn=2,
            reads_norm=self.middle_norm,
        )

    @abstractmethod
    def build_block(self, block: int) -> nn.Module:
        """The family's decoder layer on the meta device, its experts replaced by RoutedExperts."""

    @abstractmethod
    def text_skeleton(self) -> nn.Module:
        """The family's text model on the meta device; models/calls.py uses it to record the arguments of a layer."""

    def ranking(self, layer: nn.Module, logits_TE: torch.Tensor) -> torch.Tensor:
        """What the router of a loaded layer ranks experts by, given its logits. Each value depends on its own logit
        alone; it is -inf for an expert that cannot be chosen."""
        return logits_TE

    def unit(self, module_name: str) -> str:
        """The unit of a canonical module, by the engine's name for it (`...self_attn.qkv_proj`,
        `...feed_forward.experts`). An engine fuses the modules of a unit, so they must share one scheme. All experts of
        a layer are one unit."""
        head, _, leaf = module_name.rpartition(".")
        if ".experts." in module_name:
            return head.rpartition(".")[0]
        return f"{head}.{self.fused_leaves[leaf]}" if leaf in self.fused_leaves else module_name

    def fused_tensor(self, module_name: str) -> str | None:
        """The 3-D tensor of all experts in which a tool that keeps experts fused leaves this expert's matrix. None for
        a module outside the experts."""
        stem, _, rest = module_name.partition(".experts.")
        if not rest:
            return None
        projection = rest.rpartition(".")[2]
        return f"{stem}.experts.{projection if projection == 'down_proj' else 'gate_up_proj'}"

    def permuted_at_load(self, module_name: str) -> bool:
        """Whether an engine reorders this module's rows as it loads them: it rotates the two halves of a head, and the
        family's own RoPE rotates neighbours. All that belongs to a row (codes, scales, zero points) must move along."""
        return False

    def otherwise_in_vllm(self) -> list[str]:
        """The config.json keys with which vLLM computes another model than transformers does; a line each."""
        return []

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """The cache of each decoder layer, in order."""
        return attention_caches(self.text_config)

    def split(self, name: str) -> Split:
        """How tensor parallelism splits the canonical tensor `name`. The vision tower counts as copied to every
        card, which errs high."""
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        return Split.COPIED if self.role(name) is Role.VISION else self.splits.get(leaf, Split.COPIED)

    def image_features(self, source: TensorSource, pixels: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Vision tower and projector: pixels fp32 [N, 3, S, S] -> features [N * tokens per tile, H] on the CPU."""
        raise AssertionError(f"{self.family} has no vision tower")

    def run_picture(self) -> None:
        """A picture through vision tower and projector on the meta device. Raises what transformers raises."""
        raise AssertionError(f"{self.family} has no vision tower")

    def image_token_count(self) -> int:
        """Placeholder tokens of one image tile in a row."""
        raise AssertionError(f"{self.family} has no vision tower")

    def image_text(self) -> str:
        """The text that replaces the chat template's image marker: markers and placeholders of one tile."""
        raise AssertionError(f"{self.family} has no vision tower")

    @property
    def tied_copy(self) -> str | None:
        """The name under which a file may hold a copy of a tied head, which is the embedding; None without one."""
        return f"{self.embedding_name.rpartition('model.')[0]}lm_head.weight" if self.tied_head else None

    def left_aside(self, available: Collection[str]) -> set[str]:
        """The stored tensors that are neither read nor emitted, since they say nothing that the others do not: a copy
        of a tied head (checkpoint/source_checks.py compares it), and frequencies that follow from config.json. What a
        family adds to them, `aside_warnings` tells."""
        return {name for name in available if name == self.tied_copy or name.endswith(".rotary_emb.inv_freq")}

    def aside_warnings(self, available: Collection[str]) -> list[str]:
        """What a measurement and the result lack because of `left_aside`, as far as config.json does not say it."""
        return []

    @staticmethod
    def mended(raw_config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the published values that today's transformers refuses written in its present form. The
        emitted config has them in that form too. `faults` warns of each."""
        return raw_config

    def emitted(self, raw_config: dict[str, Any]) -> dict[str, Any]:
        """config.json as it is emitted, without the quantization block."""
        return self.mended(raw_config)

    def faults(self, raw_config: dict[str, Any]) -> list[str]:
        """The known faults of published files in this config.json, each with the right value. They are warnings."""
        return []

    def modules(self, block: int) -> Iterator[tuple[Site, str, int, int]]:
        """Every quantizable module of a block: (site, canonical module name, outputs, inputs)."""
        for site in self.sites(block):
            for member in site.members:
                for name, out in zip(member, site.out_features, strict=True):
                    yield site, name, out, site.in_features


def read(adapter: Adapter, source: TensorSource, name: str) -> torch.Tensor:
    """The canonical tensor `name`; 2-D weights are `[out, in]` in every checkpoint layout."""
    where = adapter.locate(name, source.names)
    tensor = source.get(where.tensor, where.index)
    return tensor.T.contiguous() if where.transposed else tensor


def stored_dtype(adapter: Adapter, source: TensorSource, name: str) -> torch.dtype:
    """The dtype in which the checkpoint stores the canonical tensor `name`."""
    return TORCH_DTYPES[source.info(adapter.locate(name, source.names).tensor).dtype]


def site_dtypes(adapter: Adapter, source: TensorSource, site: Site) -> frozenset[torch.dtype]:
    """The dtypes in which the checkpoint stores the weights of a site; nearly always one."""
    return frozenset(stored_dtype(adapter, source, f"{name}.weight") for member in site.members for name in member)


def scale_dtype(adapter: Adapter, source: TensorSource, site: Site) -> torch.dtype:
    """The dtype of the scales that a site gets, which plan and run must agree on: the one of its weights; bf16 where
    they differ, because engines keep one for all experts, and bf16 has the range of each."""
    found = site_dtypes(adapter, source, site)
    return next(iter(found)) if len(found) == 1 else torch.bfloat16
