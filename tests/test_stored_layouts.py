"""What transformers reads as one model is read as that model, however it is stored.

The judge is transformers: the same model, saved in both layouts, gives the same emitted tensors, and the walk over
either gives transformers' logits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import babies
from command_line import Refuse
from damage import damaged
from inputs import write_tokenizer
from onecard.checkpoint.model import open_model
from walking import make_rows, relative, walk_logits, whole_logits

Tensors = dict[str, torch.Tensor]


def saved_from_memory(folder: Path, family: str) -> Path:
    """A baby as transformers saves it in its own layout, experts stacked."""
    model = babies.make_model(family, 2)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(babies.ROUTER_BIAS)}
    model.to(torch.bfloat16).load_state_dict(biases, strict=False, assign=True)
    model.save_pretrained(folder, save_original_format=False)
    write_tokenizer(folder)
    return folder


def emitted_tensors(folder: Path) -> Tensors:
    return {name: tensor for shard in babies.shard_files(folder) for name, tensor in load_file(shard).items()}


def edit_tensors(model: Path, change: Callable[[Tensors], None]) -> None:
    """Changes the tensors of a baby's one file."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def quantized(
    onecard: Callable[..., Result], recipe: Callable[..., Path], texts: list[str], tmp_path: Path
) -> Callable[..., tuple[Tensors, str]]:
    """(model, keys of the recipe) -> the emitted tensors, and what was said."""

    def run(model: Path, **keys: Any) -> tuple[Tensors, str]:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        result = onecard("quantize", model, out, "--recipe", recipe(**{"method": "rtn"} | keys), *texts)
        assert result.exit_code == 0, result.stderr
        return emitted_tensors(out), " ".join(result.stderr.split())

    return run


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", babies.UNFUSED)
def test_stacked_experts_are_the_same_model(
    baby: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]], tmp_path: Path, family: str
) -> None:
    stacked = saved_from_memory(tmp_path / "stacked", family)
    names = load_file(stacked / "model.safetensors").keys()
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in names), "a test of this test"
    roles = ["attention"]  # experts that are kept are taken apart, too
    assert same(quantized(stacked)[0], quantized(baby(family))[0])
    assert same(quantized(stacked, quantize_roles=roles)[0], quantized(baby(family), quantize_roles=roles)[0])
    model = open_model(str(stacked))
    rows = make_rows(model.adapter)
    theirs = AutoModelForCausalLM.from_pretrained(stacked, dtype=torch.float32).eval()
    for row, logits in zip(rows, walk_logits(model.adapter, model.source, rows), strict=True):
        assert relative(logits, whole_logits(theirs, row)) < 1e-5


def test_stacked_experts_with_other_axes_are_refused(tmp_path: Path, refuse_model: Refuse) -> None:
    """[experts, in, out] is another family's layout: axes are known, and not guessed."""
    model = saved_from_memory(tmp_path / "model", "qwen3")
    edit_tensors(
        model,
        lambda tensors: tensors.update(
            {n: t.mT.contiguous() for n, t in tensors.items() if n.endswith(("gate_up_proj", "experts.down_proj"))}
        ),
    )
    refuse_model(model, "experts.down_proj is [8, 32, 64], and config.json says [8, 64, 32]")


# --- tensors that say nothing new


@pytest.mark.parametrize("family", babies.UNFUSED)
@pytest.mark.parametrize("which", ["one expert", "all"])
def test_experts_that_are_stored_in_both_layouts_are_refused(
    family: str, which: str, tmp_path: Path, refuse_model: Refuse
) -> None:
    """The one copy may be another than the other, and engines take either."""
    model = saved_from_memory(tmp_path / "model", family)
    apart = load_file(babies.make_baby(tmp_path / "apart", family, 2) / "model.safetensors")
    extra = {n: t * 2 for n, t in apart.items() if f".experts.{0 if which == 'one expert' else ''}" in n}
    edit_tensors(model, lambda tensors: tensors.update(extra))
    refuse_model(model, "holds some experts twice", "Remove the layout that is left over")


def tied(model: Path) -> Path:
    """A baby whose head is its embedding, and stored once more as a copy."""
    edit_tensors(
        model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    babies.edit_json(model / "config.json", lambda config: config.update(tie_word_embeddings=True))
    return model


def test_an_equal_copy_of_a_tied_head_is_read(
    copied: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]], onecard: Callable[..., Result]
) -> None:
    model = tied(copied("qwen3"))
    assert onecard("check", model).exit_code == 0
    with_copy, _ = quantized(model)
    edit_tensors(model, lambda tensors: tensors.__delitem__("lm_head.weight"))
    without, _ = quantized(model)
    assert same(with_copy, without)
    assert "lm_head.weight" not in with_copy


def test_an_equal_copy_in_another_dtype_is_read(copied: Callable[..., Path], onecard: Callable[..., Result]) -> None:
    model = tied(copied("qwen3"))
    edit_tensors(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].float()}))
    assert onecard("inspect", model).exit_code == 0


def test_a_copy_of_a_tied_head_that_differs_is_refused(
    copied: Callable[..., Path], refuse_model: Refuse, onecard: Callable[..., Result]
) -> None:
    model = tied(copied("qwen3"))
    edit_tensors(model, lambda tensors: tensors["lm_head.weight"][-1, -1:].add_(1))
    refuse_model(model, "lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings to false")
    damaged(model, "lm_head.weight is not model.embed_tokens.weight")


def test_stored_rotary_frequencies_are_left_aside(
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    quantized: Callable[..., tuple[Tensors, str]],
    onecard: Callable[..., Result],
) -> None:
    """Files of older transformers hold them. They follow from config.json."""
    model = copied("mixtral")
    more = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    edit_tensors(model, lambda tensors: tensors.update(more))
    assert onecard("check", model).exit_code == 0
    assert same(quantized(model)[0], quantized(baby("mixtral"))[0])


def test_layers_of_multi_token_prediction_that_no_config_announces_are_said(
    copied: Callable[..., Path], baby: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]]
) -> None:
    model = copied("deepseek")

    def draft(tensors: Tensors) -> None:
        more = {n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
        tensors |= more | {"model.layers.2.eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)}

    edit_tensors(model, draft)
    emitted, said = quantized(model)
    assert same(emitted, quantized(baby("deepseek"))[0])
    assert "model.layers.2.* is a layer of multi-token prediction" in said


def test_no_name_but_that_of_a_later_layer_makes_a_layer_of_multi_token_prediction(
    copied: Callable[..., Path], refuse_model: Refuse
) -> None:
    model = copied("deepseek")
    names = ["eh_proj.weight", "model.eh_proj.weight", "model.layers.1.eh_proj.weight"]
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    refuse_model(model, *(f"{name} is in the checkpoint" for name in names))


# --- configs and recipes


def test_a_config_without_head_dim_means_equal_shares_of_the_width(
    copied: Callable[..., Path], baby: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]]
) -> None:
    model = copied("qwen3")
    config = json.loads((model / "config.json").read_text())
    assert config.pop("head_dim") * config["num_attention_heads"] == config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(model) is not None, "transformers reads it"
    assert same(quantized(model)[0], quantized(baby("qwen3"))[0])


def test_a_head_dim_of_null_is_emitted_as_its_number(
    copied: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]], tmp_path: Path
) -> None:
    """transformers 5.23 fails with null."""
    model = copied("qwen3")
    babies.edit_json(model / "config.json", lambda c: c.update(head_dim=None))
    _, said = quantized(model)
    assert "head_dim is null" in said
    assert json.loads((tmp_path / "out-0" / "config.json").read_text())["head_dim"] == 16


@pytest.mark.parametrize("pattern", ["*.mlp.gate", "*norm", "lm_head", "*.self_attn.*", "model.embed_tokens"])
def test_a_module_that_stays_anyway_may_be_named(
    baby: Callable[..., Path], quantized: Callable[..., tuple[Tensors, str]], pattern: str
) -> None:
    kept, _ = quantized(baby("qwen3"), keep_modules=[pattern])
    assert same(kept, quantized(baby("qwen3"))[0])
