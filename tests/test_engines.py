"""`onecard check --engine`: every rule of every engine catches a broken checkpoint, and sound ones break none.

Most checkpoints are headers alone (engine_views.py, engine_breaks.py). The three breakages that users report most use
real files and the command line: experts left fused, q and k in a layout that the engine garbles, and different widths
inside a module that the engine fuses.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file, save_file

import foreign
import onecard
from babies import edit_json
from engine_breaks import ALONG, ATTENTION, BROKEN, QK, shared_wider
from engine_views import drafted, gptq, group_of, packed
from onecard.checkpoint.engines.llama_cpp import GgufView
from onecard.checkpoint.engines.rules import hold
from onecard.checkpoint.engines.table import ENGINES
from onecard.models.adapter import Adapter
from onecard.models.families import load_adapter

DOCS = Path(onecard.__file__).parent / "docs" / "engines.md"


@pytest.fixture(scope="module")
def adapter(baby: Callable[..., Path]) -> Callable[[str], Adapter]:
    return lambda family: load_adapter(baby(family))


def names_of(breaches: list[Any], severity: str = "error") -> list[str]:
    return [breach.rule.name for breach in breaches if breach.rule.severity == severity]


@pytest.mark.parametrize(("engine", "rule"), BROKEN, ids=["-".join(key) for key in BROKEN])
def test_a_broken_rule_is_caught_and_says_the_way_out(
    engine: str, rule: str, adapter: Callable[[str], Adapter]
) -> None:
    family, layout, keep, breaks, needle = BROKEN[engine, rule]
    draft = drafted(adapter(family), layout, keep)
    breaks(draft)
    found = {breach.rule.name: breach for breach in hold(draft.view(), ENGINES[engine])}
    assert rule in found, sorted(found)
    assert any(needle in offender for offender in found[rule].offenders), found[rule].offenders
    assert found[rule].rule.way_out in found[rule].told()
    others = {name for name, breach in found.items() if breach.rule.severity == "error"} - {rule}
    # A breakage may break neighbouring rules too; an otherwise sound draft breaks no more than these.
    assert others <= ALONG.get((engine, rule), set()), others


def test_every_rule_has_a_broken_checkpoint_and_stands_in_the_docs() -> None:
    rules = {(engine, rule.name) for engine, held in ENGINES.items() for rule in held}
    assert {*BROKEN, *(("llama.cpp", name) for name in BROKEN_GGUF)} == rules
    told = " ".join(DOCS.read_text(encoding="utf-8").split())
    missing = [
        (engine, rule.name)
        for engine, held in ENGINES.items()
        for rule in held
        if f"`{rule.name}`" not in told or " ".join(rule.source.split()) not in told
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("family", "layout", "keep", "engines"),
    [
        ("scout", None, (), ("vllm", "transformers")),
        ("qwen3", None, (), ("vllm", "transformers")),
        ("scout", packed, (), ("vllm", "transformers")),
        ("maverick", packed, ATTENTION, ("vllm", "transformers")),
        ("qwen3", packed, (), ("vllm", "transformers")),
        ("scout", gptq, QK, ("vllm", "gptqmodel")),
        ("qwen3", gptq, (), ("vllm", "gptqmodel")),
    ],
)
def test_a_sound_checkpoint_breaks_no_rule(
    family: str, layout: Any, keep: tuple[str, ...], engines: tuple[str, ...], adapter: Callable[[str], Adapter]
) -> None:
    view = drafted(adapter(family), layout, keep).view()
    assert [names_of(hold(view, ENGINES[engine])) for engine in engines] == [[], []]


def test_schemes_that_differ_between_units_are_sound_for_vllm(adapter: Callable[[str], Adapter]) -> None:
    draft = drafted(adapter("scout"), packed)
    shared_wider(draft)
    assert names_of(hold(draft.view(), ENGINES["vllm"])) == []
    assert names_of(hold(draft.view(), ENGINES["transformers"])) == ["one-scheme"]


def test_more_cards_than_a_group_allows(adapter: Callable[[str], Adapter]) -> None:
    """Scout's baby has 96 inputs in its down projections: three cards take 32 each, but heads don't divide by three."""
    draft = drafted(adapter("scout"), packed)
    assert names_of(hold(draft.view(), ENGINES["vllm"])) == []
    draft.tensor_parallel = 3
    (breach,) = [b for b in hold(draft.view(), ENGINES["vllm"]) if b.rule.name == "tensor-parallel"]
    assert "4 attention heads over 3 ranks" in breach.offenders
    assert not any("groups" in offender and "expert" in offender for offender in breach.offenders)


# --- llama.cpp: metadata and names as src/models/llama4.cpp asks for them


def gguf_view(**changes: Any) -> GgufView:
    """A Llama 4 of one block, its experts Q4_0."""
    keys = {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "expert_count": 8,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_used_count": 1,
        "expert_feed_forward_length": 96,
        "interleave_moe_layer_step": 1,
    }
    tokenizer = {"model": "gpt2", "tokens": 256, "merges": 10, "pre": "llama4"}
    metadata = {"general.architecture": "llama4"} | {f"llama4.{k}": v for k, v in keys.items()}
    metadata |= {f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("BF16", (256, 64)),
        "output.weight": ("BF16", (256, 64)),
        "output_norm.weight": ("F32", (64,)),
    }
    for name, shape in {
        "attn_norm": (64,),
        "ffn_norm": (64,),
        "attn_q": (64, 64),
        "attn_k": (32, 64),
        "attn_v": (32, 64),
        "attn_output": (64, 64),
        "ffn_gate_inp": (8, 64),
        "ffn_gate_exps": (8, 96, 64),
        "ffn_up_exps": (8, 96, 64),
        "ffn_down_exps": (8, 64, 96),
        "ffn_gate_shexp": (96, 64),
        "ffn_up_shexp": (96, 64),
        "ffn_down_shexp": (64, 96),
    }.items():
        tensors[f"blk.0.{name}.weight"] = ("Q4_0" if "exp" in name else "F32", shape)
    return replace(GgufView(("model.gguf",), metadata, tensors), **changes)


def less(key: str) -> GgufView:
    view = gguf_view()
    return replace(view, metadata={k: v for k, v in view.metadata.items() if k != key})


def stored(name: str, kind: str, shape: tuple[int, ...] | None) -> GgufView:
    """The draft with this tensor added or removed."""
    view = gguf_view()
    tensors = {n: t for n, t in view.tensors.items() if n != name}
    return replace(view, tensors=tensors if shape is None else tensors | {name: (kind, shape)})


BROKEN_GGUF = {
    "gguf": (GgufView(()), "no .gguf"),
    "architecture": (gguf_view(metadata={"general.architecture": "mamba"}), "mamba"),
    "metadata": (less("llama4.interleave_moe_layer_step"), "interleave_moe_layer_step is missing"),
    "names": (stored("blk.0.ffn_up_exps.weight", "", None), "ffn_up_exps.weight is missing"),
    "shapes": (stored("blk.0.ffn_up_exps.weight", "Q4_0", (8, 64, 96)), "[8, 64, 96]"),
    "experts-bf16": (stored("blk.0.ffn_up_exps.weight", "BF16", (8, 96, 64)), "kept whole"),
    "chunk": (gguf_view(chunk=8), "chunk of 8"),
}


@pytest.mark.parametrize("rule", BROKEN_GGUF)
def test_a_gguf_file_that_llama_cpp_would_refuse(rule: str) -> None:
    view, needle = BROKEN_GGUF[rule]
    found = {breach.rule.name: breach for breach in hold(view, ENGINES["llama.cpp"])}
    assert any(needle in offender for offender in found[rule].offenders), found
    if rule not in ("metadata", "architecture"):  # without a step, names cannot be judged
        assert {n for n, b in found.items() if b.rule.severity == "error"} <= {rule}
    assert hold(gguf_view(), ENGINES["llama.cpp"]) == []


def test_a_gguf_file_is_read_by_its_own_package(tmp_path: Path, onecard: Callable[..., Result]) -> None:
    gguf_package = pytest.importorskip("gguf")
    view = gguf_view()
    writer = gguf_package.GGUFWriter(tmp_path / "model.gguf", "llama4")
    for key, value in view.metadata.items():
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            writer.add_array(key, [f"t{n}" for n in range(value)])
        elif key != "general.architecture":
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, (kind, shape) in view.tensors.items():
        if kind == "Q4_0":
            data = torch.zeros((*shape[:-1], shape[-1] // 32 * 18), dtype=torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf_package.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, torch.zeros(shape).numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    done = onecard("check", tmp_path, "--engine", "llama.cpp")
    assert done.exit_code == 0, done.stderr
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:1000])
    assert onecard("check", tmp_path, "--engine", "llama.cpp").exit_code == 1


# --- the three breakages that are reported most, in files, through the command line


@pytest.fixture(scope="module")
def files(baby: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Scout baby in compressed-tensors, every matrix of the text int4 in groups of 32; written by hand."""
    source, out = baby("scout"), tmp_path_factory.mktemp("engines") / "int4"
    adapter, tensors = load_adapter(source), foreign.unfused(source)
    draft = drafted(adapter, packed)
    for block in range(adapter.n_blocks):
        for _, module, _, inputs in adapter.modules(block):
            weight = tensors.pop(f"{module}.weight").float().unflatten(1, (inputs // 32, 32))
            scale = (weight.abs().amax(-1) / 7).to(torch.bfloat16)
            codes = (weight / scale.unsqueeze(-1).float()).round().clamp(-8, 7).to(torch.int8).flatten(1)
            tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.weight_shape"] = torch.tensor(codes.shape)
    return foreign.write_like(source, out, tensors, draft.block)


def changed(files: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(files, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_is_sound_loads(files: Path, onecard: Callable[..., Result]) -> None:
    done = onecard("check", files, "--engine", "vllm", "--engine", "transformers")
    assert done.exit_code == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["loads"] is True
    assert [b["rule"] for b in line["engines"]["vllm"]["breaches"]] == ["qk-version"]
    assert "35033" in done.stderr
    assert onecard("check", files).exit_code == 0, "our own reader takes it too"


def test_fused_experts_never_taken_apart(
    files: Path, baby: Callable[..., Path], tmp_path: Path, onecard: Callable[..., Result], refused: Callable[..., str]
) -> None:
    original = load_file(baby("scout") / "model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.0.feed_forward.experts." in n]:
            del tensors[name]
        tensors |= {n: t for n, t in original.items() if ".layers.0.feed_forward.experts." in n}

    out = changed(files, tmp_path / "fused", change)
    done = onecard("check", out, "--engine", "vllm")
    assert done.exit_code == 1
    assert "layers.0.feed_forward.experts.gate_up_proj (BF16 [8, 64, 192]) holds all experts" in done.stderr
    assert "Take the experts apart before quantizing" in done.stderr
    assert json.loads(done.stdout)["engines"]["vllm"]["loads"] is False
    # Named in `ignore`, they load at their old size.
    edit_json(
        out / "config.json", lambda c: c["quantization_config"]["ignore"].append("re:.*layers[.]0[.].*experts[.].*")
    )
    done = onecard("check", out, "--engine", "vllm")
    assert done.exit_code == 0, done.stderr
    breaches = json.loads(done.stdout)["engines"]["vllm"]["breaches"]
    assert {b["rule"]: b["severity"] for b in breaches} == {"experts-bf16": "warning", "qk-version": "warning"}


def test_q_and_k_in_a_layout_that_is_not_permuted(
    baby: Callable[..., Path], tmp_path: Path, onecard: Callable[..., Result]
) -> None:
    source = baby("scout")
    tensors, adapter = foreign.unfused(source), load_adapter(source)
    for block in range(adapter.n_blocks):
        for _, module, _, _ in adapter.modules(block):
            parts, _ = foreign.gptq(tensors.pop(f"{module}.weight").float())
            tensors |= {f"{module}.{leaf}": part.contiguous() for leaf, part in parts.items()}
    block_ = drafted(adapter, gptq).block
    out = foreign.write_like(source, tmp_path / "gptq", tensors, block_)
    done = onecard("check", out, "--engine", "vllm")
    assert done.exit_code == 1
    assert "q_proj is in GPTQ's layout: qweight, scales and qzeros are not permuted" in done.stderr
    assert "Keep q and k in bf16 here, or store them symmetric in compressed-tensors" in " ".join(done.stderr.split())
    assert [b["rule"] for b in json.loads(done.stdout)["engines"]["vllm"]["breaches"]] == ["qk-permuted"]
    assert onecard("check", out, "--engine", "gptqmodel").exit_code == 0, "which does not permute"


def test_mixed_widths_inside_what_is_fused(files: Path, tmp_path: Path, onecard: Callable[..., Result]) -> None:
    module = "language_model.model.layers.1.feed_forward.experts.5.up_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes = torch.ones(96, 64, dtype=torch.int8)
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 8)

    out = changed(files, tmp_path / "mixed", change)
    edit_json(
        out / "config.json",
        lambda c: c["quantization_config"]["config_groups"].update(group_1=group_of(8, targets=(module,))),
    )
    done = onecard("check", out, "--engine", "vllm")
    assert done.exit_code == 1
    assert "layers.1.feed_forward.experts holds int4 group 32" in done.stderr
    assert "int8 group 32 (5.up_proj)" in done.stderr
    assert "Give all of a unit one width" in done.stderr


def test_arguments_that_contradict_each_other(
    files: Path, tmp_path: Path, onecard: Callable[..., Result], refused: Callable[..., str]
) -> None:
    refused(onecard("check", files, "--tensor-parallel", "2"), "--engine vllm")
    refused(onecard("check", tmp_path / "nowhere", "--engine", "vllm"), "is no folder")
    refused(onecard("check", tmp_path, "--engine", "vllm"), "config.json")
    assert onecard("check", files, "--engine", "sglang").exit_code == 2


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        (
            {"layer_types": ["full_attention"] * 2},
            "layer_types has chunks in the layers [], and no_rope_layers gives [0, 1]",
        ),
        ({"attention_bias": True}, "attention_bias is true"),
        ({}, None),
    ],
)
def test_keys_that_vllm_computes_otherwise_are_named(
    changes: dict[str, object], needle: str | None, baby: Callable[..., Path]
) -> None:
    adapter = load_adapter(baby("scout"))
    for key, value in changes.items():
        setattr(adapter.text_config, key, value)
    assert adapter.otherwise_in_vllm() == ([] if needle is None else [needle])
