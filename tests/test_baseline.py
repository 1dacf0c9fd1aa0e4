"""`gate` against a baseline: paired comparisons, and records that must never be compared silently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Command, Refuse
from gate_records import DOCUMENTS, against, changed, checks, line, noisy, record, without
from onecard.core.record.schema import SCHEMA_VERSION

# --- against a baseline


@pytest.mark.parametrize(
    ("factor", "spread", "tolerance", "code"),
    [
        (1.0, 0.0, 0, 0),
        (1.0, 0.05, 0.01, 0),
        (1.1, 0.05, 0.01, 1),
        (1.1, 0.05, 0.2, 0),
        (1.03, 0.2, 0.01, 0),
        (0.5, 0.05, 0, 0),
        (1.005, 0.0, 0.01, 0),
        (1.015, 0.0, 0.01, 1),
    ],
)
def test_a_rise_of_the_mean(
    onecard: Command, write: Callable[..., Path], factor: float, spread: float, tolerance: float, code: int
) -> None:
    result = against(onecard, write, noisy(factor, spread), record(), "--tolerance", tolerance)
    found = checks(result, code)["baseline kl_mean_nats"]
    assert found["paired"] is True
    assert found["passed"] == (code == 0)
    assert found["low"] - 1e-9 <= found["change"] <= found["high"] + 1e-9
    assert "60 documents as pairs" in found["said"]


def test_a_fall_of_the_same_top1(onecard: Command, write: Callable[..., Path]) -> None:
    worse = record()
    for document in worse["kl"]["by_document"]:
        document["same_top1"] -= 0.01
    found = checks(against(onecard, write, worse, record()), 1)["baseline same_top1"]
    assert found["change"] == pytest.approx(-0.01)
    assert found["high"] < -0.002
    assert checks(against(onecard, write, worse, record(), "--tolerance-top1", 0.02), 0)
    assert checks(against(onecard, write, record(), worse), 0)


def test_more_changed_answers(onecard: Command, write: Callable[..., Path]) -> None:
    worse = record()
    for answer in worse["flips"]["tasks"][0]["answers"][:40]:
        answer["quantized"] = answer["reference"] + 1
    found = checks(against(onecard, write, worse, record()), 1)["baseline flip_rate demo"]
    assert (found["measured"], found["before"]) == (pytest.approx(53 / 300), pytest.approx(15 / 300))
    assert checks(against(onecard, write, worse, record(), "--tolerance-flips", 0.5), 0)


def test_answers_that_do_not_pair(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    now, twice = record(), record()
    now["flips"]["tasks"][0]["answers"].pop()
    refused(against(onecard, write, now, record()), "the task demo cannot be compared item by item")
    for answer in twice["flips"]["tasks"][0]["answers"]:
        answer["id"] = "the same"
    found = checks(against(onecard, write, twice, twice), 0)["baseline flip_rate demo"]
    assert (found["measured"], found["change"]) == (pytest.approx(15 / 300), 0)


def test_order_of_documents_and_answers_does_not_matter(onecard: Command, write: Callable[..., Path]) -> None:
    plain = line(against(onecard, write, noisy(1.02, 0.05), record()), 0)
    mixed = noisy(1.02, 0.05)
    mixed["kl"]["by_document"].reverse()
    mixed["flips"]["tasks"][0]["answers"].reverse()
    assert line(against(onecard, write, mixed, record()), 0)["checks"] == plain["checks"]


def test_a_text_that_stands_there_twice_is_one_document(onecard: Command, write: Callable[..., Path]) -> None:
    """Its tokens and its KL are summed, whatever pieces they come in."""
    whole, halves = noisy(1.02, 0.05), noisy(1.02, 0.05)
    first = halves["kl"]["by_document"][0]
    first["tokens"] //= 2
    whole["kl"]["by_document"][0]["tokens"] = 2 * first["tokens"]
    halves["kl"]["by_document"].append(dict(first))
    before = record()
    before["kl"]["by_document"][0]["tokens"] = 2 * first["tokens"]
    found = [line(against(onecard, write, now, before), 0)["checks"] for now in (whole, halves)]
    assert found[0] == found[1]


def test_another_device_is_a_note(onecard: Command, write: Callable[..., Path]) -> None:
    notes = line(against(onecard, write, record(machine={"device": "a card"}), record()), 0)["notes"]
    assert any("measured on a card, the baseline on cpu" in note for note in notes)
    assert line(against(onecard, write, record(), record()), 0)["notes"] == []


def test_without_documents_it_says_that_it_compares_unpaired(onecard: Command, write: Callable[..., Path]) -> None:
    bare = noisy(1.1, 0.05)
    del bare["kl"]["by_document"]
    found = line(against(onecard, write, bare, record()), 0)
    assert any("unpaired" in note for note in found["notes"])
    kl = next(check for check in found["checks"] if (check["kind"], check["name"]) == ("baseline", "kl_mean_nats"))
    assert kl["paired"] is False
    assert "unpaired" in kl["said"]
    assert kl["low"] < 0 < kl["change"]
    far = record(2.0)
    del far["kl"]["by_document"]
    assert checks(against(onecard, write, far, record()), 1)


def test_what_a_baseline_holds(onecard: Command, write: Callable[..., Path], tmp_path: Path) -> None:
    """A baseline holds what a comparison needs, and no text, path or machine. The gate says the same with the record
    itself."""
    frozen = tmp_path / "baseline.json"
    told = line(onecard("baseline", write("r.json", record()), "-o", frozen), 0)
    assert (told["paired"], told["documents"]) == (True, DOCUMENTS)
    text = frozen.read_text()
    assert "nobody's business" not in text
    assert "/home/me" not in text
    by_report = line(onecard("gate", write("n.json", record(1.1)), "--baseline", tmp_path / "r.json"), 1)
    by_frozen = line(onecard("gate", write("n.json", record(1.1)), "--baseline", frozen), 1)
    assert by_report["checks"] == by_frozen["checks"]
    again = line(onecard("baseline", frozen, "-o", tmp_path / "again.json"), 0)
    assert (tmp_path / "again.json").read_text() == text
    assert again["digest"] == told["digest"]


# --- never compared silently


UNLIKE = {
    "the original model": changed(model__digest="c" * 64),
    "its family": changed(model__family="qwen3_moe"),
    "the evaluation rows": changed(texts__evaluation={"rows_digest": "e" * 64}),
    "the number of tokens": changed(kl__tokens=5),
    "the number of documents": changed(kl__documents=5),
    "KL is measured in only one": changed(kl={}),
    "the task demo": changed(flips={}),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_cannot_be_compared_is_refused(
    onecard: Command, write: Callable[..., Path], refused: Refuse, what: str
) -> None:
    result = against(onecard, write, UNLIKE[what], record())
    refused(result, "do not measure the same thing", what)


def test_all_reasons_at_once(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    now = changed(model__digest="c" * 64, texts__evaluation={"rows_digest": "e" * 64}, kl__tokens=5)
    now["flips"]["tasks"][0] |= {"digest": "other", "shots": 5}
    refused(
        against(onecard, write, now, record()),
        "the original model",
        "the evaluation rows",
        "the number of tokens",
        "the digest of the task demo",
        "the shots of the task demo",
    )


def test_documents_that_differ_behind_one_digest(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    now = record()
    now["kl"]["by_document"][3]["tokens"] += 1
    now["kl"]["by_document"][4]["digest"] = "f" * 16
    refused(against(onecard, write, now, record()), "3 documents", f"{3:016x}", f"{4:016x}", "damaged")


def test_a_task_that_only_the_report_has_is_a_note(onecard: Command, write: Callable[..., Path]) -> None:
    now = record()
    now["flips"]["tasks"].append(now["flips"]["tasks"][0] | {"task": "new"})
    assert (
        "the task new is not in the baseline: not compared" in line(against(onecard, write, now, record()), 0)["notes"]
    )


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        (None, ["holds no record"]),
        ("{", ["cannot be read"]),
        ("[]", ["no record of onecard"]),
        (record(schema_version=1), ["schema version 1", f"reads {SCHEMA_VERSION}"]),
        (record(schema_version=SCHEMA_VERSION + 1), [f"schema version {SCHEMA_VERSION + 1}"]),
        ({"files": ["config.json"]}, ["not finished"]),
        (changed(kl__kl_mean_nats=None, kl__same_top1="much"), ["kl.kl_mean_nats", "kl.same_top1", "valid number"]),
        (json.dumps(record()).replace('"kl_p99_nats": 0.2', '"kl_p99_nats": NaN'), ["kl.kl_p99_nats", "finite"]),
        (without("texts"), ["texts: Field required"]),
        (without("texts", kl={}), ["texts: Field required"]),
        (without("plan"), ["plan: Field required"]),
        (changed(flips={"all": record()["flips"]["all"]}), ["flips.tasks: Field required"]),
        (changed(flips__tasks=[record()["flips"]["all"] | {"task": None}]), ["flips.tasks.0.task"]),
        (record(kl={}, flips={}), ["holds no measurement"]),
        (changed(kl__by_document=[{"digest": 3}] * 9), ["kl.by_document.0.digest", "more"]),
        (
            changed(flips__tasks=[{"task": "t", "answers": [{}]}]),
            ["flips.tasks.0.changed", "flips.tasks.0.answers.0.id"],
        ),
        ("[" * 100_000, ["cannot be read"]),
        (
            record(blocks=[{"expert_rows": ["many"]}], fallbacks=[], plan=3),
            ["blocks.0.expert_rows.0", "fallbacks", "plan"],
        ),
    ],
)
def test_what_is_no_report(
    onecard: Command, write: Callable[..., Path], refused: Refuse, content: Any, needles: list[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json" if content is None else write("bad.json", content)
    good = write("good.json", record())
    refused(onecard("gate", bad), "bad.json", *needles)
    refused(onecard("gate", good, "--baseline", bad), "bad.json", *needles)
    refused(onecard("baseline", bad, "-o", tmp_path / "new.json"), "bad.json", *needles)
    assert not (tmp_path / "new.json").exists()


# --- what no gate can use


def without_spread() -> dict[str, Any]:
    """Neither documents nor a standard error: a mean alone."""
    made = record(flips={})
    del made["kl"]["by_document"], made["kl"]["kl_standard_error_nats"]
    return made


USELESS = {
    "one document cannot be compared": changed(kl__by_document=record()["kl"]["by_document"][:1]),
    "without documents, and without the standard error": without_spread(),
    "the task demo cannot be compared item by item": changed(
        flips__tasks=[record()["flips"]["tasks"][0] | {"answers": []}]
    ),
    "there is nothing to compare": record(kl={}, flips={"all": record()["flips"]["all"], "tasks": []}),
    "texts.evaluation.rows_digest: Field required": changed(texts__evaluation={"rows": DOCUMENTS}),
    "model.digest: Field required": changed(model__digest=None),
    "flips.tasks.0.digest: Field required": changed(
        flips__tasks=[{k: v for k, v in record()["flips"]["tasks"][0].items() if k != "digest"}]
    ),
}


@pytest.mark.parametrize("reason", USELESS)
def test_a_baseline_that_no_gate_can_use_is_not_frozen(
    onecard: Command, write: Callable[..., Path], refused: Refuse, reason: str, tmp_path: Path
) -> None:
    """`baseline` refuses it for the reason for which `gate` would, and writes nothing."""
    report = write("report.json", USELESS[reason])
    refused(onecard("gate", report, "--baseline", report), reason)
    refused(onecard("baseline", report, "-o", tmp_path / "baseline.json"), reason)
    assert not (tmp_path / "baseline.json").exists()


# --- one dtype


def test_two_compute_dtypes_are_never_compared_silently(
    onecard: Command, write: Callable[..., Path], refused: Refuse
) -> None:
    """Refused; with --across-dtypes compared, and the verdict says so. The dtype of an older record of a run stands in
    its identity; where none is recorded, a note says that."""
    bf16 = record(compute_dtype="bfloat16")
    refused(against(onecard, write, bf16, record()), "the compute dtype: bfloat16", "is float32", "--across-dtypes")
    said = "computed in bfloat16, the baseline in float32"
    result = against(onecard, write, bf16, record(), "--across-dtypes")
    assert any(said in note for note in line(result, 0)["notes"])
    assert said in result.stderr
    older = without("compute_dtype", identity={"compute dtype": "bfloat16"})
    refused(against(onecard, write, older, record()), "the compute dtype: bfloat16")
    refused(against(onecard, write, record(), older), "the compute dtype: float32")
    unknown = without("compute_dtype")
    for now, before, which in ((unknown, record(), "the report"), (record(), unknown, "the baseline")):
        notes = line(against(onecard, write, now, before), 0)["notes"]
        assert any(f"the compute dtype of {which} is not recorded" in note for note in notes)
