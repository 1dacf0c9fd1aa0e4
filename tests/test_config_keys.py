"""Every key of every config class: the walk computes with it as transformers does, or refuses it, or no forward pass
uses it. The judge is the whole model of transformers, built from the same config and weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from config_edits import ANYWHERE, EDITS, edited
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import babies
from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError
from onecard.core.rows import Row
from onecard.models import gguf
from onecard.models.config_keys import KEYS, NESTED, Use
from onecard.models.families import ADAPTERS, adapter_of, load_adapter
from walking import relative, walk_logits, whole_logits

FAMILIES = ("scout", "qwen3", "deepseek", "mixtral")
NOT_TRIED = {
    "_name_or_path": "written by save_pretrained, read by nothing",
    "model_type": "another family",
    "image_token_index": "a row's placeholders go by it: test_verify_configs.py",
    "output_attentions": "transformers refuses it beside sdpa",
    "tie_last_hidden_states": "no field of the class",
    "head_dim": "of DeepSeek-V3: qk_rope_head_dim by another name",
    "qk_head_dim": "of DeepSeek-V3: computed from two others",
    "aux_loss_alpha": "no field of the class",
    "seq_aux": "no field of the class",
    "ep_size": "no field of the class",
}


CASES = [
    pytest.param(family, key, id=f"{family}-{key}")
    for family in FAMILIES
    for key in (EDITS[family] | (ANYWHERE if family == "qwen3" else {}))
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_config_class_is_in_one_group_and_is_tried(family: str) -> None:
    config = babies.make_model(family, layers=1).config
    for c, path in [(config, ""), *((getattr(config, n), f"{n}.") for n in NESTED if hasattr(config, n))]:
        known, there = KEYS[c.model_type], set(c.to_dict()) - {*NESTED}
        assert there <= known.keys(), "transformers' class has a key that config_keys.py lacks"
        tried = {key.removeprefix(path) for key in EDITS[family] if key.startswith(path)} | ANYWHERE.keys()
        assert known.keys() - tried <= NOT_TRIED.keys()


@dataclass
class Tried:
    """A config in transformers and in a walk. Logits are None where transformers fails, or onecard refuses it."""

    shapes: dict[str, tuple[int, ...]]
    whole: list[torch.Tensor] | None
    walked: list[torch.Tensor] | None
    refusal: str = ""


def whole_model(family: str, raw: dict[str, Any]) -> Any:
    """transformers' model of a config.json, with the same random values for the same shapes."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(ADAPTERS[raw["model_type"]].mended(raw))
    if family == "scout":
        model: Any = Llama4ForConditionalGeneration(config).float()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    babies.randomize(model, seed=0)
    return model


def try_config(family: str, raw: dict[str, Any], folder: Path) -> Tried:
    try:
        model = whole_model(family, raw)
        rows = rows_for(model.config)
        whole = [whole_logits(model, row) for row in rows]
    except Exception:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(InputError) as error:
            load_adapter(folder)
        return Tried({}, None, None, str(error.value))
    state = babies.published(family, model.state_dict())
    if getattr(model.config, "text_config", model.config).tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    babies.save(folder, model.config, state)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        adapter = load_adapter(folder)
    except InputError as error:
        return Tried(shapes, whole, None, str(error))
    return Tried(shapes, whole, walk_logits(adapter, open_folder(folder), rows))


def rows_for(config: Any) -> list[Row]:
    """A long row, with a picture where the model sees, and a short one."""
    generator = torch.Generator().manual_seed(7)
    tokens, pixels = torch.randint(3, 240, (33,), generator=generator), None
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        side = vision.image_size
        pixels = torch.randn(1, vision.num_channels, side, side, generator=generator)
        count = int((side // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)
        tokens[2 : 2 + count] = config.image_token_index
    return [Row("long", "text", tokens, pixels), Row("short", "text", torch.arange(3, 9))]


@pytest.fixture(scope="module")
def as_is(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Tried]]:
    """config.json of a family's baby, and what both make of it."""

    @cache
    def get(family: str) -> tuple[dict[str, Any], Tried]:
        raw = json.loads(babies.make_model(family).config.to_json_string(use_diff=False))
        return raw, try_config(family, raw, tmp_path_factory.mktemp(family))

    return get


@pytest.mark.parametrize(("family", "key"), CASES)
def test_a_changed_key_is_computed_as_transformers_does_or_refused_or_in_no_forward_pass(
    family: str, key: str, as_is: Callable[[str], tuple[dict[str, Any], Tried]], tmp_path: Path
) -> None:
    raw, before = as_is(family)
    assert before.walked is not None
    assert before.whole is not None
    *_, owner, leaf = f"{family}.{key}".split(".")
    kind = {"text_config": "llama4_text", "vision_config": "llama4_vision_model"}.get(owner, raw["model_type"])
    use = KEYS[kind][leaf].use
    effects = set()
    for number, value in enumerate((EDITS[family] | ANYWHERE)[key]):
        after = try_config(family, edited(raw, key, value), tmp_path / str(number))
        if after.whole is None:
            effects.add("transformers fails")
        elif after.walked is None:
            assert leaf in after.refusal
            effects.add("refused")
        else:
            for ours, theirs in zip(after.walked, after.whole, strict=True):
                assert relative(ours, theirs) < 2e-5, value
            same = after.shapes == before.shapes and all(map(torch.equal, after.whole, before.whole))
            effects.add("none" if same else "changes")
    if use is Use.FOLLOWED:
        assert effects & {"changes", "transformers fails"}
        assert "refused" not in effects
    elif use is Use.FIXED:
        assert "refused" in effects
        assert "changes" not in effects
    else:
        assert effects == {"none"}


# GGUF: llama.cpp reads no config.json. What a file does not say must be what llama.cpp's code fixes.

# Keys that change nothing alone.
WITH_OTHERS = {"sliding_window", "head_dim"}


def gguf_says(raw: dict[str, Any]) -> object:
    """All that a GGUF file of this model would hold besides weights; or why there is none."""
    try:
        adapter = adapter_of(Path("config.json"), raw).text_only()
    except InputError as error:
        return str(error)
    if refusals := gguf.refusals(adapter):
        return refusals
    factors = gguf.rope_factors(adapter)
    return (
        gguf.settings(adapter),
        None if factors is None else factors.tolist(),
        [(tensor.name, tensor.shape) for tensor in gguf.layout(adapter)],
    )


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_a_gguf_file_says_every_key_that_it_is_computed_with_or_there_is_none(family: str) -> None:
    config = babies.make_model(family).config
    raw = json.loads(config.to_json_string(use_diff=False))
    if family == "scout":  # as llama.cpp fixes them
        raw["text_config"].update(floor_scale=8192, attention_chunk_size=8192, max_position_embeddings=100_000)
    else:
        raw["mlp_only_layers"] = []
    before = gguf_says(raw)
    assert isinstance(before, tuple), before
    silent = []
    for path, values in EDITS[family].items():
        *_, owner, key = f"{family}.{path}".split(".")
        kind = {"text_config": "llama4_text"}.get(owner, raw["model_type"])
        if owner == "vision_config" or KEYS[kind][key].use is not Use.FOLLOWED:
            continue
        for value in values:
            after = edited(raw, path, value)
            if after != raw and gguf_says(after) == before and not (key in WITH_OTHERS and not isinstance(value, dict)):
                silent.append((path, value))
    assert silent == []


def test_qwen3_with_llama_3s_rope_scaling_is_not_written_to_gguf() -> None:
    """llama.cpp's qwen3moe reads no rope factors."""
    raw = json.loads(babies.qwen3_config(2).to_json_string(use_diff=False)) | {"mlp_only_layers": []}
    raw["rope_parameters"] = babies.llama4_config().text_config.rope_parameters
    said = gguf_says(raw)
    assert isinstance(said, list)
    assert "llama3" in said[0]
