"""GPTQModel's loading rules, from its source at 7.3.4 and from running 7.7.0 (benchmarks/peers).

It builds the model from config.json, splits fused experts, and makes a QuantLinear of every matrix in the family's
module tree, unless a negative rule of `dynamic` ("-:...") matches it. So every matrix that stays bf16 must be listed
there. Positive rules set the widths of single modules.
"""

import re
from collections.abc import Iterator

from ...models.adapter import Role
from . import rules
from .rules import Rule
from .view import GPTQ, Kept, Kind, View

LOADER = "gptqmodel/models/loader.py, from_quantized"
TORCH_LINEAR = "gptqmodel/nn_modules/qlinear/torch.py, TorchLinear.SUPPORTS_*"
# Roles that a family's module tree lacks: the dense layers of Llama 4 Maverick.
LEFT_OUT = {"llama4": (Role.MLP,)}
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (2, 3, 4, 8)


def method(view: View) -> Iterator[str]:
    if view.method != GPTQ:
        yield f"quant_method {view.method!r}"


def settings(view: View) -> Iterator[str]:
    block = view.block or {}
    if view.method != GPTQ:
        return
    if block.get("bits") not in WIDTHS:
        yield f"bits {block.get('bits')!r}: {', '.join(map(str, WIDTHS))} have a kernel"
    if block.get("group_size") not in GROUPS:
        yield f"group_size {block.get('group_size')!r}: {', '.join(map(str, GROUPS))} have a kernel"
    if block.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        yield f"checkpoint_format {block['checkpoint_format']!r}: gptq and gptq_v2 are read everywhere"


def override(view: View, matrix: Kept) -> dict[str, object] | bool:
    """What the first matching rule of `dynamic` says: False (not quantized), or settings of its own."""
    for pattern, settings in ((view.block or {}).get("dynamic") or {}).items():
        negative, expression = pattern.startswith("-:"), pattern.removeprefix("-:").removeprefix("+:")
        if re.match(expression, matrix.module):
            return False if negative else dict(settings or {})
    return {}


def left_alone(view: View) -> Iterator[str]:
    """bf16 matrices that the loader expects to be quantized, and quantized ones that it expects in bf16."""
    if view.method != GPTQ:
        return
    left_out = LEFT_OUT.get(view.adapter.family, ())
    for matrix in view.kept.values():
        taken = matrix.role not in left_out and override(view, matrix) is not False
        if taken and matrix.kind is Kind.PLAIN:
            yield f"{matrix.module} is {matrix.width}, and no rule of `dynamic` leaves it alone"
        elif not taken and matrix.kind is Kind.GPTQ:
            yield f"{matrix.module} is {matrix.width}, and is loaded as a whole matrix"


def as_announced(view: View) -> Iterator[str]:
    if view.method != GPTQ:
        return
    for matrix in view.kept.values():
        own = override(view, matrix)
        if matrix.kind is not Kind.GPTQ or own is False or matrix.bits is None or matrix.group is None:
            continue
        wanted = (view.block or {}) | (own if isinstance(own, dict) else {})
        size = wanted.get("group_size", -1)
        size = matrix.shape[1] if size == -1 else size
        if (matrix.bits, matrix.group) != (wanted.get("bits"), size):
            yield f"{matrix.module} is {matrix.width}, and config.json says int{wanted.get('bits')} group {size}"


RULES = (
    Rule(
        "method",
        "error",
        method,
        "GPTQModel loads GPTQ's layout: `onecard export CHECKPOINT --format gptq -o OUT`.",
        "gptqmodel/quantization/config.py, QuantizeConfig.from_pretrained",
    ),
    Rule(
        "settings",
        "error",
        settings,
        "Quantize with 4 or 8 bits in groups of 32, 64 or 128.",
        TORCH_LINEAR,
    ),
    Rule(
        "fused-experts",
        "error",
        rules.fused_experts,
        "GPTQModel takes the experts of its own model apart and looks for a qweight each. Take them apart before "
        "quantizing: `onecard export CHECKPOINT --format gptq` writes them so.",
        "gptqmodel/models/loader.py, _convert_model_with_defuser",
    ),
    Rule(
        "missing-scales",
        "error",
        rules.missing_parts,
        "Export the checkpoint again, all shards of one run.",
        "gptqmodel/nn_modules/qlinear/__init__.py",
    ),
    Rule(
        "dynamic",
        "error",
        left_alone,
        "Name what stays whole in `dynamic`, as `-:` and an expression, and quantize only what the family's module "
        "tree holds.",
        f"{LOADER} (simple_layer_modules); gptqmodel/models/definitions/llama4.py, qwen3_moe.py",
    ),
    Rule(
        "as-announced",
        "error",
        as_announced,
        "Take config.json and weights of one run; a module of another width needs a rule of `dynamic`.",
        "gptqmodel/utils/model.py, create_quant_module",
    ),
    Rule(
        "names",
        "error",
        rules.names,
        "Fetch the checkpoint again, or have its names written as the family's published checkpoint has them.",
        LOADER,
    ),
    Rule(
        "shapes",
        "error",
        rules.shapes,
        "Take config.json and weights of one revision.",
        LOADER,
    ),
    Rule(
        "vision-untouched",
        "error",
        rules.vision_untouched,
        "The module tree holds the text blocks alone: quantize again with the vision tower left whole.",
        "gptqmodel/models/definitions/llama4.py, module_tree",
    ),
    Rule(
        "experts-bf16",
        "warning",
        rules.experts_whole,
        "It loads, and is not as small as it says: quantize the experts, which are most of the model.",
        "gptqmodel/models/definitions/llama4.py, module_tree",
    ),
)
