"""`onecard card`: valid metadata, the record's own figures, a recipe that can be used again, and the licence's terms.

Cards are drawn of emitted babies; where a figure or a word matters, the record is changed and SHA256SUMS made anew.
"""

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
from onecard.checkpoint.provenance import front_matter, hub_origin, source_card
from onecard.checkpoint.source import open_folder
from onecard.recipe import load_recipe
from onecard.report.card_tables import code, words
from onecard.report.engines import engines
from onecard.report.licence import EU_RESTRICTION, NOTICE_LINE, Licence, has_notice, licence_of, unmet_terms
from onecard.report.model_card import card_problems
from onecard.report.model_card_words import FAILED_GATE
from papers import edit_record
from records import allocation_facts

SAID = ("--base-model", "somebody/baby", "--license", "apache-2.0")
META = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\nLlama 4 Version Effective Date: April 5, 2025\n"
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


@pytest.fixture
def folder(emitted: Callable[..., tuple[Path, Result]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(emitted("scout")[0], tmp_path / "baby-int4"))


@pytest.fixture
def drawn(onecard: Callable[..., Result]) -> Callable[..., str]:
    """The README that `card` writes into a folder."""

    def draw(folder: Path, *arguments: object) -> str:
        result = onecard("card", folder, *(arguments or SAID))
        assert result.exit_code == 0, result.output + repr(result.exception)
        return (folder / "README.md").read_text()

    return draw


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "onecard.json").read_text())
    return record


# --- metadata


@pytest.mark.parametrize(
    ("family", "task"), [("scout", "image-text-to-text"), ("qwen3", "text-generation")], ids=["scout", "qwen3"]
)
def test_metadata_are_the_hubs(
    emitted: Callable[..., tuple[Path, Result]],
    drawn: Callable[..., str],
    tmp_path: Path,
    family: str,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read by huggingface_hub's own class; nothing is asked of the network."""

    def connect(*_: object) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    text = drawn(Path(shutil.copytree(emitted(family)[0], tmp_path / "model")))
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
    result = onecard("card", "demo", *SAID)
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
    result = onecard("card", folder, *SAID, "--record", later)
    assert result.exit_code == 2, repr(result.exception)
    assert str(later) in result.stderr
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(("part", "value"), [("kl", [1]), ("model", [1]), ("recipe", {}), ("texts", {}), ("plan", {})])
def test_a_record_that_lacks_what_a_card_needs(
    folder: Path, onecard: Callable[..., Result], part: str, value: object
) -> None:
    edit_record(folder, lambda record: record.update({part: value}))
    result = onecard("card", folder, *SAID)
    assert result.exit_code == 2, repr(result.exception)
    assert not (folder / "README.md").exists()


# --- figures


def test_the_figures_are_the_records(folder: Path, drawn: Callable[..., str]) -> None:
    text, record = drawn(folder), record_of(folder)
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


def test_flips_and_gate_of_the_record(folder: Path, drawn: Callable[..., str]) -> None:
    edit_record(folder, lambda record: record.update(flips={"all": SUMMARY, "tasks": [SUMMARY]}, gate={"passed": True}))
    text = drawn(folder)
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
    text = drawn(folder)
    assert f"**{FAILED_GATE}**\n\n- p99: 0.2 &gt; 0.1\n" in text
    assert "all well" not in text


def test_a_record_of_the_first_schema(folder: Path, drawn: Callable[..., str]) -> None:
    """It lacks most of what was measured later; what it has is told."""
    kept = ("tokens", "documents", "kl_mean_nats", "kl_low_nats", "kl_high_nats", "kl_p99_nats", "same_top1")

    def older(record: Any) -> None:
        record["schema_version"] = 1
        record["kl"] = {key: record["kl"][key] for key in kept}
        for key in ("errors", "flips", "gate", "checkpoint"):
            record.pop(key, None)
        for key in ("hub", "card"):
            record["model"].pop(key)

    edit_record(folder, older)
    assert f"{record_of(folder)['kl']['kl_mean_nats']:.4g}" in drawn(folder)


def test_no_interval_is_no_number(folder: Path, drawn: Callable[..., str]) -> None:
    edit_record(folder, lambda record: record["kl"].update(kl_low_nats=None, kl_high_nats=None))
    row = next(line for line in drawn(folder).splitlines() if line.startswith("| mean KL"))
    assert row.endswith("|  |")


def test_the_recipe_in_the_card_is_the_recipe(folder: Path, drawn: Callable[..., str], tmp_path: Path) -> None:
    """What stands there can be given to --recipe, and has the digest of the run."""
    block = re.search(r"^```yaml\n(.*?)^```$", drawn(folder), re.DOTALL | re.MULTILINE)
    assert block is not None
    (tmp_path / "again.yaml").write_text(block[1])
    assert load_recipe(str(tmp_path / "again.yaml")).digest == record_of(folder)["recipe"]["digest"]


def test_figures_that_were_measured_later(
    folder: Path,
    drawn: Callable[..., str],
    tmp_path: Path,
    onecard: Callable[..., Result],
    refused: Callable[..., str],
) -> None:
    """A record of flips of these files is taken in; one of other files, or of another original, is refused."""
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
    assert "0.0625 |" in drawn(folder, *SAID, "--record", tmp_path / "later.json")
    other_files, other_original = tmp_path / "files.json", tmp_path / "original.json"
    other_files.write_text(json.dumps(later | {"checkpoint": {"digest": "0"}}))
    other_original.write_text(json.dumps(later | {"model": record["model"] | {"digest": "0"}}))
    result = onecard("card", folder, "--record", other_files, "--record", other_original)
    refused(result, f"{other_files} is of other files", f"{other_original} is of another original")
    (tmp_path / "later.json").write_text(json.dumps(later | {"schema_version": 99}))
    refused(onecard("card", folder, "--record", tmp_path / "later.json"), "schema version 99")


# --- words of others


HOSTILE = "a ``` b\n---\n<script>alert(1)</script> | [x](javascript:1) {{ 7*7 }} {% raw %}"


def test_words_of_others_are_only_words(folder: Path, drawn: Callable[..., str]) -> None:
    def hostile(record: Any) -> None:
        record["recipe"]["description"] = record["recipe"]["name"] = record["model"]["name"] = HOSTILE
        record["warnings"] = [HOSTILE]
        record["versions"]["torch"] = HOSTILE

    edit_record(folder, hostile)
    text = drawn(folder)
    # The recipe stands in a fence that is longer than any in it; outside nothing is markup.
    fence = re.search(r"^(`{4,})yaml\n.*?^\1$", text, re.DOTALL | re.MULTILINE)
    assert fence is not None
    outside = re.sub(r"`[^`\n]*`", "", text.replace(fence[0], ""))
    assert "<script>" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    assert "{{ 7*7 }}" in text.replace("\\", "")
    assert card_problems(text) == []


@given(st.text(max_size=40))
def test_escaped_words_hold_no_markup(text: str) -> None:
    shown = words(text)
    assert not re.search(r"[\n\r<>]", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|#~]", shown)
    assert not re.search(r"[`\n\r]", code(text)[1:-1])


def test_paths_of_the_makers_machine_are_not_told(folder: Path, drawn: Callable[..., str]) -> None:
    def at_home(record: Any) -> None:
        record["model"]["name"] = "/home/secret/scout"
        record["texts"]["evaluation"]["sources"][0]["source"] = "/home/secret/chats.jsonl"

    edit_record(folder, at_home)
    text = drawn(folder, "--license", "mit")
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


def test_overwriting_a_run_takes_its_card_away(folder: Path, drawn: Callable[..., str]) -> None:
    drawn(folder)
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


# --- licences


@pytest.mark.parametrize(
    ("arguments", "licence"),
    [
        ((None, None, {"license": "mit"}, {}, None), Licence("mit")),
        (("apache-2.0", None, {"license": "mit"}, {}, None), Licence("apache-2.0")),
        ((None, "psf-2.0", {}, {"LICENSE": "Python"}, None), Licence("other", "psf-2.0", "LICENSE")),
        ((None, None, {}, {"LICENCE.txt": "\n  Apache License\n  Version 2.0"}, None), Licence("apache-2.0")),
        ((None, None, {}, {"LICENSE": "MIT License\n\nCopyright"}, None), Licence("mit")),
        ((None, None, {}, {"LICENSE": "Ours alone"}, None), Licence("other", None, "LICENSE")),
        ((None, None, {}, {"LICENSE": META}, None), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {}, "meta-llama/Llama-4-Scout-17B-16E"), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {"LICENSE": "?"}, "meta-llama/Llama-4-Scout"), Licence("other", "llama4", "LICENSE")),
        (("llama4", None, {}, {}, None), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {}, "Qwen/Qwen3-30B-A3B"), None),
    ],
)
def test_which_licence_it_is(arguments: tuple[Any, ...], licence: Licence | None) -> None:
    assert licence_of(*arguments) == (licence, [])


def test_metas_licence_and_another_contradict() -> None:
    found, problems = licence_of("mit", None, {}, {"LICENSE": META}, None)
    assert found == Licence("mit")
    assert len(problems) == 1
    assert licence_of(None, None, {"license": "mit"}, {}, "meta-llama/Llama-4-Scout-17B-16E")[1] != []


def test_the_architecture_alone_is_not_metas_licence(folder: Path, drawn: Callable[..., str]) -> None:
    """The baby is a Llama 4 by its layout and nobody's by its licence."""
    assert record_of(folder)["model"]["family"] == "llama4"
    text = drawn(folder)
    assert "Built with Llama" not in text
    assert "European Union" not in text
    assert not (folder / "NOTICE").exists()


def test_a_card_of_llama_says_what_its_licence_wants(folder: Path, drawn: Callable[..., str]) -> None:
    """Of all the terms only the licence's own text is still to be put there, and the name to be chosen."""
    (folder / "NOTICE").write_text("Of somebody else.\n")
    text = drawn(folder, "--base-model", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama4", "LICENSE")
    notice = (folder / "NOTICE").read_text()
    assert notice == f"Of somebody else.\n{NOTICE_LINE}\n"
    assert unmet_terms("me/Llama-4-x", {"NOTICE": notice, "LICENSE": META}, text) == []
    assert len(unmet_terms("me/scout", {"NOTICE": notice}, text)) == 2
    assert EU_RESTRICTION in text
    again = drawn(folder, "--base-model", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert (folder / "NOTICE").read_text() == notice
    assert again == text


def test_a_notice_may_have_line_breaks() -> None:
    assert has_notice({"Notice.txt": NOTICE_LINE.replace("Copyright", "\nCopyright")})
    assert not has_notice({"NOTICE": NOTICE_LINE.replace("4", "3")})
    assert not has_notice({"LICENSE": NOTICE_LINE})


# --- where the original comes from


def test_the_originals_licence_and_id_are_carried(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    onecard: Callable[..., Result],
    drawn: Callable[..., str],
) -> None:
    """A source in the hub's cache, with a README: its id, revision, licence and languages are in record and card."""
    home = tmp_path / "models--somebody--Baby-MoE" / "snapshots" / ("a" * 40)
    shutil.copytree(baby("qwen3"), home)
    front = (
        "license: other\nlicense_name: free\nlicense_link: LICENSE\nlanguage: [en, de]\nextra_gated_prompt: |-\n  no"
    )
    (home / "README.md").write_text(f"---\n{front}\n---\n# Baby\n")
    out = tmp_path / "out"
    assert onecard("quantize", home, out, "--recipe", recipe(method="rtn"), *texts).exit_code == 0
    model = record_of(out)["model"]
    assert model["hub"] == {"id": "somebody/Baby-MoE", "revision": "a" * 40}
    assert model["card"].keys() == {"license", "license_name", "license_link", "language"}
    result = onecard("card", out)
    assert json.loads(result.stdout)["lacking"] == []
    data = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert data["base_model"] == "somebody/Baby-MoE"
    assert (data["license_name"], data["language"]) == ("free", ["en", "de"])
    assert "a" * 40 in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "# no", "---\nlicense: [1, {}]\n---", "---\n!!python/object:os.system\n---", "---\na"]
)
def test_front_matter_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert source_card(tmp_path) == {}
    assert not front_matter("no dashes")
    assert hub_origin(tmp_path) == {}


def test_mixed_widths_are_said(folder: Path, drawn: Callable[..., str]) -> None:
    facts = allocation_facts()
    assert "Widths are mixed" not in drawn(folder)
    edit_record(folder, lambda record: record.update(allocation=facts))
    text = drawn(folder)
    assert f"Widths are mixed: each of {len(facts['units'])} units" in text
    assert f"Predicted: {facts['predicted_kl_nats']:.4g} nats" in text
