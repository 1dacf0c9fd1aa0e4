"""DeepSeek-V3 and Mixtral as published: their parameters, bytes and tensors, the parts of a checkpoint that are left
out or refused, and their facts for statistics and planners."""

import json
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import babies
import foreign
from hollow import DEEPSEEK, MIXTRAL, published, write_hollow
from onecard.checkpoint.model import open_model
from onecard.core.tensors import TensorInfo
from onecard.models.adapter import Adapter, Half, Role
from onecard.models.cache import CacheLayer, Split
from onecard.models.families import ADAPTERS, load_adapter
from walking import cpu_walk

FAMILIES = ["scout", "qwen3", "deepseek", "mixtral"]
CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


# Published checkpoints


def as_published(adapter: Adapter) -> dict[str, TensorInfo]:
    """DeepSeek-V3's files by its README_WEIGHTS.md: matrices of the blocks in fp8 with an fp32 scale for 128 x 128, the
    router's bias in fp32, and a 62nd layer with embedding, head, three norms and a projection of its own."""
    shapes = adapter.expected()
    last = adapter.block_prefix(adapter.n_blocks - 1)
    more = adapter.block_prefix(adapter.n_blocks)
    shapes |= {name.replace(last, more): shape for name, shape in shapes.items() if name.startswith(last)}
    hidden, table = adapter.hidden_size, (adapter.vocab_size, adapter.hidden_size)
    norms = {f"{more}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= norms | {f"{more}{name}.weight": table for name in ("embed_tokens", "shared_head.head")}
    found = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight") or name.endswith("_with_mqa.weight"):
            found[name] = TensorInfo(shape, "F8_E4M3")
            found[f"{name}_scale_inv"] = TensorInfo(tuple(ceil(n / 128) for n in shape), "F32")
        else:
            found[name] = TensorInfo(shape, "F32" if name.endswith(babies.ROUTER_BIAS) else "BF16")
    return found | {f"{more}eh_proj.weight": TensorInfo((hidden, 2 * hidden), "BF16")}


def test_deepseek_v3_is_the_published_one(tmp_path: Path, onecard: Callable[..., Result]) -> None:
    """671 billion parameters (its model card); 91,991 tensors of 688,574,839,360 bytes (a listing of the hub's headers,
    README of the PyPI package model-inspect)."""
    config = published(DEEPSEEK)
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = load_adapter(tmp_path)
    h, heads, moe = 7168, 128, 58
    attention = h * 1536 + 1536 * heads * 192 + h * 576 + 512 * heads * 256 + heads * 128 * h + 1536 + 512
    counted = 61 * (attention + 2 * h) + 3 * 3 * h * 18432 + moe * (257 * 3 * h * 2048 + 256 * h + 256)
    assert sum(prod(shape) for shape in adapter.expected().values()) == counted + 2 * 129280 * h + h
    assert round(counted / 1e9 + 2 * 129280 * h / 1e9, 2) == 671.03
    tensors = as_published(adapter)
    assert len(tensors) == 91_991
    assert sum(info.nbytes for info in tensors.values()) == 688_574_839_360
    folder = write_hollow(tmp_path / "model", config, tensors, shards=4)
    result = onecard("inspect", folder)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["family"], facts["experts"], facts["moe_blocks"]) == ("deepseek_v3", 256, moe)
    assert facts["parameters"] == counted + 2 * 129280 * h + h, "the layer of multi-token prediction is not counted"
    assert facts["roles"]["expert"]["widths"] == {"fp8 block 128x128": moe * 256 * 3 * h * 2048}
    assert any("model.layers.61" in fault for fault in facts["config_faults"])
    latent = CacheLayer("latent", 576, None, 1)
    assert adapter.cache_layers() == (latent,) * 61


def test_mixtral_8x7b_has_the_published_parameters(tmp_path: Path) -> None:
    model = open_model(str(write_hollow(tmp_path / "model", published(MIXTRAL))))
    assert sum(prod(shape) for shape in model.adapter.expected().values()) == 46_702_792_704
    assert model.adapter.cache_layers() == (CacheLayer("global", 2 * 8 * 128, None, 8),) * 32


# Left out, or refused


def with_drafting(model: Path, announced: int) -> Path:
    """A checkpoint with a layer for multi-token prediction, and a config that announces such layers."""
    tensors = load_file(model / "model.safetensors")
    more = {n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    more["model.layers.2.eh_proj.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)
    save_file(tensors | more, model / "model.safetensors", metadata={"format": "pt"})
    babies.edit_json(model / "config.json", lambda c: c.update(num_nextn_predict_layers=announced))
    return model


def test_layers_of_multi_token_prediction_are_left_aside_and_said(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model = with_drafting(copied("deepseek"), 1)
    babies.edit_json(
        model / "config.json",
        lambda c: c.update(
            auto_map={
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            }
        ),
    )
    out = tmp_path / "out"
    result = onecard("quantize", model, out, "--recipe", recipe(method="rtn"), *texts)
    assert result.exit_code == 0, result.stderr
    assert "multi-token prediction" in " ".join(result.stderr.split())
    assert any("model.layers.2." in said for said in json.loads((out / "onecard.json").read_text())["warnings"])
    emitted = {name for shard in babies.shard_files(out) for name in load_file(shard)}
    assert emitted
    assert not [name for name in emitted if ".layers.2." in name]
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert "auto_map" not in config, "its code was not carried along"
    assert onecard("verify", model, out, *texts[2:]).exit_code == 0


def test_a_layer_that_no_config_announces_is_refused(copied: Callable[..., Path], refuse_model: Callable) -> None:
    """Unless its tensors show that it is of multi-token prediction (tests/test_stored_layouts.py)."""
    model = with_drafting(copied("deepseek"), 0)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.eh_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refuse_model(model, "model.layers.2.input_layernorm.weight", "knows no such tensor")


@pytest.mark.parametrize(
    ("family", "change", "needles"),
    [
        ("deepseek", {"auto_map": {"AutoModel": "modeling_other.Other"}}, ["AutoModel", "remote code"]),
        ("mixtral", {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}}, ["remote code"]),
        ("deepseek", {"scoring_func": "softmax"}, ["scoring_func is 'softmax'"]),
        ("deepseek", {"attention_bias": True}, ["attention_bias is true"]),
        ("deepseek", {"n_group": 3}, ["8 experts in 3 groups"]),
        ("deepseek", {"n_group": 8}, ["not a valid deepseek_v3 config"]),  # the two best of a group of one
        ("deepseek", {"topk_group": 5}, ["not a valid deepseek_v3 config"]),
        ("deepseek", {"num_nextn_predict_layers": "1"}, ["num_nextn_predict_layers"]),
        ("deepseek", {"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers is -1"]),
        ("deepseek", {"n_shared_experts": 0}, ["n_shared_experts is 0"]),
        ("mixtral", {"sliding_window": 0}, ["sliding_window is 0"]),
    ],
)
def test_another_architecture_is_refused(
    family: str,
    change: dict[str, Any],
    needles: list[str],
    copied: Callable[..., Path],
    refused: Callable[..., str],
    onecard: Callable[..., Result],
) -> None:
    model = copied(family)
    babies.edit_json(model / "config.json", lambda c: c.update(change))
    refused(onecard("inspect", model), *needles)


def test_a_config_that_engines_read_otherwise_is_told_of(copied: Callable[..., Path]) -> None:
    """transformers saves DeepSeek's config without keys for which vLLM has other defaults."""
    model = copied("deepseek")
    assert load_adapter(model).faults(json.loads((model / "config.json").read_text())) == []
    (found,) = load_adapter(model).faults({"num_nextn_predict_layers": 0})
    assert "scoring_func" in found
    assert "topk_method" in found


def matrices(name: str) -> bool:
    return name.endswith(("_proj.weight", "_with_mqa.weight"))


@pytest.mark.parametrize("method", ["rtn", "fast"])
def test_an_original_in_fp8_is_quantized_from_there(
    method: str,
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """The result equals that of its dequantized twin, to the byte."""
    pair = foreign.quantized_pair(baby("deepseek"), tmp_path, foreign.fp8, matrices, FP8, torch.bfloat16)
    use, emitted = recipe(method=method), []
    for number, model in enumerate(pair):
        promised = json.loads(onecard("plan", model, "--recipe", use).stdout)["emitted_bytes"]
        result = onecard("quantize", model, tmp_path / str(number), "--recipe", use, *texts)
        assert result.exit_code == 0, result.stderr
        files = babies.shard_files(tmp_path / str(number))
        assert sum(file.stat().st_size for file in files) == promised
        emitted.append({file.name: file.read_bytes() for file in files})
    assert emitted[0] == emitted[1]
    configs = [json.loads((tmp_path / str(number) / "config.json").read_text()) for number in range(2)]
    assert configs[0] == configs[1]
    warnings = json.loads((tmp_path / "0" / "onecard.json").read_text())["warnings"]
    assert any("fp8" in warning for warning in warnings)


def test_a_copy_in_fp8_is_no_original(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Qwen3 is published in bf16."""
    pair = foreign.quantized_pair(baby("qwen3"), tmp_path, foreign.fp8, matrices, FP8, torch.bfloat16)
    refused(onecard("plan", pair[0], "--recipe", recipe()), "quantized already")


def test_latents_that_an_engine_fuses_share_a_scheme(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    refused: Callable[..., str],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """kv_b may be kept alone, since engines unpack it. Projections that read the residual stream are one matrix for
    vLLM."""
    roles = ["expert", "shared_expert", "mlp", "attention"]
    alone = recipe(method="rtn", quantize_roles=roles, keep_modules=["*.kv_a_proj_with_mqa"])
    refused(onecard("plan", baby("deepseek"), "--recipe", alone), "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj")
    kept = recipe(method="rtn", quantize_roles=roles, keep_modules=["*.kv_b_proj"])
    result = onecard("quantize", baby("deepseek"), tmp_path / "out", "--recipe", kept, *texts)
    assert result.exit_code == 0, result.stderr
    emitted = {name for shard in babies.shard_files(tmp_path / "out") for name in load_file(shard)}
    assert "model.layers.1.self_attn.kv_b_proj.weight" in emitted
    assert "model.layers.1.self_attn.q_b_proj.weight_packed" in emitted


# Facts for statistics and planners


@pytest.mark.parametrize("family", [*FAMILIES, "maverick"])
def test_a_site_reads_the_norm_that_it_names_and_no_other_does(family: str, baby: Callable[..., Path]) -> None:
    """Statistics take the rows of sites that read a norm from the norm, without running the half."""
    model = open_model(str(baby(family)))
    adapter = model.adapter
    hidden = torch.randn(2, 9, adapter.hidden_size, generator=torch.Generator().manual_seed(1))
    walk = cpu_walk(model)
    for index in range(adapter.n_blocks):
        block = walk.load(index)
        for half, norm in ((Half.ATTENTION, adapter.first_norm), (Half.FEED_FORWARD, adapter.middle_norm)):
            normed = block.norm(norm)(hidden).flatten(0, 1)
            seen: dict[str, torch.Tensor] = {}
            with block.observed(lambda site, e, t, rows, _: seen.update({site.key: rows})):  # noqa: B023
                block.forward(hidden, half)
            for site in adapter.sites(index):
                if site.half is not half or site.role is Role.EXPERT:
                    continue
                same = seen[site.key].shape == normed.shape and torch.equal(seen[site.key], normed)
                if site.half is Half.ATTENTION:
                    assert same == (site.reads_norm == norm), site.key
                else:  # rows of gate and up come from the running half
                    assert site.reads_norm in (None, norm)
        router = adapter.router_site(index)
        assert router is None or router.reads_norm == adapter.middle_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_caches_what_transformers_caches(family: str) -> None:
    """Cached numbers for each token, keys and values together, and the tokens that a layer keeps."""
    model = babies.make_model(family)
    adapter = ADAPTERS[model.config.model_type](model.config)
    text = getattr(model, "language_model", model)
    with torch.inference_mode():
        cache = text(input_ids=torch.arange(3, 33)[None], use_cache=True).past_key_values
    for layer, theirs in zip(adapter.cache_layers(), cache.layers, strict=True):
        kept = theirs.keys.shape[2]
        assert layer.values_per_token == (theirs.keys.numel() + theirs.values.numel()) / kept
        # transformers keeps the part of a window that the next token sees besides itself.
        assert kept == (30 if layer.window is None else layer.window - 1)
        assert layer.kv_heads == theirs.keys.shape[1]


def test_latents_are_copied_to_every_card_and_heads_are_cut(baby: Callable[..., Path]) -> None:
    """vLLM's deepseek_v2.py (DeepseekV2MLAAttention) and mixtral.py: ReplicatedLinear, ColumnParallel, RowParallel."""
    deepseek, mixtral = (load_adapter(baby(family)) for family in ("deepseek", "mixtral"))
    copied = ("q_a_proj", "kv_a_proj_with_mqa", "gate", "q_a_layernorm", "kv_a_layernorm", babies.ROUTER_BIAS)
    inputs = ("o_proj", "down_proj", "w2")
    for adapter in (deepseek, mixtral):
        for name in adapter.expected():
            if ".layers." not in name or name.endswith("layernorm.weight"):
                continue
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            wanted = Split.COPIED if leaf in copied else Split.INPUTS if leaf in inputs else Split.OUTPUTS
            assert adapter.split(name) is (Split.KV_HEADS if leaf in ("k_proj", "v_proj") else wanted), name
