"""The common part of the text models whose published files hold one tensor per expert matrix, under `model.`:
Qwen3-MoE, DeepSeek-V3 and Mixtral.

transformers 5 stacks the experts of a layer in memory, and `save_pretrained(..., save_original_format=False)` writes
them so: `mlp.experts.gate_up_proj` is `[experts, gates then ups, in]` and `mlp.experts.down_proj` `[experts, out, in]`,
in torch's order of axes, unlike Llama 4's fused experts. Both layouts are read, block by block. What is emitted has the
published one.
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar

from .adapter import Adapter, Location, Role
from .meta import meta_shapes


class UnfusedAdapter(Adapter):
    """A family with unfused experts; `config` is that of the text model, which is the whole model."""

    # The config's name for the number of experts.
    experts_key: ClassVar[str]
    # transformers' class of the whole model.
    causal_class: ClassVar[Any]
    # The part of a tensor's name that marks a shared expert; None for families without one.
    shared: ClassVar[str | None] = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "head_dim", None) is None:  # configs of Qwen3-MoE and Mixtral may leave it out
            config.head_dim = config.hidden_size // config.num_attention_heads
        self.n_blocks = config.num_hidden_layers
        self.n_experts = getattr(config, self.experts_key)
        self.top_k = config.num_experts_per_tok
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.tied_head = bool(config.tie_word_embeddings)
        self.embedding_name = "model.embed_tokens.weight"
        self.norm_name = "model.norm.weight"
        self.head_name = self.embedding_name if self.tied_head else "lm_head.weight"

    @property
    def text_config(self) -> Any:
        return self.config

    def block_prefix(self, block: int) -> str:
        return f"model.layers.{block}."

    def memory_name(self, name: str) -> str:
        """The name that a canonical tensor or module outside the experts has in transformers' module."""
        return name

    def expected(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found = meta_shapes(self.causal_class, self.config)
        routers = {f"{self.block_prefix(block)}{self.router_name}" for block in range(self.n_blocks)}
        published = {self.memory_name(name): name for name in routers}
        shapes = {}
        for name, shape in found.items():
            module, _, leaf = name.rpartition(".")
            if ".experts." not in name:
                shapes[f"{published.get(module, module)}.{leaf}"] = shape
        for block in range(self.n_blocks):
            for _, name, out, inp in self.modules(block):
                shapes.setdefault(f"{name}.weight", (out, inp))
        if self.tied_head:
            shapes.pop("lm_head.weight", None)
        return shapes

    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            where = self.locate(name, available)
            if not where.index:
                shapes[where.tensor] = shape
            elif where.tensor.endswith("gate_up_proj"):
                shapes[where.tensor] = (self.n_experts, 2 * shape[0], shape[1])
            else:
                shapes[where.tensor] = (self.n_experts, *shape)
        return shapes

    def stored_twice(self, available: Collection[str]) -> list[str]:
        pairs = ((name, self._stack(name)) for name in self._shapes if ".experts." in name and name in available)
        return [f"{name} is in {stack}, too" for name, stack in pairs if stack in available]

    def _stack(self, name: str) -> str:
        """The stack in which transformers saves this matrix of an expert from memory."""
        stem, _, rest = name.partition(".experts.")
        gate, up, _ = self.projections
        stack = "gate_up_proj" if rest.split(".")[1] in (gate, up) else "down_proj"
        return f"{self.memory_name(stem)}.experts.{stack}"

    def locate(self, name: str, available: Collection[str]) -> Location:
        if name in available:
            return Location(name)
        _, _, rest = name.partition(".experts.")
        if not rest:
            other = self.memory_name(name)
            return Location(other if other in available else name)
        expert, projection, _ = rest.split(".")
        stack = self._stack(name)
        if stack not in available:
            return Location(name)
        gate, up, _ = self.projections
        if projection not in (gate, up):
            return Location(stack, (int(expert),))
        width = self._shapes[name][0]
        rows = slice(0, width) if projection == gate else slice(width, 2 * width)
        return Location(stack, (int(expert), rows))

    def role(self, name: str) -> Role:
        if ".embed_tokens." in name:
            return Role.EMBEDDING
        if name.startswith("lm_head."):
            return Role.HEAD
        if "norm" in name.rsplit(".", 2)[-2]:
            return Role.NORM
        if ".experts." in name:
            return Role.EXPERT
        if self.shared is not None and self.shared in name:
            return Role.SHARED
        router = f".{self.router_name}."
        if router in name or self.memory_name(router) in name:
            return Role.ROUTER
        return Role.ATTENTION if ".self_attn." in name else Role.MLP
