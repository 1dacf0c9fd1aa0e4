"""The common part of the text models whose files hold one tensor per expert matrix, under `model.`: Qwen3-MoE,
DeepSeek-V3 and Mixtral. transformers 5 fuses the experts in memory; these files never do."""

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

    def published_name(self, name: str) -> str:
        """The name in the files of a tensor of transformers' module."""
        return name

    def expected(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found = meta_shapes(self.causal_class, self.config)
        shapes = {self.published_name(name): shape for name, shape in found.items() if ".experts." not in name}
        for block in range(self.n_blocks):
            for _, name, out, inp in self.modules(block):
                shapes.setdefault(f"{name}.weight", (out, inp))
        if self.tied_head:
            shapes.pop("lm_head.weight", None)
        return shapes

    def disk_shapes(self, available: Collection[str]) -> dict[str, tuple[int, ...]]:
        return self.expected()

    def locate(self, name: str, available: Collection[str]) -> Location:
        return Location(name)

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
        if f".{self.router_name}." in name:
            return Role.ROUTER
        return Role.ATTENTION if ".self_attn." in name else Role.MLP
