"""transformers' loading rules, from 5.23.0 (compressed-tensors 0.20), and tested against what it loads.

A compressed-tensors folder is loaded with `CompressedTensorsConfig(dequantize=True)`; left packed, the first forward
pass on a CPU ends in an AttributeError. transformers reports unknown names and leaves them out, and initialises
parameters without a tensor at random. So a checkpoint that breaks most of these rules loads and answers nonsense.
"""

from collections.abc import Iterator

from ...models.adapter import Role
from ..formats.stored_weight import FLOATS
from . import rules
from .rules import Rule
from .view import BITSANDBYTES, COMPRESSED_TENSORS, GPTQ, Kind, View

QUANTIZERS = "transformers/quantizers/"
DEQUANTIZE = "transformers/integrations/compressed_tensors.py, CompressedTensorsDequantize"


def method(view: View) -> Iterator[str]:
    if view.method not in (None, COMPRESSED_TENSORS, GPTQ, BITSANDBYTES):
        yield f"quant_method {view.method!r}"


def dequantize(view: View) -> Iterator[str]:
    if view.method == COMPRESSED_TENSORS and any(m.kind is Kind.PACKED for m in view.kept.values()):
        yield "the weights are packed"


def expert_zero_points(view: View) -> Iterator[str]:
    yield from dict.fromkeys(f"{m.unit} has zero points" for m in view.experts if m.zero_points)


def schemes_at_large(view: View) -> Iterator[str]:
    """Several widths where transformers takes one: among the experts, or among the other matrices."""
    packed = [m for m in view.kept.values() if m.kind is Kind.PACKED]
    for what, members in (
        ("the experts", [m for m in packed if m.role is Role.EXPERT]),
        ("the other matrices", [m for m in packed if m.role is not Role.EXPERT]),
    ):
        found = rules.widths(members)
        if len(found) > 1:
            yield f"{what} are {', '.join(sorted(found))}"
    # transformers recognises the experts' group by an expression that names experts. Other matrices get the first
    # remaining group.
    if len(rules.widths(packed)) > 1 and not any(
        target.startswith("re:") and "experts" in target for group in view.groups for target in group.targets
    ):
        yield "experts and other matrices have several widths, and no group names the experts by an expression"


def gptq_experts(view: View) -> Iterator[str]:
    yield from dict.fromkeys(f"{m.unit} holds GPTQ's parts" for m in view.experts if m.kind is Kind.GPTQ)


def gptq_vision(view: View) -> Iterator[str]:
    if view.method == GPTQ and view.adapter.has_vision:
        yield "the model takes pictures"


def packed_stacks(view: View) -> Iterator[str]:
    """Codes in a 3-D tensor that holds all experts."""
    for tensor in dict.fromkeys(m.tensor for m in view.experts if m.kind is Kind.FUSED):
        info = view.infos[tensor]
        if info.dtype not in FLOATS:
            yield f"{tensor} is {info.dtype} {list(info.shape)}"


RULES = (
    Rule(
        "config",
        "error",
        rules.config_read,
        "Let the tool that made it write config.json again, or make it anew with `onecard quantize`.",
        "compressed_tensors/quantization/quant_config.py",
    ),
    Rule(
        "method",
        "warning",
        method,
        "These rules know bf16, compressed-tensors, GPTQ and bitsandbytes alone.",
        f"{QUANTIZERS}auto.py",
    ),
    Rule(
        "packed-experts-fused",
        "error",
        packed_stacks,
        "transformers quantizes Linear modules alone, and stacked experts are none: it has no place for their codes. "
        "Take the experts apart before quantizing (`onecard quantize` does).",
        "transformers/models/llama4/modeling_llama4.py, Llama4TextExperts",
    ),
    Rule(
        "missing-scales",
        "error",
        rules.missing_parts,
        "transformers initialises what it misses at random. Export the checkpoint again, all shards of one run.",
        DEQUANTIZE,
    ),
    Rule(
        "one-scheme",
        "error",
        schemes_at_large,
        "transformers takes one group's width for all experts and one for all other matrices, and unpacks the rest "
        "wrongly. Run it with vLLM, or export it as bf16 for transformers.",
        "transformers/integrations/compressed_tensors.py, get_experts_scheme and get_dense_scheme",
    ),
    Rule(
        "as-announced",
        "error",
        rules.as_announced,
        "Take config.json and weights of one run.",
        DEQUANTIZE,
    ),
    Rule(
        "ignore-list",
        "error",
        rules.ignore_list,
        "Left packed, transformers makes packed parameters for these and finds none. Name them in `ignore`.",
        f"{QUANTIZERS}quantizer_compressed_tensors.py, _process_model_before_weight_loading",
    ),
    Rule(
        "ignore-others",
        "error",
        rules.ignore_others,
        "Left packed, transformers makes packed parameters for these and finds none. Name them in `ignore`.",
        f"{QUANTIZERS}quantizer_compressed_tensors.py, _process_model_before_weight_loading",
    ),
    Rule(
        "names",
        "error",
        rules.names,
        "transformers leaves out names that it does not know and initialises what it misses at random. Fetch the "
        "checkpoint again, or have its names written as the family's published checkpoint has them.",
        "transformers/modeling_utils.py, from_pretrained",
    ),
    Rule(
        "shapes",
        "error",
        rules.shapes,
        "Take config.json and weights of one revision.",
        "transformers/modeling_utils.py, from_pretrained",
    ),
    Rule(
        "expert-zero-points",
        "error",
        expert_zero_points,
        "transformers unpacks stacked experts without their zero points. Quantize symmetric, or export it as bf16.",
        f"{DEQUANTIZE} (DummyModule)",
    ),
    Rule(
        "gptq-experts",
        "error",
        gptq_experts,
        "transformers replaces Linear modules, and its stacked experts are none. Load it with GPTQModel, or export it "
        "as compressed-tensors.",
        f"{QUANTIZERS}quantizer_gptq.py, _process_model_before_weight_loading",
    ),
    Rule(
        "gptq-vision",
        "error",
        gptq_vision,
        "transformers takes GPTQ for text models alone. Load it with GPTQModel, or export it as compressed-tensors.",
        f"{QUANTIZERS}quantizer_gptq.py, _process_model_before_weight_loading",
    ),
    Rule(
        "dequantize",
        "warning",
        dequantize,
        "Load it with quantization_config=CompressedTensorsConfig(dequantize=True) (older versions: "
        "run_compressed=False); left packed, the first forward pass on a CPU ends in an AttributeError.",
        f"{QUANTIZERS}quantizer_compressed_tensors.py",
    ),
    Rule(
        "experts-bf16",
        "warning",
        rules.experts_whole,
        "It loads, and is not as small as it says. `load_in_4bit` skips stacked experts without a word: quantize them "
        "one by one (`onecard quantize`, or `onecard export --format bnb-nf4`).",
        f"{QUANTIZERS}quantizer_bnb_4bit.py (nn.Linear alone)",
    ),
)
