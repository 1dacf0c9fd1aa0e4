"""Each side of a verification is called as its own config.json says, and whatever differs besides the weights is said.

The judge of KL is transformers: both whole models, each loaded from its own folder.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import gguf_files
from babies import edit_json
from documents import ITEMS, draw_picture, picture
from inputs import write_jsonl, write_recipe
from onecard import stages
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.gguf.tokenizer import describe
from onecard.checkpoint.model import open_model
from onecard.eval import sides
from onecard.eval.sides import compare_sides
from onecard.models.families import load_adapter
from walking import whole_logits

LENGTH = 24  # tokens of an evaluation row in RECIPE
WAVES = {"rope_type": "default", "rope_theta": 100.0}
# (family, path of a key, its new value): what the walk computes with besides weights, one of a kind.
CHANGES = [
    ("scout", "text_config.rope_parameters", WAVES),
    ("scout", "text_config.attention_chunk_size", 3),
    ("scout", "text_config.no_rope_layers", [0, 1]),
    ("qwen3", "rms_norm_eps", 0.1),
    ("qwen3", "num_experts_per_tok", 3),  # a route is then a set of another size
    ("deepseek", "routed_scaling_factor", 1.0),
    ("mixtral", "sliding_window", 3),
]


def said(result: Result) -> str:
    """What people read, in one line without the card's frame."""
    return " ".join(result.stderr.replace("│", " ").split())


def edit_config(folder: Path, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")

    def change(config: Any) -> None:
        for parent in parents:
            config = config[parent]
        config[leaf] = value

    edit_json(folder / "config.json", change)


def whole_kl(source: Path, checkpoint: Path, texts: Path) -> float:
    """Mean KL over the evaluation rows, by transformers' whole models."""
    encoder = Encoder(source, load_adapter(source))
    kind = AutoModelForImageTextToText if encoder.adapter.has_vision else AutoModelForCausalLM
    ours, theirs = (kind.from_pretrained(str(f), dtype=torch.float32).eval() for f in (source, checkpoint))
    found = []
    for row in map(encoder.encode, read_jsonl(texts)):
        row = type(row)(row.document, row.kind, row.tokens[:LENGTH])
        p, q = (whole_logits(model, row)[:-1].double().log_softmax(-1) for model in (ours, theirs))
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(("family", "key", "value"), CHANGES)
def test_the_checkpoint_is_computed_by_its_own_config_and_the_field_is_said(
    family: str,
    key: str,
    value: Any,
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model, recipe = copied(family), write_recipe(tmp_path / "recipe.yaml", compute_dtype="float32")
    edit_config(model, key, value)
    result = onecard("verify", baby(family), model, "--recipe", recipe, *texts[2:], "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    wanted = whole_kl(baby(family), model, Path(texts[3]))
    assert wanted > 1e-4
    assert record["kl"]["kl_mean_nats"] == pytest.approx(wanted, rel=1e-3)
    fields = [entry["field"] for entry in record["checkpoint"]["config_differences"]]
    assert fields
    assert all(field.startswith(key) for field in fields)
    assert all(f"config.json: {field} is" in said(result) for field in fields)


def test_equal_configs_have_no_differences_and_equal_tokenizers_none(
    baby: Callable[..., Path], emitted: Callable[..., tuple[Path, Result]]
) -> None:
    record = json.loads((emitted("scout")[0] / "onecard.json").read_text())
    assert record["checkpoint"]["config_differences"] == []
    assert record["checkpoint"]["texts_encoded_otherwise"] == 0
    assert record["model"]["config"]["text_config.attention_chunk_size"] == 8


def test_a_runs_own_verification_reads_the_config_that_it_writes(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The verification of a run that writes a wrong config.json must find it."""
    right = stages.config_of_run
    monkeypatch.setattr(stages, "config_of_run", lambda *given: right(*given) | {"rms_norm_eps": 0.1})
    recipe = write_recipe(tmp_path / "recipe.yaml", method="rtn")
    assert onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe, *texts).exit_code == 0
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    assert [entry["field"] for entry in record["checkpoint"]["config_differences"]] == ["rms_norm_eps"]
    assert any("rms_norm_eps is 0.1" in warning for warning in record["warnings"])


def test_check_names_the_field_of_a_changed_config(folder: Path, onecard: Callable[..., Result]) -> None:
    edit_config(folder, "text_config.attn_scale", 0.5)
    result = onecard("check", folder)
    assert result.exit_code == 1
    assert "text_config.attn_scale is 0.5, and the original has 0.1" in said(result)
    assert any("attn_scale" in problem for problem in json.loads(result.stdout)["problems"])


def test_an_engines_own_field_is_said_and_changes_no_figure(
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model = copied("qwen3")
    edit_json(model / "config.json", lambda c: c.update(dtype="float16", mystery=3, use_cache=False))
    result = onecard("verify", baby("qwen3"), model, *texts[2:], "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert {e["field"]: e["use"] for e in record["checkpoint"]["config_differences"]} == {
        "dtype": "engines",
        "mystery": "engines",
    }
    assert record["kl"]["kl_max_nats"] == 0


# Token ids and pixels


def another_template(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|user|>") + "!")


def another_vocabulary(model: Path) -> None:
    def swap(tokenizer: Any) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["c"] = vocab["c"], vocab["a"]

    edit_json(model / "tokenizer.json", swap)


def no_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


@pytest.mark.parametrize(
    ("change", "texts_changed", "needle"),
    [
        (another_template, 2, "encodes 2 texts otherwise"),  # the conversations among six texts
        (another_vocabulary, 6, "encodes 6 texts otherwise"),
        (no_tokenizer, None, "has no tokenizer"),
    ],
)
def test_texts_that_a_checkpoint_encodes_otherwise_are_said(
    change: Callable[[Path], None],
    texts_changed: int | None,
    needle: str,
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    model = copied("qwen3")
    change(model)
    result = onecard("verify", baby("qwen3"), model, *texts[2:], "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["checkpoint"].get("texts_encoded_otherwise") == texts_changed
    assert any(needle in warning for warning in record["warnings"])
    assert needle in said(result)


@pytest.fixture
def picture_texts(tmp_path: Path) -> Path:
    draw_picture(tmp_path / "red.png")
    content = [picture("red.png"), {"type": "text", "text": "abc"}]
    return write_jsonl(tmp_path / "seen.jsonl", [{"messages": [{"role": "user", "content": content}]}])


OTHER_COLOURS = {"image_mean": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", OTHER_COLOURS),
        ("processor_config.json", {"image_processor": OTHER_COLOURS}),  # as transformers 5 saves it
        ("preprocessor_config.json", {"do_normalize": False}),
    ],
)
def test_pictures_that_a_checkpoint_reads_otherwise_are_said(
    name: str,
    content: dict[str, Any],
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    picture_texts: Path,
    tmp_path: Path,
) -> None:
    model = copied("scout")
    (model / name).write_text(json.dumps(content))
    options = ["--evaluation", picture_texts, "--record", tmp_path / "r.json"]
    assert onecard("verify", baby("scout"), model, *options).exit_code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["checkpoint"]["texts_encoded_otherwise"] == 1
    assert any("in its pixels" in warning for warning in record["warnings"])


def test_the_settings_of_processor_config_come_first(copied: Callable[..., Path]) -> None:
    """As in transformers (image_processing_base.py, get_image_processor_dict); its own class needs torchvision."""
    model = copied("scout")
    (model / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9, 0.9, 0.9]}))
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "rescale_factor": 0.01}
    (model / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    draw_picture(model / "red.png")  # 255, 0, 0
    pixels = Encoder(model, load_adapter(model))._pixels(model / "red.png")
    assert pixels.shape == (3, 16, 16)
    wanted = [(2.55 - 0.1) / 0.5, -0.2 / 0.4, -0.3 / 0.3]
    assert pixels.flatten(1).mean(1).tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "content", [{"image_mean": "abc"}, {"image_mean": [0.5]}, {"rescale_factor": "x"}, {"resample": 77}, ["x"]]
)
def test_settings_of_pictures_that_are_none_are_refused(
    content: object,
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    picture_texts: Path,
) -> None:
    model = copied("scout")
    (model / "preprocessor_config.json").write_text(json.dumps(content))
    refused(onecard("verify", model, model, "--evaluation", picture_texts), "preprocessor_config.json is damaged")


def test_a_picture_that_does_not_fit_is_left_out_with_a_word(
    baby: Callable[..., Path], onecard: Callable[..., Result], picture_texts: Path, tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "two.jsonl", [*picture_texts.read_text().splitlines(), {"text": "abcabcabc"}])
    recipe = write_recipe(tmp_path / "short.yaml", evaluation_row_tokens=6)
    result = onecard("verify", baby("scout"), baby("scout"), "--evaluation", texts, "--recipe", recipe)
    assert result.exit_code == 0, result.stderr
    assert "1 evaluation text of fewer than two tokens, or whose pictures" in said(result)


def test_another_token_for_pictures_is_refused(
    copied: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    picture_texts: Path,
) -> None:
    model = copied("scout")
    edit_config(model, "image_token_index", 249)
    refused(onecard("verify", baby("scout"), model, "--evaluation", picture_texts), "image_token_index", 249)


def test_items_that_a_checkpoint_words_otherwise_are_said(
    copied: Callable[..., Path], baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path
) -> None:
    model = copied("qwen3")
    another_template(model)
    items = write_jsonl(tmp_path / "items.jsonl", ITEMS[:3])
    result = onecard("flips", baby("qwen3"), model, "--tasks", items, "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["checkpoint"]["texts_encoded_otherwise"] == 12
    assert any("12 options of the task items" in warning for warning in record["warnings"])


def test_a_gguf_file_with_another_vocabulary_or_template_is_said(tmp_path: Path) -> None:
    """llama.cpp reads the file's own tokenizer, not the one beside it."""
    model = gguf_files.make(tmp_path / "model", "qwen3")
    checkpoint = gguf_files.quantize(model, tmp_path / "int4")
    source = open_model(str(model))
    encoder = Encoder(source.path, source.adapter)
    sound, _ = gguf_files.export(checkpoint, tmp_path / "sound")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, sound)
    assert compare_sides(source, open_model(str(sound)), encoder, (), ()).warnings == []
    another_vocabulary(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    spoilt, _ = gguf_files.export(checkpoint, tmp_path / "spoilt")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, spoilt)
    told = compare_sides(source, open_model(str(spoilt)), encoder, (), ()).warnings
    assert any("tokenizer.ggml.tokens of the GGUF file has 'c'" in line and "gives 'a'" in line for line in told)
    assert any("tokenizer.chat_template of the GGUF file is '{{ messages }}'" in line for line in told)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("ggml.merges", lambda merges: merges[1:]),
        ("ggml.pre", lambda _: "gpt-2"),
        ("ggml.add_bos_token", lambda _: False),
        ("ggml.eos_token_id", lambda number: number + 1),
        ("chat_template", None),
    ],
)
def test_every_part_of_a_gguf_tokenizer_is_compared(
    key: str, change: Callable[[Any], Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(gguf_files.make(tmp_path / "model", "qwen3")))
    stored = describe(model.path, model.adapter.vocab_size, []).metadata
    assert key in stored
    stored = {k: v for k, v in stored.items() if k != key} | ({} if change is None else {key: change(stored[key])})
    monkeypatch.setattr(sides, "stored_tokenizer", lambda _: stored)
    monkeypatch.setattr(sides, "stops_at", lambda _: [])
    (line,) = compare_sides(model, model, Encoder(model.path, model.adapter), (), ()).warnings
    assert f"tokenizer.{key} of the GGUF file" in line


def test_an_export_of_a_folder_whose_config_was_changed_says_so(
    folder: Path, onecard: Callable[..., Result], tmp_path: Path
) -> None:
    edit_config(folder, "text_config.attn_scale", 0.5)
    result = onecard("export", folder, "--format", "bf16", "-o", tmp_path / "bf16")
    assert result.exit_code == 0, result.stderr
    assert "text_config.attn_scale is 0.5, and the original has 0.1" in said(result)


def test_a_vocabulary_past_the_embedding_is_named_with_its_sizes(
    copied: Callable[..., Path], baby: Callable[..., Path], onecard: Callable[..., Result], texts: list[str]
) -> None:
    model = copied("qwen3")
    edit_json(model / "tokenizer.json", lambda t: t["model"]["vocab"].update(zz=300))
    result = onecard("verify", baby("qwen3"), model, *texts[2:])
    assert result.exit_code == 0, result.stderr
    assert "ids up to 300" in said(result)
