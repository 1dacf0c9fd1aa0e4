"""For every rule of vLLM, transformers and GPTQModel, one thing that breaks it in a sound draft (engine_views.py)."""

from collections.abc import Callable
from typing import Any

import engine_views as views
from engine_views import Draft, gptq, group_of, packed, plain
from onecard.core.tensors import TensorInfo
from onecard.models.adapter import Role

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QK = ("q_proj", "k_proj", "v_proj")


def unfuse_not(draft: Draft) -> None:
    """Gives block 0 its published experts back."""
    for site in draft.adapter.sites(0):
        for member in site.members if site.role is Role.EXPERT else ():
            for module in member:
                draft.drop(module)
    fused = {n: s for n, s in draft.adapter.disk_shapes(()).items() if ".layers.0." in n and len(s) == 3}
    draft.infos |= {name: TensorInfo(shape, "BF16") for name, shape in fused.items()}


def packed_stack(draft: Draft) -> None:
    unfuse_not(draft)
    for name in [n for n, i in draft.infos.items() if len(i.shape) == 3]:
        draft.infos[name] = TensorInfo(draft.infos[name].shape, "U8")


def without(end: str, leaf: str) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        del draft.infos[f"{draft.matrix(end)[0]}.{leaf}"]

    return change


def kept_as(end: str, layout: Callable[..., views.Infos], **how: Any) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        module, outputs, inputs = draft.matrix(end)
        draft.put(module, layout(outputs, inputs, **how))

    return change


def settings(**changes: Any) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        assert draft.block is not None
        draft.block |= changes

    return change


def one_scheme_announced(draft: Draft) -> None:
    """Makes expert 3's gate int8, and config.json says so. The engine still has one parameter for all experts."""
    module, outputs, inputs = draft.matrix("experts.3.gate_proj")
    draft.put(module, packed(outputs, inputs, bits=8))
    settings(config_groups={"group_0": group_of(), "group_1": group_of(8, targets=(module,))})(draft)


def shared_wider(draft: Draft) -> None:
    """One block's shared expert gets an int8 down projection: sound for vLLM, not for transformers."""
    module, outputs, inputs = draft.matrix("shared_expert.down_proj")
    draft.put(module, packed(outputs, inputs, bits=8))
    settings(config_groups={"group_0": group_of(), "group_1": group_of(8, targets=(module,))})(draft)


def renamed(draft: Draft) -> None:
    module = draft.matrix("shared_expert.down_proj")[0]
    for name in [n for n in draft.infos if n.startswith(f"{module}.")]:
        draft.infos[f"model.{name}"] = draft.infos.pop(name)


def reshaped(draft: Draft) -> None:
    name = draft.adapter.norm_name
    draft.infos[name] = TensorInfo((3,), "BF16")


def tower_packed(draft: Draft) -> None:
    name = next(n for n in draft.infos if draft.adapter.role(n) is Role.VISION and n.endswith("fc1.weight"))
    outputs, inputs = draft.infos.pop(name).shape
    draft.put(name.removesuffix(".weight"), packed(outputs, inputs))


def all_kept(layout: Callable[..., views.Infos], *ends: str, **how: Any) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        for block in range(draft.adapter.n_blocks):
            for _, module, outputs, inputs in draft.adapter.modules(block):
                if module.endswith(ends or ("_proj",)):
                    draft.put(module, layout(outputs, inputs, **how))

    return change


def asymmetric_qk(draft: Draft) -> None:
    all_kept(packed, *QK, symmetric=False)(draft)
    names = (r"re:.*self_attn[.](q|k|v|qkv)_proj$",)
    settings(config_groups={"group_0": group_of(), "group_1": group_of(targets=names, symmetric=False)})(draft)


def asymmetric_experts(bits: int) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        for block in range(draft.adapter.n_blocks):
            for site, module, outputs, inputs in draft.adapter.modules(block):
                if site.role is Role.EXPERT:
                    draft.put(module, packed(outputs, inputs, bits, symmetric=False))
        names = (r"re:.*[.]experts[.].*",)
        settings(config_groups={"group_0": group_of(), "group_1": group_of(bits, targets=names, symmetric=False)})(
            draft
        )

    return change


def ordered(draft: Draft) -> None:
    module, _, inputs = draft.matrix("o_proj")
    draft.infos[f"{module}.weight_g_idx"] = TensorInfo((inputs,), "I32")


def no_class_target(draft: Draft) -> None:
    settings(config_groups={"group_0": group_of(targets=("re:.*_proj$",))})(draft)


def forget(what: str) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        assert draft.block is not None
        draft.block["ignore"] = [name for name in draft.block["ignore"] if what not in name]

    return change


def experts_bf16(draft: Draft) -> None:
    for block in range(draft.adapter.n_blocks):
        for site, module, outputs, inputs in draft.adapter.modules(block):
            if site.role is Role.EXPERT:
                draft.put(module, plain(outputs, inputs))
    assert draft.block is not None
    draft.block["ignore"] = [*draft.block.get("ignore", []), "re:.*[.]experts[.].*"]
    draft.block["dynamic"] = {"-:.*experts.*": {}}


def cards(count: int) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        draft.tensor_parallel = count

    return change


def groups_of(size: int) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        all_kept(packed, group=size)(draft)
        settings(config_groups={"group_0": group_of(size=size)})(draft)

    return change


def text_config(**changes: Any) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        for key, value in changes.items():
            setattr(draft.adapter.text_config, key, value)

    return change


# (engine, rule) -> (family, layout, modules kept in bf16, the change that breaks it, words of the offender's message)
Broken = tuple[str, Callable[..., views.Infos] | None, tuple[str, ...], Callable[[Draft], None], str]
SCOUT = ("scout", packed, ())
BROKEN: dict[tuple[str, str], Broken] = {
    ("vllm", "config"): (*SCOUT, settings(config_groups={"group_0": {"targets": ["Linear"], "weights": 4}}), "weights"),
    ("vllm", "method"): (*SCOUT, settings(quant_method="exl3"), "exl3"),
    ("vllm", "config-keys"): (
        *SCOUT,
        text_config(interleave_moe_layer_step=2),
        "interleave_moe_layer_step 2 gives [1]",
    ),
    ("vllm", "fused-experts"): (*SCOUT, unfuse_not, "feed_forward.experts.gate_up_proj (BF16 [8, 64, 192])"),
    ("vllm", "missing-scales"): (
        *SCOUT,
        without("experts.3.up_proj", "weight_scale"),
        "experts.3.up_proj.weight_scale",
    ),
    ("vllm", "one-scheme"): (*SCOUT, one_scheme_announced, "int8 group 32 (3.gate_proj)"),
    ("vllm", "as-announced"): (*SCOUT, kept_as("o_proj", packed, bits=8), "says int4 group 32"),
    ("vllm", "ignore-list"): (*SCOUT, kept_as("o_proj", plain), "o_proj is kept as BF16"),
    ("vllm", "ignore-others"): (*SCOUT, forget("router"), "router is kept whole"),
    ("vllm", "names"): (*SCOUT, renamed, "model.language_model"),
    ("vllm", "shapes"): (*SCOUT, reshaped, "[3]"),
    ("vllm", "vision-untouched"): (*SCOUT, tower_packed, "fc1.weight_packed is I32"),
    ("vllm", "tensor-parallel"): (*SCOUT, cards(2), "48 inputs a rank in groups of 32"),
    ("vllm", "qk-permuted"): ("scout", gptq, (), settings(), "q_proj is in GPTQ's layout"),
    ("vllm", "qk-version"): (*SCOUT, settings(), "k_proj is int4 group 32"),
    ("vllm", "linear-target"): (*SCOUT, no_class_target, "no group targets the class Linear"),
    ("vllm", "experts-bf16"): (*SCOUT, experts_bf16, "48 of 48 expert matrices"),
    ("vllm", "group-size"): (*SCOUT, groups_of(16), "groups of 16"),
    ("vllm", "int8-zero-points"): (*SCOUT, asymmetric_experts(8), "int8 with zero points"),
    ("vllm", "column-order"): ("qwen3", gptq, (), settings(desc_act=True), "desc_act"),
    ("vllm", "gptq-types"): ("qwen3", gptq, (), settings(sym=False), "sym False"),
    ("transformers", "config"): (*SCOUT, settings(config_groups={"group_0": {"targets": 4}}), "targets"),
    ("transformers", "method"): (*SCOUT, settings(quant_method="exl3"), "exl3"),
    ("transformers", "packed-experts-fused"): (*SCOUT, packed_stack, "gate_up_proj is U8"),
    ("transformers", "missing-scales"): (*SCOUT, without("k_proj", "weight_scale"), "k_proj.weight_scale"),
    ("transformers", "one-scheme"): (*SCOUT, shared_wider, "int4 group 32, int8 group 32"),
    ("transformers", "as-announced"): (*SCOUT, kept_as("o_proj", packed, bits=8), "says int4 group 32"),
    ("transformers", "ignore-list"): (*SCOUT, kept_as("o_proj", plain), "o_proj is kept as BF16"),
    ("transformers", "ignore-others"): (*SCOUT, forget("lm_head"), "lm_head is kept whole"),
    ("transformers", "names"): (*SCOUT, renamed, "model.language_model"),
    ("transformers", "shapes"): (*SCOUT, reshaped, "[3]"),
    ("transformers", "expert-zero-points"): (*SCOUT, asymmetric_experts(4), "experts has zero points"),
    ("transformers", "gptq-experts"): ("qwen3", gptq, (), settings(), "experts holds GPTQ's parts"),
    ("transformers", "gptq-vision"): ("scout", gptq, QK, settings(), "pictures"),
    ("transformers", "dequantize"): (*SCOUT, settings(), "packed"),
    ("transformers", "experts-bf16"): (*SCOUT, experts_bf16, "48 of 48 expert matrices"),
    ("gptqmodel", "method"): (*SCOUT, settings(), "compressed-tensors"),
    ("gptqmodel", "settings"): ("qwen3", gptq, (), settings(group_size=48), "group_size 48"),
    ("gptqmodel", "fused-experts"): ("scout", gptq, QK, unfuse_not, "holds all experts of its layer"),
    ("gptqmodel", "missing-scales"): ("qwen3", gptq, (), without("experts.3.up_proj", "scales"), "up_proj.scales"),
    ("gptqmodel", "dynamic"): ("scout", gptq, QK, settings(dynamic={}), "q_proj is BF16, and no rule"),
    ("gptqmodel", "as-announced"): ("qwen3", gptq, (), kept_as("o_proj", gptq, bits=8), "says int4 group 32"),
    ("gptqmodel", "names"): ("scout", gptq, QK, renamed, "model.language_model"),
    ("gptqmodel", "shapes"): ("scout", gptq, QK, reshaped, "[3]"),
    ("gptqmodel", "vision-untouched"): ("scout", gptq, QK, tower_packed, "fc1.weight_packed is I32"),
    ("gptqmodel", "experts-bf16"): ("qwen3", gptq, (), experts_bf16, "24 of 24 expert matrices"),
}

# Other rules that a breakage breaks too, because they look at the same tensors.
ALONG = {
    ("vllm", "fused-experts"): {"one-scheme"},
    ("vllm", "missing-scales"): {"one-scheme"},
    ("vllm", "vision-untouched"): {"names"},
    ("transformers", "missing-scales"): {"one-scheme"},
    ("transformers", "as-announced"): {"one-scheme"},
    ("transformers", "gptq-vision"): {"gptq-experts"},
    ("gptqmodel", "settings"): {"as-announced"},
    ("gptqmodel", "vision-untouched"): {"names"},
}
