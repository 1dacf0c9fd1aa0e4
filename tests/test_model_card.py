"""`onecard card`: valid metadata, the record's own figures, and a recipe that can be used again.

Cards describe emitted babies. Where a figure or a word matters, the record is changed and SHA256SUMS is made anew."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from onecard.checkpoint.emit import clear_checkpoint
from onecard.checkpoint.source import open_folder
from onecard.recipe import load_recipe
from onecard.report.card_tables import code, words
from onecard.report.engines import engines
from onecard.report.model_card import card_problems
from onecard.report.model_card_words import FAILED_GATE
from papers import CARD_ARGUMENTS, draw_card, edit_record, record_of

SHARE = {"share": 0.25, "low": 0.2, "high": 0.3, "count": 5}
SUMMARY = {
    "task": "quiz|<b>",
    "items": 20,
    "digest": "abc123",
    "shots": 5,
    "accuracy_reference": SHARE,
    "accuracy_quantized": SHARE,
    "changed": SHARE,
    "right_to_wrong": SHARE,
    "wrong_to_right": SHARE,
    "mcnemar_p": 0.0625,
}

# --- metadata


@pytest.mark.parametrize(
    ("family", "task"), [("scout", "image-text-to-text"), ("qwen3", "text-generation")], ids=["scout", "qwen3"]
)
def test_metadata_are_the_hubs(
    emitted: Callable[..., tuple[Path, Result]],
    tmp_path: Path,
    family: str,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """huggingface_hub's own class reads the metadata, and the network is not used."""

    def connect(*_: object) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    text = draw_card(Path(shutil.copytree(emitted(family)[0], tmp_path / "model")))
    assert ModelCard(text).data.to_dict() == {
        "base_model": "somebody/baby",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": task,
        "tags": ["quantized", "int4", "4-bit", "compressed-tensors", "moe", "onecard"],
    }
    assert card_problems(text) == []


def test_what_is_not_known_is_told(folder: Path, onecard: Callable[..., Result]) -> None:
    """A card without base model is still a card; publishing wants more."""
    result = onecard("card", folder)
    assert result.exit_code == 0
    lacking = json.loads(result.stdout)["lacking"]
    assert len(lacking) == 2
    for problem in lacking:
        assert problem in result.stderr
    assert "base_model" not in ModelCard((folder / "README.md").read_text()).data.to_dict()


@pytest.mark.parametrize("text", ["no front matter", "---\n- a\n- list\n---\n", "---\na: [\n---\n"])
def test_cards_without_metadata(text: str) -> None:
    assert card_problems(text) != []


def test_a_folder_called_demo_is_not_the_embedded_model(
    folder: Path, onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify demo` means the embedded model; a card is of a folder."""
    folder.rename(folder.with_name("demo"))
    monkeypatch.chdir(folder.parent)
    result = onecard("card", "demo", *CARD_ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert re.search(r"\| routed experts \| [\d,]+ \| int4", Path("demo/README.md").read_text())


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"checkpoint": [1]}', '{"schema_version": 2, "checkpoint": [1]}', '{"schema_version": 9}'],
)
def test_later_records_that_are_none(
    folder: Path, onecard: Callable[..., Result], tmp_path: Path, content: str
) -> None:
    later = tmp_path / "later.json"
    later.write_text(content)
    result = onecard("card", folder, *CARD_ARGUMENTS, "--record", later)
    assert result.exit_code == 2, repr(result.exception)
    assert str(later) in result.stderr
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(("part", "value"), [("kl", [1]), ("model", [1]), ("recipe", {}), ("texts", {}), ("plan", {})])
def test_a_record_that_lacks_what_a_card_needs(
    folder: Path, onecard: Callable[..., Result], part: str, value: object
) -> None:
    edit_record(folder, lambda record: record.update({part: value}))
    result = onecard("card", folder, *CARD_ARGUMENTS)
    assert result.exit_code == 2, repr(result.exception)
    assert not (folder / "README.md").exists()


# --- figures


def test_the_figures_are_the_records(folder: Path) -> None:
    text, record = draw_card(folder), record_of(folder)
    kl = record["kl"]
    for value in (kl["kl_mean_nats"], kl["kl_low_nats"], kl["kl_high_nats"], kl["kl_p99_nats"]):
        assert f"{value:.4g}" in text
    assert f"{kl['same_top1']:.2%}" in text
    assert record["texts"]["evaluation"]["rows_digest"] in text
    assert record["model"]["digest"] in text
    assert f"torch | `{record['versions']['torch']}`" in text
    assert "| routed experts |" in text
    assert "int4 group 32" in text
    assert "Flips of answers to multiple-choice questions were not measured." in text


def test_flips_and_gate_of_the_record(folder: Path) -> None:
    edit_record(folder, lambda record: record.update(flips={"all": SUMMARY, "tasks": [SUMMARY]}, gate={"passed": True}))
    text = draw_card(folder)
    assert "| quiz\\|&lt;b&gt;, 5-shot | 20 | 25.00% (20.00% to 30.00%) |" in text
    assert "0.0625 |" in text
    assert "`abc123`" in text
    assert FAILED_GATE not in text
    assert "pass the gate" in text
    checks = [
        {"name": "bytes", "said": "all well", "passed": True},
        {"name": "p99", "said": "0.2 > 0.1", "passed": False},
    ]
    edit_record(folder, lambda record: record.update(gate={"passed": False, "checks": checks}))
    text = draw_card(folder)
    assert f"**{FAILED_GATE}**\n\n- p99: 0.2 &gt; 0.1\n" in text
    assert "all well" not in text


def test_a_record_of_the_first_schema(folder: Path) -> None:
    """It lacks most later measurements; the card shows those that it has."""
    kept = ("tokens", "documents", "kl_mean_nats", "kl_low_nats", "kl_high_nats", "kl_p99_nats", "same_top1")

    def older(record: Any) -> None:
        record["schema_version"] = 1
        record["kl"] = {key: record["kl"][key] for key in kept}
        for key in ("errors", "flips", "gate", "checkpoint"):
            record.pop(key, None)
        for key in ("hub", "card"):
            record["model"].pop(key)

    edit_record(folder, older)
    assert f"{record_of(folder)['kl']['kl_mean_nats']:.4g}" in draw_card(folder)


def test_no_interval_is_no_number(folder: Path) -> None:
    edit_record(folder, lambda record: record["kl"].update(kl_low_nats=None, kl_high_nats=None))
    row = next(line for line in draw_card(folder).splitlines() if line.startswith("| mean KL"))
    assert row.endswith("|  |")


def test_the_recipe_in_the_card_is_the_recipe(folder: Path, tmp_path: Path) -> None:
    """The printed recipe can be given to --recipe and has the run's digest."""
    block = re.search(r"^```yaml\n(.*?)^```$", draw_card(folder), re.DOTALL | re.MULTILINE)
    assert block is not None
    (tmp_path / "again.yaml").write_text(block[1])
    assert load_recipe(str(tmp_path / "again.yaml")).digest == record_of(folder)["recipe"]["digest"]


def test_figures_that_were_measured_later(
    folder: Path,
    tmp_path: Path,
    onecard: Callable[..., Result],
    refused: Callable[..., str],
) -> None:
    """The card accepts a record of flips of these files, and refuses one of other files or of another original."""
    record = record_of(folder)
    later = {
        "command": "flips",
        "onecard": "0",
        "schema_version": 2,
        "model": record["model"],
        "checkpoint": {"digest": open_folder(folder).digest},
        "flips": {"all": SUMMARY, "tasks": [SUMMARY]},
    }
    (tmp_path / "later.json").write_text(json.dumps(later))
    assert "0.0625 |" in draw_card(folder, *CARD_ARGUMENTS, "--record", tmp_path / "later.json")
    other_files, other_original = tmp_path / "files.json", tmp_path / "original.json"
    other_files.write_text(json.dumps(later | {"checkpoint": {"digest": "0"}}))
    other_original.write_text(json.dumps(later | {"model": record["model"] | {"digest": "0"}}))
    result = onecard("card", folder, "--record", other_files, "--record", other_original)
    refused(result, f"{other_files} is of other files", f"{other_original} is of another original")
    (tmp_path / "later.json").write_text(json.dumps(later | {"schema_version": 99}))
    refused(onecard("card", folder, "--record", tmp_path / "later.json"), "schema version 99")


# --- words of others


HOSTILE = "a ``` b\n---\n<script>alert(1)</script> | [x](javascript:1) {{ 7*7 }} {% raw %}"


def test_words_of_others_are_only_words(folder: Path) -> None:
    def hostile(record: Any) -> None:
        record["recipe"]["description"] = record["recipe"]["name"] = record["model"]["name"] = HOSTILE
        record["warnings"] = [HOSTILE]
        record["versions"]["torch"] = HOSTILE

    edit_record(folder, hostile)
    text = draw_card(folder)
    # The recipe's fence is longer than any fence inside it; outside it nothing is markup.
    fence = re.search(r"^(`{4,})yaml\n.*?^\1$", text, re.DOTALL | re.MULTILINE)
    assert fence is not None
    outside = re.sub(r"`[^`\n]*`", "", text.replace(fence[0], ""))
    assert "<script>" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    assert "{{ 7*7 }}" in text.replace("\\", "")
    assert card_problems(text) == []


def test_a_card_takes_every_string_of_a_record(folder: Path) -> None:
    """A file's name may have half a character."""

    def half(record: Any) -> None:
        record["warnings"] = ["texts read a.jsonl; passed over test-\udcff.jsonl"]
        record["recipe"]["description"] = record["texts"]["evaluation"]["sources"][0]["source"] = "a\udcffb"

    edit_record(folder, half)
    assert "\\udcff" in draw_card(folder)


@given(st.text(max_size=40))
def test_escaped_words_hold_no_markup(text: str) -> None:
    shown = words(text)
    assert not re.search(r"[\n\r<>]", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|#~]", shown)
    assert not re.search(r"[`\n\r]", code(text)[1:-1])


def test_paths_of_the_makers_machine_are_not_told(folder: Path) -> None:
    def at_home(record: Any) -> None:
        record["model"]["name"] = "/home/secret/scout"
        record["texts"]["evaluation"]["sources"][0]["source"] = "/home/secret/chats.jsonl"

    edit_record(folder, at_home)
    text = draw_card(folder, "--license", "mit")
    assert "secret" not in text
    assert "chats.jsonl" in text


# --- files


def test_a_card_of_somebody_else_is_not_replaced(
    folder: Path, onecard: Callable[..., Result], refused: Callable[..., str], tmp_path: Path
) -> None:
    (folder / "README.md").write_text("# mine")
    refused(onecard("card", folder), "was not drawn by onecard", "--overwrite")
    assert (folder / "README.md").read_text() == "# mine"
    assert onecard("card", folder, "-o", tmp_path / "card.md").exit_code == 0
    assert (tmp_path / "card.md").read_text().startswith("---\n")
    assert onecard("card", folder, "--overwrite").exit_code == 0
    assert onecard("card", folder).exit_code == 0  # its own it may replace
    refused(onecard("card", folder, "-o", tmp_path / "no" / "card.md"), "folder that exists")


def test_overwriting_a_run_takes_its_card_away(folder: Path) -> None:
    draw_card(folder)
    clear_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == []


def test_overwriting_a_run_leaves_a_card_of_ones_own(folder: Path) -> None:
    (folder / "README.md").write_text("# mine")
    clear_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == ["README.md"]


# --- what runs it


def test_int4_attention_of_llama4_needs_a_newer_vllm() -> None:
    few, kept = {"attention": {"widths": {"int4 group 128": 1}}}, {"attention": {"widths": {"BF16": 1}}}
    assert "35033" in str(engines("llama4", few, True, {}))
    assert "35033" not in str(engines("llama4", kept, True, {}))
    assert "35033" not in str(engines("qwen3_moe", few, True, {}))
    assert [engine for engine, _, _ in engines("llama4", kept, False, {})] == ["vLLM"]
