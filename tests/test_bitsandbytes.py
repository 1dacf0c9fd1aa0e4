"""bitsandbytes, written by us: its own functions read back what we store, the bytes are those that shapes promise,
every expert is in few bits, and transformers loads them as such.

The twins: bitsandbytes' own Linear4bit and QuantState, handed the stored parts alone; NF4's levels looked up one by
one; and transformers' `load_in_4bit`, which leaves fused experts in bf16.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)

import babies
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.formats.bitsandbytes_read import dense_4bit, dense_8bit
from onecard.checkpoint.formats.bitsandbytes_write import STATE_PART, layout, quantization_config, quantize
from onecard.checkpoint.inspect import inspect
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import Model, open_model, open_source
from onecard.checkpoint.packed import PackedSource
from onecard.conversion.export import export
from onecard.core.errors import InputError
from onecard.core.scheme import BY_ROW, INT8_ROWS, NF4, Scheme
from onecard.core.tensors import DTYPE_NAMES
from onecard.models.adapter import Role, read
from onecard.publish.check import check
from onecard.recipe import Recipe, load_recipe
from pipelines import make_recipe, raw_tensors, run_pipeline, write_tokenizer
from walking import make_rows, relative, walk_logits, whole_logits

SCHEMES = {"bnb-nf4": Scheme(4, 64, True, NF4), "bnb-int8": Scheme(8, BY_ROW, True, INT8_ROWS)}
SIZES = {"bnb-nf4": 64, "bnb-int8": BY_ROW}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def parts_of(outputs: int, inputs: int, dtype: torch.dtype, seed: int, method: str) -> tuple[Any, Any, torch.Tensor]:
    """The stored parts, the weight that they mean, and the weight that they were made from."""
    spread = 10 ** torch.linspace(-4, 1, outputs)[:, None]  # rows of very different size
    weight = (spread * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))).to(dtype)
    return *quantize(weight, SCHEMES[method]), weight


# Each row is whole blocks; there are enough blocks for more than one block of scales.
shapes = st.tuples(st.integers(1, 70), st.integers(1, 9).map(lambda blocks: 64 * blocks))


@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9), method=st.sampled_from(sorted(SCHEMES)))
@settings(max_examples=60, deadline=None)
def test_parts_have_the_predicted_layout_whatever_the_values(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, method: str
) -> None:
    parts, dense, weight = parts_of(*shape, dtype, seed, method)
    predicted = layout(SCHEMES[method], *shape, DTYPE_NAMES[dtype])
    assert {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in parts.items()} == predicted
    assert dense.shape == weight.shape
    # NF4's steps are at most 0.304 of a block's largest weight apart, int8's a 127th of its row's, in fp16.
    bar = 0.16 if method == "bnb-nf4" else 0.006
    assert (dense.float() - weight.float()).abs().max() <= bar * weight.float().abs().max()


@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_nf4_is_what_bitsandbytes_reads_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    parts, dense, weight = parts_of(*shape, dtype, seed, "bnb-nf4")
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = dequantize_4bit(codes, state)
    beside = {key.removeprefix("weight."): value.clone() for key, value in parts.items() if key != "weight"}
    read = dequantize_4bit(parts["weight"], QuantState.from_dict(dict(beside), device=torch.device("cpu")))
    assert torch.equal(parts["weight"], codes)
    assert torch.equal(read, theirs)
    assert torch.equal(dense, theirs)
    said = json.loads(bytes(parts[STATE_PART].tolist()))
    ours = dense_4bit({"codes": parts["weight"], **beside}, dtype, state=said)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (5, 200), (3, 10)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_that_run_across_rows_are_read_with_their_own_scales(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """bitsandbytes 0.50.2 on a CPU begins a new block with every row: the error for (64, 96) is 0.27, not 0.09."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    facts = state.as_dict()
    parts = {"codes": codes, "absmax": facts["absmax"], "quant_map": facts["quant_map"]}
    found = dense_4bit(parts, dtype, state=facts | {"shape": list(shape)})
    both = torch.stack([codes >> 4, codes & 15], -1).flatten()[: weight.numel()].long()
    scale = facts["absmax"].repeat_interleave(64)[: weight.numel()]
    assert torch.equal(found, (facts["quant_map"][both] * scale).to(dtype).view(shape))
    assert (found - weight).norm() < 0.12 * weight.norm()


@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_int8_rows_are_what_bitsandbytes_linear_holds(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    parts, dense, weight = parts_of(*shape, dtype, seed, "bnb-int8")
    linear = Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    linear.weight.data = weight
    saved = linear.to("cpu").state_dict()
    if "SCB" not in saved:  # before it is moved to a device the module has not quantized
        linear.weight = linear.weight.to("cpu")
        saved = linear.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in parts.items()}
    assert all(torch.equal(saved[name], parts[name]) for name in saved)
    assert torch.equal(dense, int8_vectorwise_dequant(saved["weight"], saved["SCB"]))
    ours = dense_8bit({"codes": parts["weight"], "scb": parts["SCB"]}, torch.float32)
    assert torch.allclose(ours, dense, rtol=2**-22, atol=0)  # code * (SCB / 127), and (code * SCB) * (1 / 127)


def test_linear4bit_saves_the_same_parts() -> None:
    parts, _, weight = parts_of(96, 64, torch.bfloat16, 0, "bnb-nf4")
    linear = Linear4bit(64, 96, bias=False, quant_type="nf4", compress_statistics=True)
    linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    saved = linear.state_dict()
    assert saved.keys() == parts.keys()
    for name, tensor in saved.items():
        if name == STATE_PART:  # ours is padded with spaces
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(parts[name].tolist()))
        else:
            assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("method", SCHEMES)
def test_transformers_reads_the_config_block_as_it_is_meant(method: str) -> None:
    config = BitsAndBytesConfig.from_dict(quantization_config({"a": SCHEMES[method]}, ["lm_head"]))
    assert (config.load_in_4bit, config.load_in_8bit) == (method == "bnb-nf4", method == "bnb-int8")
    assert config.quantization_method() == ("nf4" if method == "bnb-nf4" else "llm_int8")
    assert config.llm_int8_skip_modules == ["lm_head"]
    assert config.bnb_4bit_use_double_quant == (method == "bnb-nf4")
    assert config.bnb_4bit_quant_storage is torch.uint8


# Contradicting recipes are refused


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "bnb-nf4", "group_size": 128}, "method bnb-nf4 has group_size 64"),
        ({"method": "bnb-nf4", "bits": 8}, "method bnb-nf4 has bits 4"),
        ({"method": "bnb-int8", "symmetric": False}, "symmetric True"),
        ({"method": "bnb-nf4", "format": "compressed-tensors"}, "contradict each other"),
        (
            {"method": "rtn", "format": "bitsandbytes"},
            "bnb-nf4 and bnb-int8 write the format bitsandbytes and no other",
        ),
        ({"method": "rtn", "group_size": 0}, "positive multiple of 8"),
        ({"method": "bnb-nf4", "schemes": {"attention": "int8 by row"}}, "has one width"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"name": "r", "description": ""} | keys))
    with pytest.raises(InputError, match=told):
        load_recipe(str(path))


def test_the_method_brings_its_own_format() -> None:
    assert load_recipe("nf4").scheme == SCHEMES["bnb-nf4"]
    assert Recipe(name="r", description="", method="bnb-int8").scheme == SCHEMES["bnb-int8"]
    assert Recipe(name="r", description="", method="bnb-int8").format == "bitsandbytes"


# Whole runs


def make_baby(folder: Path, family: str, layers: int | None = None) -> Path:
    """A baby in which every matrix row is whole NF4 blocks, in shared and dense MLPs too."""
    if family == "qwen3":
        config = babies.qwen3_config(layers or 3)
        config.moe_intermediate_size, config.intermediate_size = 128, 192
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        config = babies.llama4_config(layers or 4, moe_step=2 if family == "maverick" else 1, intermediate=128)
        config.text_config.intermediate_size_mlp = 192
        if family == "llama4-text":
            config.text_config.architectures = ["Llama4ForCausalLM"]
            model = Llama4ForCausalLM(config.text_config)
        else:
            model = Llama4ForConditionalGeneration(config)
    model = model.float().eval()
    babies.randomize(model, 0)
    state = model.state_dict()
    babies.save(folder, model.config, babies.split_experts(state) if family == "qwen3" else state, shards=2)
    write_tokenizer(folder)
    return folder


CASES = [(f, "bnb-nf4") for f in ("scout", "maverick", "llama4-text", "qwen3")] + [("scout", "bnb-int8")]
CASES += [("qwen3", "bnb-int8")]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, str]:
    """(source, checkpoint, method)."""
    family, method = request.param
    folder = tmp_path_factory.mktemp("run")
    source = make_baby(folder / "source", family)
    recipe = make_recipe(method=method, group_size=SIZES[method])
    predicted = plan_for(open_source(str(source)), recipe)
    record = run_pipeline(source, folder / "out", recipe)
    files = sorted((folder / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert sum(path.stat().st_size for path in files) == predicted.emitted_bytes == record.plan.emitted_bytes
    return open_model(str(source)), open_model(str(folder / "out")), method


def source_of(model: Model) -> PackedSource:
    assert isinstance(model.source, PackedSource)
    return model.source


def test_every_expert_is_in_few_bits_and_near_its_own_weight(run: tuple[Model, Model, str]) -> None:
    source, made, method = run
    adapter, stored = made.adapter, raw_tensors(made.path)
    experts = [name for name in adapter.expected() if adapter.role(name) is Role.EXPERT]
    assert len(experts) >= 2 * 8 * 3
    for name in experts:
        outputs, inputs = adapter.expected()[name]
        dtype, shape, _ = stored[name]
        if method == "bnb-nf4":
            assert (dtype, shape) == ("U8", (outputs * inputs // 2, 1)), name
        else:
            assert (dtype, shape) == ("I8", (outputs, inputs)), name
        original = read(adapter, source.source, name).float()
        ours = source_of(made).get(name).float()
        assert float((ours - original).norm() / original.norm()) < (0.12 if method == "bnb-nf4" else 0.01), name
    roles = inspect(str(made.path))["roles"]
    assert roles["expert"]["widths"] == {str(SCHEMES[method]): roles["expert"]["parameters"]}


def test_what_is_not_quantized_is_byte_identical_and_named(run: tuple[Model, Model, str]) -> None:
    source, made, _ = run
    before, after = raw_tensors(source.path), raw_tensors(made.path)
    kept = {name for name in after if name in before and name not in source_of(made).weights}
    assert kept
    assert all(before[name] == after[name] for name in kept)
    block = made.config["quantization_config"]
    assert f"{made.adapter.head_name.removesuffix('.weight')}" in block["llm_int8_skip_modules"]
    assert not set(block["llm_int8_skip_modules"]) & source_of(made).schemes.keys()


def test_transformers_gives_the_weights_and_logits_of_our_walk(run: tuple[Model, Model, str]) -> None:
    _, made, method = run
    model = load_with_transformers(made.path, torch.float32)
    found = dict(model.named_parameters())
    assert found.keys() == made.adapter.expected().keys()
    for name, weight in found.items():
        # For int8 it divides by 127 in another order than we do.
        slack = 0 if method == "bnb-nf4" else 2**-22
        assert torch.allclose(weight, source_of(made).get(name).float(), rtol=slack, atol=0), name
    rows = make_rows(made.adapter)
    for row, ours in zip(rows, walk_logits(made.adapter, source_of(made), rows, dtype=torch.float32), strict=True):
        assert relative(ours, whole_logits(model, row)) < 1e-4, row.document


def test_check_is_content_and_finds_a_width_that_was_not_planned(run: tuple[Model, Model, str], tmp_path: Path) -> None:
    _, made, method = run
    found = check(str(made.path))
    assert (found.problems, found.unchecked) == ([], [])
    assert found.facts["quantized_modules"] == len(source_of(made).schemes)
    other = tmp_path / "other"
    shutil.copytree(made.path, other)
    said = {"method": "rtn", "format": "compressed-tensors", "bits": 8, "group_size": 32}
    babies.edit_json(other / "onecard.json", lambda record: record["recipe"].update(said))
    found = check(str(other))
    wanted = f"is stored as {SCHEMES[method]}, and onecard.json says int8 group 32"
    assert sum(wanted in problem for problem in found.problems) == len(source_of(made).schemes)


# Stock transformers, without a line of ours


def expert_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name}


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scout")
    source = make_baby(folder / "source", "scout", layers=2)
    run_pipeline(source, folder / "out", make_recipe(method="bnb-nf4", group_size=64))
    return source, folder / "out"


def test_transformers_holds_every_expert_of_ours_in_four_bits(scout: tuple[Path, Path]) -> None:
    model, told = AutoModelForImageTextToText.from_pretrained(scout[1], output_loading_info=True)
    assert not any(told.values())
    made = open_model(str(scout[1]))
    experts = expert_parameters(model)
    assert len(experts) == 2 * 8 * 3
    for name, weight in experts.items():
        assert isinstance(weight, Params4bit), name
        assert weight.dtype == torch.uint8, name
        assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True), name
    rows = [row for row in make_rows(made.adapter) if row.pixels is None]
    for row, ours in zip(rows, walk_logits(made.adapter, source_of(made), rows, dtype=torch.bfloat16), strict=True):
        # It multiplies in four bits, where we multiply the bf16 weights: ten steps of bf16, as elsewhere.
        assert relative(ours, whole_logits(model.eval(), row)) < 10 * 2**-8, row.document


def test_load_in_4bit_leaves_fused_experts_in_bf16(scout: tuple[Path, Path]) -> None:
    """What `load_in_4bit` does instead: it leaves experts in bf16. If this fails, transformers has learnt to quantize
    them and docs/formats.md is out of date."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForImageTextToText.from_pretrained(scout[0], dtype=torch.bfloat16, quantization_config=config)
    assert {weight.dtype for weight in expert_parameters(model).values()} == {torch.bfloat16}
    assert any(isinstance(weight, Params4bit) for weight in model.parameters()), "other matrices are in four bits"


def test_stock_transformers_refuses_unstacked_qwen3_and_our_loader_leaves_it_as_it_was(tmp_path: Path) -> None:
    source = make_baby(tmp_path / "source", "qwen3", layers=1)
    run_pipeline(source, tmp_path / "out", make_recipe(method="bnb-nf4", group_size=64))
    load_with_transformers(tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert {weight.dim() for weight in expert_parameters(model).values()} == {3}


def test_nf4_is_refused_where_a_row_is_no_whole_number_of_blocks(tmp_path: Path) -> None:
    source = open_source(str(babies.make_baby(tmp_path / "source", "scout", layers=1)))
    with pytest.raises(InputError, match=r"group_size 64 does not divide the 96 inputs of .*down_proj and 8 more"):
        plan_for(source, make_recipe(method="bnb-nf4", group_size=64))


def test_a_weight_that_fp16_cannot_hold_is_refused_by_int8(tmp_path: Path) -> None:
    source = make_baby(tmp_path / "source", "qwen3", layers=1)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"

    def change(which: str, tensor: torch.Tensor) -> torch.Tensor:
        if which == name:
            tensor[5, 7] = 1e5
        return tensor

    wrong = babies.changed_copy(source, tmp_path / "wrong", change)
    with pytest.raises(InputError, match=r"experts\.3\.up_proj holds weights that bnb-int8 cannot hold"):
        run_pipeline(wrong, tmp_path / "out", make_recipe(method="bnb-int8", group_size=BY_ROW))


# Exported


class Quiet:
    """A Step that tells nobody."""

    def begin(self, stage: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


def test_an_original_is_exported_to_the_bytes_that_the_method_writes(scout: tuple[Path, Path], tmp_path: Path) -> None:
    done = export(str(scout[0]), "bnb-nf4", tmp_path / "out", Quiet())
    assert done.warnings == []
    assert {name: (tmp_path / "out" / name).stat().st_size for name, _ in done.planned} == dict(done.planned)
    assert {name for name, _ in done.planned} >= {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert raw_tensors(tmp_path / "out") == raw_tensors(scout[1])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", scout[1])]
    assert configs[0] == configs[1]
    assert check(str(tmp_path / "out")).problems == []


def test_an_int4_checkpoint_is_exported_with_a_warning_that_no_code_was_kept(
    scout: tuple[Path, Path], tmp_path: Path
) -> None:
    run_pipeline(scout[0], tmp_path / "int4", make_recipe(method="rtn"))
    done = export(str(tmp_path / "int4"), "bnb-nf4", tmp_path / "out", Quiet())
    (warning,) = done.warnings
    assert "no code could be kept" in warning
    assert warning in json.loads((tmp_path / "out" / "onecard.json").read_text())["warnings"]
    int4, made = open_model(str(tmp_path / "int4")), open_model(str(tmp_path / "out"))
    assert source_of(made).schemes.keys() == source_of(int4).schemes.keys()
    for name in source_of(int4).weights:
        _, wanted = quantize(source_of(int4).get(name), SCHEMES["bnb-nf4"])
        assert torch.equal(source_of(made).get(name), wanted), name
    assert check(str(tmp_path / "out")).problems == []


def test_what_is_in_nf4_already_is_not_exported_to_it(scout: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is in NF4 already"):
        export(str(scout[1]), "bnb-nf4", tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()
