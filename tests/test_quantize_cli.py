"""`quantize` and `verify` by the command line: what they print, emit and prove, and the recipe's limits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

from command_line import PROMISED, Refuse, one_line, strict
from onecard.blocks import quantize as stages
from onecard.quantize.site import SiteResult

# --- quantize and verify


def test_quantize_says_one_line_to_scripts_and_a_card_to_people(emitted: Callable[..., tuple[Path, Result]]) -> None:
    out, result = emitted("scout")
    line = one_line(result)
    assert line.keys() >= PROMISED
    assert line["out"] == str(out)
    assert 0 < line["kl_mean_nats"] <= line["kl_p99_nats"]
    assert line["kl_low_nats"] <= line["kl_mean_nats"] <= line["kl_high_nats"]
    assert 0 <= line["same_top1"] <= 1
    assert line["tokens"] == 6 * 23  # six rows of 24 tokens: the first of each is not predicted
    assert line["seconds"] > 0
    assert line["peak_rss_bytes"] > 50e6
    for word in ("KL(bf16", "95 %", "same top-1", "bits per weight", "slowest stage", "RAM peak", str(line["tokens"])):
        assert word in result.stderr
    assert not out.with_name("scout.work").exists()


def test_what_is_emitted(emitted: Callable[..., tuple[Path, Result]], baby: Callable[..., Path]) -> None:
    """Side files are copied unchanged, no half-written file is left, and the record is strict JSON."""
    out, result = emitted("scout")
    source = baby("scout")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    carried = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert names == shards | carried | {"model.safetensors.index.json", "onecard.json", "SHA256SUMS"}
    record, line = strict((out / "onecard.json").read_text()), one_line(result)
    assert record["schema_version"] == 2
    assert record["kl"]["kl_mean_nats"] == line["kl_mean_nats"]
    assert record["plan"]["emitted_bytes"] == line["emitted_bytes"]
    assert [len(block["expert_rows"]) for block in record["blocks"]] == [8, 8]
    # Every row of every calibration token goes to one expert of each layer (top-1).
    assert {sum(block["expert_rows"]) for block in record["blocks"]} == {record["texts"]["calibration"]["tokens"]}
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    block = config.pop("quantization_config")
    assert config == before
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "pack-quantized")
    assert (block["quantization_status"], next(iter(block["config_groups"].values()))["targets"]) == (
        "compressed",
        ["Linear"],
    )


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_verify_proves_what_quantize_said(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    family: str,
) -> None:
    """The same rows through the reloaded files give the same figures."""
    out, made = emitted(family)
    said = one_line(made)
    line = one_line(onecard("verify", baby(family), out, "--recipe", recipe(), *texts[2:]))
    assert line.keys() >= PROMISED
    assert line["out"] == str(out)
    for key in ("emitted_bytes", "bits_per_weight", "tokens", "same_top1"):
        assert line[key] == said[key]
    for key in ("kl_mean_nats", "kl_p99_nats", "kl_low_nats", "kl_high_nats"):
        assert line[key] == pytest.approx(said[key], rel=1e-6)


def test_verify_of_a_model_against_itself(
    baby: Callable[..., Path], onecard: Callable[..., Result], texts: list[str]
) -> None:
    line = one_line(onecard("verify", baby("scout"), baby("scout"), *texts[2:]))
    assert (line["kl_mean_nats"], line["kl_p99_nats"], line["same_top1"]) == (0, 0, 1)


def test_verify_sees_two_swapped_experts(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """verify measures the files: exchanging two experts' codes makes its figure far worse."""
    out, made = emitted("scout")
    spoilt = Path(shutil.copytree(out, tmp_path / "spoilt"))
    stem = "language_model.model.layers.0.feed_forward.experts."
    record = json.loads((out / "onecard.json").read_text())
    rows = record["blocks"][0]["expert_rows"]
    a, b = sorted(range(8), key=rows.__getitem__)[-2:]
    for path in spoilt.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.startswith(f"{stem}{a}.")]:
            other = name.replace(f"{stem}{a}.", f"{stem}{b}.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
    line = one_line(onecard("verify", baby("scout"), spoilt, *texts[2:]))
    assert line["kl_mean_nats"] > 5 * one_line(made)["kl_mean_nats"]


def test_one_document_has_no_interval_and_still_is_json(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """One document has no interval: the line and the record say null, not NaN."""
    arguments = ["--evaluation", jsonl("one.jsonl", [{"text": "the only one that there is"}])]
    line = one_line(onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe(method="rtn"), *arguments))
    assert line["kl_mean_nats"] > 0
    assert line["kl_high_nats"] is None
    strict((tmp_path / "out" / "onecard.json").read_text())


def test_verify_wants_nothing_of_the_recipe_but_its_texts(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
) -> None:
    """Without --recipe the texts are read to the default length, which here is whole documents."""
    line = one_line(onecard("verify", baby("qwen3"), emitted("qwen3")[0], *texts[2:]))
    assert line["tokens"] > 6 * 23


# --- limits of the recipe


def test_too_few_rows_for_an_expert(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Refuse,
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Exit code 1; the message names the block and every starved expert; the work is kept."""
    use = recipe(fail_below_expert_rows=1_000_000)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, *texts)
    refused(result, "block 0", *(f"expert {e}" for e in range(8)), "1000000", "calibration", code=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "state.json").exists()


def test_a_warning_of_few_rows_is_in_the_record(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    use = recipe(warn_below_expert_rows=1_000_000)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, *texts)
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    assert any("8 of 8 experts got fewer than 1000000" in warning for warning in record["warnings"])
    assert "8 of 8 experts" in result.stderr
    assert record["fallbacks"]["experts_starved"] == 8


@pytest.mark.parametrize("allowed", [0, 1000])
def test_fallbacks_are_counted_and_limited(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Refuse,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
) -> None:
    """Invariant 8: every fallback is counted, and past the recipe's limit the run fails."""
    real, called = stages.quantize_batch, [0]

    def falling(*args: Any, **kwargs: Any) -> SiteResult:
        result = real(*args, **kwargs)
        called[0] += 1
        return replace(result, diagonal_fallbacks=3)

    monkeypatch.setattr(stages, "quantize_batch", falling)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe(max_fallbacks=allowed), *texts)
    if allowed == 0:
        refused(result, f"{3 * called[0]} matrices", "allows 0", code=1)
        assert not (tmp_path / "out").exists()
    else:
        assert result.exit_code == 0
        record = json.loads((tmp_path / "out" / "onecard.json").read_text())
        assert record["fallbacks"]["diagonal_fallbacks"] == 3 * called[0] > 0
