"""One true end-to-end run: the embedded model through the real command line, judged by transformers.

The record's figures come from our own walk over the emitted files. Here transformers loads both whole models, and the
figures are computed again from whole logits in fp64.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText

from onecard.calibration.packing import document_rows
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.cli import main
from onecard.core.rows import Row
from onecard.models.known import demo_folder
from onecard.recipe import load_recipe

DATA = demo_folder() / "data"


def quantize(out: Path, recipe: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["quantize", "demo", str(out), "--recipe", recipe, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("demo")
    return {recipe: (folder / recipe, quantize(folder / recipe, recipe)) for recipe in ("demo", "rtn-int4")}


def evaluation_rows() -> list[Row]:
    model, recipe = open_model("demo"), load_recipe("demo")
    encoder = Encoder(model.path, model.adapter)
    encoded = [encoder.encode(document) for document in read_jsonl(DATA / "evaluation.jsonl")]
    return document_rows(encoded, recipe.texts.evaluation_row_tokens, recipe.texts.evaluation_rows)


def whole_logits(model: Any, row: Row) -> torch.Tensor:
    inputs = {"input_ids": row.tokens[None]}
    if row.pixels is not None:
        inputs["pixel_values"] = row.pixels
    with torch.inference_mode():
        return model(**inputs).logits[0, :-1].double()


def test_gptq_leaves_at_most_half_of_round_to_nearest(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """The demo recipe beats round-to-nearest with the same scheme, bytes and evaluation rows."""
    gptq, rtn = runs["demo"][1], runs["rtn-int4"][1]
    assert gptq["emitted_bytes"] == rtn["emitted_bytes"]
    assert gptq["tokens"] == rtn["tokens"]
    assert gptq["kl_mean_nats"] <= 0.5 * rtn["kl_mean_nats"], (gptq["kl_mean_nats"], rtn["kl_mean_nats"])


def test_the_record_agrees_with_transformers(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, _ = runs["demo"]
    record = json.loads((out / "onecard.json").read_text())
    reference = AutoModelForImageTextToText.from_pretrained(str(demo_folder() / "model"), dtype=torch.float32).eval()
    quantized = load_with_transformers(out, torch.float32)
    placeholder = reference.config.image_token_index
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("kl", "reverse", "same", "nll_p", "nll_q")}
    for row in evaluation_rows():
        wanted = row.tokens[1:] != placeholder
        target = row.tokens[1:][wanted][:, None]
        p = torch.log_softmax(whole_logits(reference, row)[wanted], -1)
        q = torch.log_softmax(whole_logits(quantized, row)[wanted], -1)
        found["kl"].append((p.exp() * (p - q)).sum(-1))
        found["reverse"].append((q.exp() * (q - p)).sum(-1))
        found["same"].append(p.argmax(-1) == q.argmax(-1))
        found["nll_p"].append(-p.gather(1, target)[:, 0])
        found["nll_q"].append(-q.gather(1, target)[:, 0])
    value = {name: torch.cat(parts).double() for name, parts in found.items()}
    tokens = record["kl"]["tokens"]
    assert len(value["kl"]) == tokens
    for key, expected in (
        ("kl_mean_nats", value["kl"].mean()),
        ("kl_p99_nats", torch.quantile(value["kl"], 0.99)),
        ("kl_max_nats", value["kl"].max()),
        ("reverse_kl_mean_nats", value["reverse"].mean()),
        ("perplexity_reference", value["nll_p"].mean().exp()),
        ("perplexity_quantized", value["nll_q"].mean().exp()),
        ("perplexity_ratio", (value["nll_q"].mean() - value["nll_p"].mean()).exp()),
    ):
        assert record["kl"][key] == pytest.approx(float(expected), rel=1e-4), key
    # A tie in fp32 may fall either way.
    assert record["kl"]["same_top1"] * tokens == pytest.approx(float(value["same"].sum()), abs=1)


def test_the_embedded_questions_are_answered_as_the_demos_readme_says(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    """The model's README quotes the figure that transformers gave on the whole model when the model was made."""
    record = json.loads((runs["demo"][0] / "onecard.json").read_text())
    lines = (demo_folder() / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("| choice accuracy, 400 questions |")]
    (task,) = record["flips"]["tasks"]
    assert (task["task"], task["items"]) == ("demo", 400)
    assert f"{task['accuracy_reference']['share']:.1%}" in line


def test_verify_repeats_the_figure_from_the_files_alone(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, line = runs["demo"]
    result = CliRunner().invoke(main, ["verify", "demo", str(out), "--recipe", "demo", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["kl_mean_nats"] == line["kl_mean_nats"]
    assert again["emitted_bytes"] == line["emitted_bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))


def test_generate_answers_from_the_emitted_files(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, _ = runs["demo"]
    question = ["generate", str(out), "Which module defines the name dumps?", "--max-new-tokens", "8"]
    result = CliRunner().invoke(main, question)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    # The int4 model still sees the picture: the command of `make demo`.
    picture = demo_folder() / "data" / "images" / "caption-001.png"
    result = CliRunner().invoke(main, ["generate", str(out), "What do you see?", "--image", str(picture)])
    assert result.stdout.strip() == "the digit 2 in blue"
