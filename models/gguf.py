"""llama.cpp's names for a model's tensors and settings, by family; and the models of a family that it cannot run.

A GGUF file uses llama.cpp's own tensor names. It holds the experts of a layer as one 3-D tensor per projection,
`[experts, out, in]`. Each entry of `layout` says which canonical tensors make one GGUF tensor. The rows of q and k are
not permuted: llama.cpp rotates Llama 4's neighbouring pairs (its NORM) and Qwen3's halves (NEOX), as transformers does.
Norms and routers are stored in F32, because llama.cpp multiplies norms in it.

llama.cpp's code for a family fixes settings that a config.json may set otherwise, and is silent when they differ.
`refusals` names them. It also fixes Llama 4's attention chunk (8192) and the floor of its temperature (8192), which
matter only in longer contexts: for a model with other values the file has a `context_length` too short to reach them.

The vision tower is not written: llama.cpp wants it in a second file (mmproj).

Source: llama.cpp `src/models/llama4.cpp` and `qwen3moe.cpp`, `conversion/llama.py`, `gguf-py/gguf/constants.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .adapter import Adapter, Role

Value = bool | int | float | str | list[str] | list[int]
ARCHITECTURES = {"llama4": "llama4", "qwen3_moe": "qwen3moe"}
# What llama.cpp fixes for Llama 4, whatever config.json says.
CHUNK, FLOOR_SCALE, ATTENTION_SCALE, NOPE_STEP = 8192, 8192, 0.1, 4
# It leaves out the QK norm of models with this number of experts, Maverick's.
EXPERTS_WITHOUT_QK_NORM = 128

TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
# The name of a module in its block -> GGUF's name after blk.N; experts without their number.
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
MODULES: dict[str, dict[str, str]] = {
    "llama4": ATTENTION
    | {"feed_forward.router": "ffn_gate_inp"}
    | {f"feed_forward.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    | {f"feed_forward.shared_expert.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")}
    | {f"feed_forward.experts.{p}_proj": f"ffn_{p}_exps" for p in ("gate", "up", "down")},
    "qwen3_moe": ATTENTION
    | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp"}
    | {f"mlp.experts.{p}_proj": f"ffn_{p}_exps" for p in ("gate", "up", "down")},
}
ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp reads ROPE_FACTORS, which hold Llama 3's scaling, for Llama 4 and not for Qwen3-MoE.
ROPE_TYPES = {"llama4": ("default", "llama3"), "qwen3_moe": ("default",)}


@dataclass(frozen=True)
class TensorLayout:
    """One GGUF tensor and the canonical tensors that make it."""

    name: str
    parts: tuple[str, ...]  # one, or one per expert in their order
    shape: tuple[int, ...]  # in torch's order
    full: bool  # F32, in whatever dtype the checkpoint stores it

    @property
    def stacked(self) -> bool:
        return len(self.shape) == 3


def layout(adapter: Adapter) -> list[TensorLayout]:
    """Every tensor of the text model, block by block. Raises ValueError for tensors that have no name in llama.cpp."""
    modules = MODULES[adapter.family]
    prefix = adapter.block_prefix(0).partition("layers.")[0]
    gathered: dict[str, list[str]] = {}
    unknown = []
    shapes = adapter.expected()
    for name in shapes:
        if adapter.role(name) is Role.VISION:
            continue
        module = name.removesuffix(".weight")
        where = module.removeprefix(f"{prefix}layers.")
        if where == module:
            found = TOP.get(module.rpartition(".")[2])
        else:
            block, _, inner = where.partition(".")
            stem, between, expert = inner.partition(".experts.")
            leaf = modules.get(f"{stem}.experts.{expert.partition('.')[2]}" if between else inner)
            found = leaf and f"blk.{block}.{leaf}"
        if found is None or not name.endswith(".weight"):
            unknown.append(name)
        else:
            gathered.setdefault(f"{found}.weight", []).append(name)
    if unknown:
        raise ValueError(f"llama.cpp's {adapter.family} has no {', '.join(unknown[:4])}")
    entries = []
    for stored, parts in gathered.items():
        role, shape = adapter.role(parts[0]), shapes[parts[0]]
        if role is Role.EXPERT:
            parts.sort(key=lambda part: int(part.partition(".experts.")[2].partition(".")[0]))
            shape = (len(parts), *shape)
        entries.append(TensorLayout(stored, tuple(parts), shape, role in (Role.NORM, Role.ROUTER)))
    return sorted(entries, key=_order)


def _order(entry: TensorLayout) -> tuple[int, int, str]:
    """A sort key: the embedding, the blocks, the final norm and the head."""
    first, _, rest = entry.name.partition(".")
    if first == "blk":
        return 1, int(rest.partition(".")[0]), entry.name
    return (0 if first == "token_embd" else 2), 0, entry.name


def refusals(adapter: Adapter) -> list[str]:
    """Why llama.cpp cannot run this model, or would run another one; a line each."""
    if adapter.family not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"onecard does not know llama.cpp's names for the family {adapter.family}: it knows those of {known}"]
    c = adapter.text_config
    found = _llama4_refusals(adapter) if adapter.family == "llama4" else _qwen3_refusals(adapter)
    rope = _rope(c)
    if rope.get("rope_type", "default") not in ROPE_TYPES[adapter.family]:
        found.append(
            f"its rope scaling is {rope['rope_type']!r}: remove it from config.json and give it to llama.cpp "
            "(--rope-scaling) instead"
        )
    try:
        layout(adapter)
    except ValueError as error:
        found.append(str(error))
    return found


def _llama4_refusals(adapter: Adapter) -> list[str]:
    c, found = adapter.text_config, []
    step = c.interleave_moe_layer_step
    if [b for b in range(adapter.n_blocks) if (b + 1) % max(1, step) == 0] != list(c.moe_layers):
        found.append(f"its MoE layers are {list(c.moe_layers)}; llama.cpp uses interleave_moe_layer_step, {step}")
    if bool(c.use_qk_norm) != (adapter.n_experts != EXPERTS_WITHOUT_QK_NORM):
        found.append(
            f"use_qk_norm is {c.use_qk_norm} with {adapter.n_experts} experts: llama.cpp leaves the norm out of models "
            f"with {EXPERTS_WITHOUT_QK_NORM} experts, and of no others"
        )
    rope = [(b + 1) % NOPE_STEP != 0 for b in range(adapter.n_blocks)]
    chunked = ["chunked_attention" if r else "full_attention" for r in rope]
    if [bool(r) for r in c.no_rope_layers] != rope or list(c.layer_types) != chunked:
        found.append(
            "its layers without rope, or with chunked attention, are not llama.cpp's (every fourth layer has no rope, "
            "all others have chunked attention)"
        )
    return found


def _qwen3_refusals(adapter: Adapter) -> list[str]:
    c, found = adapter.text_config, []
    dense = [b for b in range(adapter.n_blocks) if adapter.router_site(b) is None]
    if dense:
        found.append(f"its layers {dense} have no experts: llama.cpp's qwen3moe has experts in every layer")
    if not c.norm_topk_prob:
        found.append("norm_topk_prob is false: llama.cpp's qwen3moe always normalizes the routing weights")
    if getattr(c, "use_sliding_window", False):
        found.append("use_sliding_window is true: llama.cpp's qwen3moe has none")
    return found


def context_tokens(adapter: Adapter) -> int:
    """The longest context, in tokens, in which llama.cpp computes this model."""
    c = adapter.text_config
    longest = int(c.max_position_embeddings)
    if adapter.family != "llama4":
        return longest
    if c.attention_chunk_size != CHUNK:
        longest = min(longest, c.attention_chunk_size, CHUNK)
    # A query's temperature is 1 before position floor_scale - 1.
    ours = (c.floor_scale, c.attn_scale) if c.attn_temperature_tuning else (None, None)
    if ours != (FLOOR_SCALE, ATTENTION_SCALE):
        longest = min(longest, FLOOR_SCALE - 1, *([int(ours[0]) - 1] if ours[0] else []))
    return longest


def warnings(adapter: Adapter) -> list[str]:
    """Warnings for the file's users; a line each."""
    found, longest = [], context_tokens(adapter)
    if longest < adapter.text_config.max_position_embeddings:
        found.append(
            f"llama.cpp fixes Llama 4's attention chunk at {CHUNK} and its temperature's floor at {FLOOR_SCALE}. This "
            f"model has others, and llama.cpp computes it in contexts of at most {longest} tokens (context_length)"
        )
    if adapter.has_vision:
        found.append(
            "the file holds only the text model: llama.cpp wants the vision tower in a file of its own (mmproj)"
        )
    return found


def settings(adapter: Adapter) -> dict[str, Value]:
    """The architecture's metadata; keys lack the architecture's name as prefix."""
    c = adapter.text_config
    found: dict[str, Value] = {
        "vocab_size": adapter.vocab_size,
        "context_length": context_tokens(adapter),
        "embedding_length": adapter.hidden_size,
        "block_count": adapter.n_blocks,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(_rope(c)["rope_theta"]),
        "expert_count": adapter.n_experts,
        "expert_used_count": adapter.top_k,
    }
    if adapter.family == "llama4":
        return found | {
            "feed_forward_length": c.intermediate_size_mlp,
            "expert_feed_forward_length": c.intermediate_size,
            "expert_shared_feed_forward_length": c.intermediate_size,
            "interleave_moe_layer_step": c.interleave_moe_layer_step,
        }
    return found | {
        "feed_forward_length": c.intermediate_size,
        "expert_feed_forward_length": c.moe_intermediate_size,
    }


def rope_factors(adapter: Adapter) -> torch.Tensor | None:
    """The divisors of the rotary frequencies, fp32 [head_dim / 2], for Llama 3's scaling as transformers computes it.
    None where frequencies are not scaled."""
    c = adapter.text_config
    rope = _rope(c)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim)
    return (plain / scaled).to(torch.float32)


def _rope(text_config: Any) -> dict[str, Any]:
    return dict(text_config.rope_parameters)
