"""The verbs `verify` and `flips` by the command line: what their records hold."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet
import pytest
from click.testing import Result

from babies import changed_copy
from command_line import run_onecard, strict
from documents import ITEMS
from inputs import write_jsonl, write_recipe
from onecard.checkpoint.source import open_folder

KL = {
    "tokens",
    "documents",
    "kl_mean_nats",
    "kl_standard_error_nats",
    "kl_low_nats",
    "kl_high_nats",
    "kl_median_nats",
    "kl_p90_nats",
    "kl_p95_nats",
    "kl_p99_nats",
    "kl_p999_nats",
    "kl_max_nats",
    "reverse_kl_mean_nats",
    "same_top1",
    "same_top1_low",
    "same_top1_high",
    "top5_overlap",
    "delta_p_mean",
    "delta_p_rms",
    "delta_p_quantiles",
    "perplexity_reference",
    "perplexity_quantized",
    "perplexity_ratio",
    "perplexity_ratio_low",
    "perplexity_ratio_high",
    "interval",
    "changed_routes",
    "changed_routes_by_block",
    "histogram",
    "by_position",
    "by_confidence",
    "by_kind",
    "by_document",
    "worst_tokens",
}
DOCUMENT = {
    "document",
    "digest",
    "kind",
    "source",
    "tokens",
    "kl_mean_nats",
    "same_top1",
    "nll_reference",
    "nll_quantized",
}
WORST_TOKEN = {
    "document",
    "kind",
    "position",
    "kl_nats",
    "before",
    "token",
    "after",
    "p_reference",
    "p_quantized",
    "reference_top",
    "quantized_top",
}
EXPERT = {"block", "expert", "weight_error", "output_error", "rows", "calibration_rows", "score"}
FLIPS = {
    "task",
    "items",
    "accuracy_reference",
    "accuracy_quantized",
    "changed",
    "right_to_wrong",
    "wrong_to_right",
    "mcnemar_p",
    "margin_of_changed",
    "margin_of_all",
}
ANSWER = {"id", "right", "reference", "quantized", "margin_reference", "margin_quantized"}


@dataclass(frozen=True)
class Proof:
    """One `verify` of a baby's int4 checkpoint: its record, its kept tokens and its output."""

    source: Path
    checkpoint: Path
    record: dict[str, Any]
    tokens: list[dict[str, Any]]
    result: Result
    folder: Path


@pytest.fixture(scope="module")
def proof(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Proof:
    folder = tmp_path_factory.mktemp("proof")
    write_jsonl(folder / "items.jsonl", ITEMS)
    recipe = write_recipe(folder / "recipe.yaml", tasks=["items.jsonl"], task_shots=1, task_items=30)
    checkpoint, _ = emitted("scout")
    result = run_onecard(
        "verify",
        baby("scout"),
        checkpoint,
        "--recipe",
        recipe,
        *texts[2:],
        "--record",
        folder / "record.json",
        "--keep-tokens",
        folder / "tokens.parquet",
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    record, tokens = (
        strict((folder / "record.json").read_text()),
        pyarrow.parquet.read_table(folder / "tokens.parquet").to_pylist(),
    )
    return Proof(baby("scout"), checkpoint, record, tokens, result, folder)


def test_the_record_of_verify_holds_what_is_promised(proof: Proof) -> None:
    record = proof.record
    assert (record["schema_version"], record["command"]) == (2, "verify")
    assert record["kl"].keys() == KL
    assert set(record["kl"]["delta_p_quantiles"]) == {"p01", "p05", "p25", "p50", "p75", "p95", "p99"}
    assert all(entry.keys() == DOCUMENT for entry in record["kl"]["by_document"])
    assert all(entry.keys() == WORST_TOKEN for entry in record["kl"]["worst_tokens"])
    assert record["errors"].keys() == {"blocks", "experts", "worst_experts"}
    for block in record["errors"]["blocks"]:
        assert block.keys() == {"block", "hidden", "attention", "feed_forward", "units"}
    assert all(entry.keys() >= EXPERT for entry in record["errors"]["experts"])
    assert record["flips"].keys() == {"all", "tasks"}
    assert record["flips"]["all"].keys() == FLIPS
    (task,) = record["flips"]["tasks"]
    assert task.keys() == FLIPS | {"digest", "shots", "answers"}
    assert (task["task"], task["items"], task["shots"]) == ("items.jsonl", 30, 1)
    assert all(answer.keys() == ANSWER for answer in task["answers"])
    assert record["gate"] == {}


def test_the_record_says_what_was_measured_on_what(proof: Proof) -> None:
    record = proof.record
    folder = open_folder(proof.checkpoint)
    assert record["checkpoint"] == {
        "name": "scout",
        "digest": folder.digest,
        "bytes": sum(f.stat().st_size for f in proof.checkpoint.glob("*.safetensors")),
        "config_differences": [],
        "texts_encoded_otherwise": 0,
    }
    assert record["model"]["digest"] == open_folder(proof.source).digest
    made = strict((proof.checkpoint / "onecard.json").read_text())
    assert record["texts"]["evaluation"]["rows_digest"] == made["texts"]["evaluation"]["rows_digest"]
    assert record["plan"]["emitted_bytes"] == made["plan"]["emitted_bytes"]
    # Records are passed on, so they name no folder of the machine.
    assert str(proof.folder) not in json.dumps(record)
    assert str(proof.checkpoint.parent) not in json.dumps(record)


def test_quantize_and_verify_record_the_same(proof: Proof) -> None:
    """Figures, lists and errors are the same, since quantize recorded the same files."""
    made = strict((proof.checkpoint / "onecard.json").read_text())
    assert made["kl"].keys() == KL
    for key in ("by_document", "by_kind", "histogram", "worst_tokens", "changed_routes_by_block"):
        assert made["kl"][key] == proof.record["kl"][key], key
    assert made["errors"] == proof.record["errors"]
    assert made["checkpoint"]["bytes"] == proof.record["checkpoint"]["bytes"]
    # Calibration rows come from the checkpoint's own record.
    for expert in proof.record["errors"]["experts"]:
        assert expert["calibration_rows"] == made["blocks"][expert["block"]]["expert_rows"][expert["expert"]]


def test_kinds_that_calibration_lacked_stand_apart(
    proof: Proof, onecard: Callable[..., Result], tmp_path: Path
) -> None:
    """The checkpoint's record tells which kinds calibration had: here "text" alone."""
    made = strict((proof.checkpoint / "onecard.json").read_text())
    assert made["texts"]["calibration"]["tokens_by_kind"].keys() == {"text"}
    lines = [
        {"text": f"{word} {kind} " * 10, "kind": kind} for word in ["one", "two", "three"] for kind in ("text", "verse")
    ]
    write_jsonl(tmp_path / "both.jsonl", lines)
    asked = ("--evaluation", tmp_path / "both.jsonl", "--record", tmp_path / "record.json")
    result = onecard("verify", proof.source, proof.checkpoint, *asked)
    assert result.exit_code == 0, result.output
    kl = strict((tmp_path / "record.json").read_text())["kl"]
    apart, by_kind = ({bucket["label"]: bucket for bucket in kl[key]} for key in ("by_likeness", "by_kind"))
    assert {label: bucket["tokens"] for label, bucket in apart.items()} == {
        "texts like calibration": by_kind["text"]["tokens"],
        "others": by_kind["verse"]["tokens"],
    }
    assert apart["others"]["kl_mean_nats"] == by_kind["verse"]["kl_mean_nats"]


def test_the_lists_and_the_kept_tokens_agree(proof: Proof) -> None:
    kl, tokens = proof.record["kl"], proof.tokens
    assert len(tokens) == kl["tokens"] == sum(kl["histogram"]["tokens"])
    assert fmean(t["kl_nats"] for t in tokens) == pytest.approx(kl["kl_mean_nats"], rel=1e-6)
    assert fmean(t["reverse_kl_nats"] for t in tokens) == pytest.approx(kl["reverse_kl_mean_nats"], rel=1e-6)
    assert fmean(t["same_top1"] for t in tokens) == pytest.approx(kl["same_top1"])
    assert fmean(t["top5_overlap"] for t in tokens) == pytest.approx(kl["top5_overlap"])
    own: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for token in tokens:
        own[token["document_digest"]].append(token)
    assert list(own) == [entry["digest"] for entry in kl["by_document"]]
    for entry in kl["by_document"]:
        mine = own[entry["digest"]]
        assert (entry["document"], entry["tokens"]) == (mine[0]["document"], len(mine))
        assert fmean(t["kl_nats"] for t in mine) == pytest.approx(entry["kl_mean_nats"], rel=1e-6)
        assert -fmean(t["logp_quantized"] for t in mine) == pytest.approx(entry["nll_quantized"], rel=1e-6)
    worst = kl["worst_tokens"][0]
    largest = max(tokens, key=lambda t: t["kl_nats"])
    assert (worst["kl_nats"], worst["position"], worst["document"]) == (
        largest["kl_nats"],
        largest["position"],
        largest["document"],
    )


def test_worst_tokens_are_in_the_words_of_the_texts(proof: Proof, texts: list[str]) -> None:
    """One token a character, so the words before and after are the text itself."""
    lines = [json.loads(line) for line in Path(texts[3]).read_text().splitlines()]
    documents = [line["text"] if "text" in line else line["messages"][0]["content"] for line in lines]
    for entry in proof.record["kl"]["worst_tokens"]:
        around = "".join(entry[key] for key in ("before", "token", "after"))
        assert any(around.rpartition(">")[2] in text for text in documents), around


def test_what_is_said_of_it(proof: Proof) -> None:
    line = json.loads(proof.result.stdout)
    record = proof.record
    assert line["kl_mean_nats"] == record["kl"]["kl_mean_nats"]
    assert (line["items"], line["changed"]) == (30, record["flips"]["all"]["changed"]["share"])
    for said in ("of 30 items change", "accuracy", "6 evaluation documents: too few", "KL(source || checkpoint)"):
        assert said in proof.result.stderr
    assert "worst expert" not in proof.result.stderr, "none stands out of a sound checkpoint"
    assert "Creating" not in proof.result.stderr, "other libraries' bars"
    assert {path.name for path in proof.folder.iterdir()} == {
        "items.jsonl",
        "recipe.yaml",
        "record.json",
        "tokens.parquet",
    }


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_a_scale_of_one_expert_that_is_a_tenth_off_names_that_expert(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    family: str,
) -> None:
    """The packed files are damaged as by an upload; the record and the card both name the expert."""
    out, _ = emitted(family)
    name = next(n for n in open_folder(out).names if ".layers.0." in n and ".experts.3.down_proj.weight_scale" in n)
    spoilt = changed_copy(out, tmp_path / "spoilt", lambda n, t: (t.float() * 1.1).to(t.dtype) if n == name else t)
    result = onecard("verify", baby(family), spoilt, *texts[2:], "--record", tmp_path / "record.json")
    assert result.exit_code == 0, result.output
    worst, second = strict((tmp_path / "record.json").read_text())["errors"]["worst_experts"][:2]
    assert (worst["block"], worst["expert"]) == (0, 3)
    assert worst["weight_gain"] == pytest.approx(1.1, abs=0.02)
    assert worst["score"] > 1.5 * second["score"]
    assert "block 0, expert 3" in result.stderr


def test_flips(proof: Proof, onecard: Callable[..., Result], tmp_path: Path) -> None:
    """The same items give the same answers as inside verify, and there is no KL."""
    result = onecard(
        "flips",
        proof.source,
        proof.checkpoint,
        "--tasks",
        proof.folder / "items.jsonl",
        "--shots",
        "1",
        "--items",
        "30",
        "--record",
        tmp_path / "flips.json",
    )
    assert result.exit_code == 0, result.output
    record = strict((tmp_path / "flips.json").read_text())
    assert (record["command"], record["schema_version"]) == ("flips", 2)
    assert record["kl"] == record["errors"] == record["texts"] == {}
    (task,), (before,) = record["flips"]["tasks"], proof.record["flips"]["tasks"]
    assert task["digest"] == before["digest"]
    assert task["changed"] == before["changed"]
    for a, b in zip(task["answers"], before["answers"], strict=True):
        assert (a["id"], a["reference"], a["quantized"]) == (b["id"], b["reference"], b["quantized"])
        assert a["margin_quantized"] == pytest.approx(b["margin_quantized"], rel=1e-3, abs=1e-4)
    line = json.loads(result.stdout)
    assert line["items"] == 30
    assert line["accuracy_quantized"] == task["accuracy_quantized"]["share"]
    assert "kl_mean_nats" not in line
    assert "KL(" not in result.stderr
    assert "McNemar" in result.stderr


def test_a_model_changes_none_of_its_own_answers(
    baby: Callable[..., Path], onecard: Callable[..., Result], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    tasks = f"{jsonl('one.jsonl', ITEMS[:5])},{jsonl('two.jsonl', ITEMS[5:12])}"
    record = tmp_path / "record.json"
    result = onecard("flips", baby("qwen3"), baby("qwen3"), "--tasks", tasks, "--record", record)
    assert result.exit_code == 0, result.output
    found = strict((record).read_text())["flips"]
    assert [task["items"] for task in found["tasks"]] == [5, 7]
    told = found["all"]
    assert (told["items"], told["changed"]["count"], told["mcnemar_p"]) == (12, 0, 1.0)
    assert told["accuracy_reference"] == told["accuracy_quantized"]
    assert told["margin_of_changed"] is None
    assert any("the same folder" in warning for warning in strict((record).read_text())["warnings"])
