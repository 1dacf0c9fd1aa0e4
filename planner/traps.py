"""Known traps of a model, an engine and a card: what can go wrong although the plan's sum is right."""

from dataclasses import replace

from ..checkpoint.formats.compressed_tensors_config import NAME as COMPRESSED
from ..checkpoint.model import Model
from ..checkpoint.packed import PackedSource
from ..report.engines import engines
from .candidates import Candidate
from .cards import GIB, Card
from .fit import Needs, Request, fit, max_context
from .kv import cache_rates
from .workspace import image_tokens

# Some models are sold with a context this long, although no card's cache holds it.
LONG_CONTEXT = 1_000_000


def traps(model: Model, needs: Needs, chosen: Candidate, request: Request, card: Card | None) -> list[str]:
    """Warnings about the plan, then those of the model. Without a card, only warnings that hold on any card."""
    found = _of_context(needs, chosen, request, card)
    if any(layer.local for layer in needs.layers):
        found += _of_local_layers(needs, chosen, request, card)
    found += _of_engine(model, chosen, request)
    if any(layer.kind == "latent" for layer in needs.layers):
        found.append(
            "latent attention (MLA): an engine's prefill buffers and its unpacked copies of kv_b_proj are not in the "
            "estimate; leave some 2 to 5 GB"
        )
    if request.images:
        tokens = image_tokens(needs.sizes, request.images)
        found.append(f"{request.images} images of a request take up to {tokens:,} tokens of its context")
    return [*found, *model.adapter.faults(model.config), *model.warnings]


def _weights(chosen: Candidate, request: Request) -> int:
    weights = chosen.choice(request.rules.dequantizes).weights
    return weights.on_card(request.tensor_parallel, request.vision)


def _of_context(needs: Needs, chosen: Candidate, request: Request, card: Card | None) -> list[str]:
    found = []
    positions = needs.sizes.positions
    if positions and request.context > positions:
        found.append(f"a context of {request.context:,} is longer than the {positions:,} positions of config.json")
    if positions >= LONG_CONTEXT and card is not None:
        alone = replace(request, sequences=1)
        whole = fit(needs, card, 0, replace(alone, context=positions)).kv_bytes * request.tensor_parallel
        reach = max_context(needs, card, _weights(chosen, request), alone)
        if reach < positions:
            found.append(
                f"the {positions:,} tokens that the model is sold with need {whole / 1e9:,.0f} GB of KV cache: here "
                + (f"{reach:,} fit for one sequence" if reach else "not one fits")
            )
    return found


def _of_local_layers(needs: Needs, chosen: Candidate, request: Request, card: Card | None) -> list[str]:
    local = [layer for layer in needs.layers if layer.local]
    if request.engine != "vllm" or len(local) == len(needs.layers):
        return []
    kept = cache_rates(needs.layers, request.rules, request.kv_dtype, request.tensor_parallel, frees=False)
    rate = f"{kept.per_token_bytes / 1024:,.0f} KiB a token"
    said = f"{len(local)} of {len(needs.layers)} layers see at most {local[0].window:,} tokens"
    if request.frees is False:
        return [f"{said}, and the plan keeps their whole cache: {rate}"]
    reach = ""
    if card is not None:
        whole = max_context(needs, card, _weights(chosen, request), replace(request, frees=False))
        reach = f", and {whole:,} tokens of context would fit" if whole else ""
    return [
        f"{said}; vLLM gives the rest back only with its hybrid KV cache manager, which older versions switch off for "
        f"chunked attention (VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1 switches it on). Without it: "
        f"{rate}{reach}"
    ]


def _of_engine(model: Model, chosen: Candidate, request: Request) -> list[str]:
    found = []
    if request.engine == "vllm":
        roles: dict[str, dict[str, dict[str, int]]] = {}
        for width in chosen.widths:
            roles.setdefault(width.role, {"widths": {}})["widths"][width.width] = width.parameters
        lies = model.source.label if isinstance(model.source, PackedSource) else COMPRESSED
        for engine, least, remark in engines(model.adapter.family, roles, chosen.symmetric, {}, lies):
            if engine == "vLLM" and "pull request" in least:
                found.append(f"vLLM must be {least}. {remark.partition('. ')[2]}")
    if request.rules.dequantizes and chosen.unpacked:
        size = _weights(chosen, request) / GIB
        found.append(f"transformers unpacks compressed-tensors experts when it loads them: {size:,.1f} GiB of weights")
    if request.engine == "llama.cpp":
        found.append("llama.cpp loads GGUF files: the plan counts the weights' bytes in this format, not in GGUF")
    return found
