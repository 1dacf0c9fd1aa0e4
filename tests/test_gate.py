"""The gate as a CI meets it: exit codes, refusals, what is written, and what a record must not be compared with."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import Result

from onecard.core.record.schema import SCHEMA_VERSION

Check_ = Callable[..., str]
Run = Callable[..., Result]
DOCUMENTS = 60


def record(factor: float = 1.0, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A record of `quantize` whose documents' KLs are `factor` times those of any other of that seed."""
    rng = random.Random(seed)
    documents = []
    for number in range(DOCUMENTS):
        tokens, kl = rng.randint(50, 400), factor * rng.lognormvariate(-5, 1)
        same = 1 - min(0.5, 8 * kl)
        documents.append(
            {
                "document": number,
                "digest": f"{number:016x}",
                "kind": "prose",
                "source": "x",
                "tokens": tokens,
                "kl_mean_nats": kl,
                "same_top1": same,
            }
        )
    total = sum(d["tokens"] for d in documents)
    mean = sum(d["tokens"] * d["kl_mean_nats"] for d in documents) / total
    same_top1 = sum(d["tokens"] * d["same_top1"] for d in documents) / total
    answers = [{"id": str(i), "right": 0, "reference": i % 4, "quantized": (i + (i % 20 == 0)) % 4} for i in range(300)]
    share = {"share": 0.05, "low": 0.031, "high": 0.08, "count": 15}
    return {
        "command": "quantize",
        "onecard": "0",
        "schema_version": SCHEMA_VERSION,
        "model": {"name": "/home/me/m", "family": "llama4", "blocks": 2, "digest": "a" * 64},
        "recipe": {"name": "r", "max_kl_mean_nats": 0.05, "max_fallbacks": 0},
        "texts": {"evaluation": {"source": "/home/me/secret.jsonl", "rows_digest": "b" * 64, "rows": DOCUMENTS}},
        "plan": {"emitted_bytes": 1000},
        "versions": {},
        "identity": {},
        "files": [],
        "warnings": [],
        "blocks": [{"block": 0, "expert_rows": [70, 300]}],
        "fallbacks": {"diagonal_fallbacks": 0},
        "kl": {
            "tokens": total,
            "documents": DOCUMENTS,
            "kl_mean_nats": mean,
            "kl_standard_error_nats": mean / 12,
            "kl_low_nats": 0.85 * mean,
            "kl_high_nats": 1.2 * mean,
            "kl_p99_nats": 0.2,
            "same_top1": same_top1,
            "same_top1_low": same_top1 - 0.01,
            "same_top1_high": same_top1 + 0.01,
            "by_document": documents,
            "worst_tokens": [{"before": "a text that is nobody's business"}],
        },
        "flips": {
            "all": {"items": 300, "changed": share},
            "tasks": [{"task": "demo", "items": 300, "digest": "d", "shots": 0, "changed": share, "answers": answers}],
        },
        "machine": {"device": "cpu", "host": "nobody's business"},
    } | changes


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def put(name: str, value: Any) -> Path:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / name

    return put


Write = Callable[..., Path]


def line(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.stdout.count("\n") == 1
    return dict(json.loads(result.stdout))


def checks(result: Result, code: int) -> dict[str, dict[str, Any]]:
    found = line(result, code)
    assert found["passed"] == (code == 0) == all(check["passed"] for check in found["checks"])
    return {f"{check['kind']} {check['name']}": check for check in found["checks"]}


# --- limits

KEPT = {
    "max_kl_mean_nats": 0.1,
    "max_kl_p99_nats": 0.2,
    "min_same_top1": 0.5,
    "max_flip_rate": 0.05,
    "max_emitted_bytes": 1000,
    "fail_below_expert_rows": 70,
    "max_fallbacks": 0,
}
BROKEN = {
    "max_kl_mean_nats": 0.001,
    "max_kl_p99_nats": 0.19,
    "min_same_top1": 0.999,
    "max_flip_rate": 0.04,
    "max_emitted_bytes": 999,
    "fail_below_expert_rows": 71,
}


def test_limits_that_are_kept(onecard: Run, write: Write) -> None:
    found = checks(onecard("gate", write("r.json", record()), "--limits", write("l.yaml", yaml.safe_dump(KEPT))), 0)
    assert set(found) == {f"limit {name}" for name in KEPT}


@pytest.mark.parametrize("name", BROKEN)
def test_each_limit_can_break(onecard: Run, write: Write, name: str) -> None:
    use = KEPT | {name: BROKEN[name]}
    result = onecard("gate", write("r.json", record()), "--limits", write("l.yaml", yaml.safe_dump(use)))
    assert [check for check, told in checks(result, 1).items() if not told["passed"]] == [f"limit {name}"]
    assert f"FAIL  {name}" in result.stderr


def test_the_recipe_of_the_record_has_the_limits(onecard: Run, write: Write) -> None:
    assert set(checks(onecard("gate", write("r.json", record())), 0)) == {
        "limit max_kl_mean_nats",
        "limit max_fallbacks",
    }
    strict = record(recipe={"max_kl_mean_nats": 0.0001, "max_kl_p99_nats": None, "fail_below_expert_rows": 0})
    assert set(checks(onecard("gate", write("r.json", strict)), 1)) == {"limit max_kl_mean_nats"}


def test_damaged_limits_in_a_record(onecard: Run, write: Write, refused: Check_) -> None:
    damaged = record(recipe={"max_kl_mean_nats": "small", "min_same_top1": 2})
    refused(onecard("gate", write("r.json", damaged)), "r.json", "max_kl_mean_nats", "min_same_top1")


def test_the_measured_mean_decides_and_the_interval_is_told(onecard: Run, write: Write) -> None:
    mean = record()["kl"]["kl_mean_nats"]
    limits = write("l.yaml", f"max_kl_mean_nats: {mean * 1.1}\n")
    found = line(onecard("gate", write("r.json", record()), "--limits", limits), 0)
    assert any("reaches over the limit" in note for note in found["notes"])
    assert found["checks"][0]["high"] > found["checks"][0]["allowed"] > found["checks"][0]["measured"]


def test_limits_that_cannot_be_judged_are_named_all_at_once(onecard: Run, write: Write, refused: Check_) -> None:
    bare = record(command="verify", fallbacks={}, blocks=[], flips={}, recipe={})
    limits = write("l.yaml", yaml.safe_dump(KEPT))
    refused(
        onecard("gate", write("r.json", bare), "--limits", limits),
        "max_flip_rate",
        "fail_below_expert_rows",
        "max_fallbacks",
    )


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("max_kl: 1\nmin_same_top1: 2\n", ["max_kl: unknown key", "min_same_top1", "Known keys: max_kl_mean_nats"]),
        ("max_kl_mean_nats: 0.1\nmax_kl_mean_nats: 0.2\n", ["twice"]),
        ("- 1\n", ["holds no keys"]),
        ("max_kl_mean_nats: .nan\n", ["max_kl_mean_nats"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_a_bad_file_of_limits(onecard: Run, write: Write, refused: Check_, text: str, needles: list[str]) -> None:
    refused(onecard("gate", write("r.json", record()), "--limits", write("l.yaml", text)), *needles)


def test_a_recipe_is_a_file_of_limits(onecard: Run, write: Write, recipe: Callable[..., Path]) -> None:
    """With what it names, and not with what it leaves as it is: a record of `verify` has no fallbacks to judge."""
    verified = write("r.json", record(command="verify", fallbacks={}, blocks=[], recipe={}))
    assert set(checks(onecard("gate", verified, "--limits", recipe(min_same_top1=0.1)), 0)) == {"limit min_same_top1"}


def test_an_empty_choice_of_limits_is_none(
    onecard: Run, write: Write, recipe: Callable[..., Path], refused: Check_
) -> None:
    refused(onecard("gate", write("r.json", record()), "--limits", recipe()), "names no limit", "--baseline")


def test_nothing_to_hold_it_against(onecard: Run, write: Write, refused: Check_) -> None:
    refused(onecard("gate", write("r.json", record(recipe={}))), "--limits FILE or --baseline")


# --- against a baseline


def against(onecard: Run, write: Write, now: dict[str, Any], before: dict[str, Any], *options: object) -> Result:
    frozen = write("frozen.json", before).with_name("baseline.json")
    assert onecard("baseline", write("frozen.json", before), "-o", frozen).exit_code == 0
    return onecard("gate", write("now.json", now), "--baseline", frozen, *options)


def noisy(factor: float, spread: float, seed: int = 1) -> dict[str, Any]:
    """KLs that moved by `factor`, and each document's by noise of its own besides."""
    rng = random.Random(seed)
    made = record()
    for document in made["kl"]["by_document"]:
        document["kl_mean_nats"] *= factor * rng.lognormvariate(0, spread)
    total = made["kl"]["tokens"]
    made["kl"]["kl_mean_nats"] = sum(d["tokens"] * d["kl_mean_nats"] for d in made["kl"]["by_document"]) / total
    return made


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
    onecard: Run, write: Write, factor: float, spread: float, tolerance: float, code: int
) -> None:
    result = against(onecard, write, noisy(factor, spread), record(), "--tolerance", tolerance)
    found = checks(result, code)["baseline kl_mean_nats"]
    assert found["paired"] is True
    assert found["passed"] == (code == 0)
    assert found["low"] - 1e-9 <= found["change"] <= found["high"] + 1e-9
    assert "60 documents as pairs" in found["said"]


def test_a_fall_of_the_same_top1(onecard: Run, write: Write) -> None:
    worse = record()
    for document in worse["kl"]["by_document"]:
        document["same_top1"] -= 0.01
    found = checks(against(onecard, write, worse, record()), 1)["baseline same_top1"]
    assert found["change"] == pytest.approx(-0.01)
    assert found["high"] < -0.002
    assert checks(against(onecard, write, worse, record(), "--tolerance-top1", 0.02), 0)
    assert checks(against(onecard, write, record(), worse), 0)


def test_more_changed_answers(onecard: Run, write: Write) -> None:
    worse = record()
    for answer in worse["flips"]["tasks"][0]["answers"][:40]:
        answer["quantized"] = answer["reference"] + 1
    found = checks(against(onecard, write, worse, record()), 1)["baseline flip_rate demo"]
    assert (found["measured"], found["before"]) == (pytest.approx(53 / 300), pytest.approx(15 / 300))
    assert checks(against(onecard, write, worse, record(), "--tolerance-flips", 0.5), 0)


def test_answers_that_do_not_pair(onecard: Run, write: Write, refused: Check_) -> None:
    now, twice = record(), record()
    now["flips"]["tasks"][0]["answers"].pop()
    refused(against(onecard, write, now, record()), "the task demo cannot be compared item by item")
    for answer in twice["flips"]["tasks"][0]["answers"]:
        answer["id"] = "the same"
    found = checks(against(onecard, write, twice, twice), 0)["baseline flip_rate demo"]
    assert (found["measured"], found["change"]) == (pytest.approx(15 / 300), 0)


def test_order_of_documents_and_answers_does_not_matter(onecard: Run, write: Write) -> None:
    plain = line(against(onecard, write, noisy(1.02, 0.05), record()), 0)
    mixed = noisy(1.02, 0.05)
    mixed["kl"]["by_document"].reverse()
    mixed["flips"]["tasks"][0]["answers"].reverse()
    assert line(against(onecard, write, mixed, record()), 0)["checks"] == plain["checks"]


def test_a_text_that_stands_there_twice_is_one_document(onecard: Run, write: Write) -> None:
    """Its tokens and its KL are added up, in whatever pieces they come."""
    whole, halves = noisy(1.02, 0.05), noisy(1.02, 0.05)
    first = halves["kl"]["by_document"][0]
    first["tokens"] //= 2
    whole["kl"]["by_document"][0]["tokens"] = 2 * first["tokens"]
    halves["kl"]["by_document"].append(dict(first))
    before = record()
    before["kl"]["by_document"][0]["tokens"] = 2 * first["tokens"]
    found = [line(against(onecard, write, now, before), 0)["checks"] for now in (whole, halves)]
    assert found[0] == found[1]


def test_another_device_is_a_note(onecard: Run, write: Write) -> None:
    notes = line(against(onecard, write, record(machine={"device": "a card"}), record()), 0)["notes"]
    assert any("measured on a card, the baseline on cpu" in note for note in notes)
    assert line(against(onecard, write, record(), record()), 0)["notes"] == []


def test_without_documents_it_says_that_it_compares_unpaired(onecard: Run, write: Write) -> None:
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


def test_what_a_baseline_holds(onecard: Run, write: Write, tmp_path: Path) -> None:
    """Enough to compare with, and no text, path or machine. The gate says the same of the report itself."""
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


def changed(**where: Any) -> dict[str, Any]:
    made = record()
    for path, value in where.items():
        *folders, key = path.split("__")
        inside = made
        for name in folders:
            inside = inside[name]
        inside[key] = value
    return made


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
def test_what_cannot_be_compared_is_refused(onecard: Run, write: Write, refused: Check_, what: str) -> None:
    result = against(onecard, write, UNLIKE[what], record())
    refused(result, "do not measure the same thing", what)


def test_all_reasons_at_once(onecard: Run, write: Write, refused: Check_) -> None:
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


def test_documents_that_differ_behind_one_digest(onecard: Run, write: Write, refused: Check_) -> None:
    now = record()
    now["kl"]["by_document"][3]["tokens"] += 1
    now["kl"]["by_document"][4]["digest"] = "f" * 16
    refused(against(onecard, write, now, record()), "3 documents", f"{3:016x}", f"{4:016x}", "damaged")


def test_a_task_that_only_the_report_has_is_a_note(onecard: Run, write: Write) -> None:
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
        ({key: value for key, value in record().items() if key != "texts"}, ["texts: Field required"]),
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
    onecard: Run, write: Write, refused: Check_, content: Any, needles: list[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json" if content is None else write("bad.json", content)
    good = write("good.json", record())
    refused(onecard("gate", bad), "bad.json", *needles)
    refused(onecard("gate", good, "--baseline", bad), "bad.json", *needles)
    refused(onecard("baseline", bad, "-o", tmp_path / "new.json"), "bad.json", *needles)
    assert not (tmp_path / "new.json").exists()


def test_one_document_cannot_be_compared(onecard: Run, write: Write, refused: Check_) -> None:
    one = record()
    one["kl"]["by_document"] = one["kl"]["by_document"][:1]
    refused(against(onecard, write, one, one), "one document")


# --- what is written


def test_junit_summary_and_nothing_on_a_refusal(onecard: Run, write: Write, refused: Check_, tmp_path: Path) -> None:
    xml, summary = tmp_path / "gate.xml", tmp_path / "summary.md"
    summary.write_text("before\n")
    options = ["--junit", xml, "--summary", summary]
    refused(against(onecard, write, changed(model__digest="c" * 64), record(), *options))
    assert not xml.exists()
    assert summary.read_text() == "before\n"
    told = line(against(onecard, write, record(1.3), record(), *options), 1)
    root = ElementTree.fromstring(xml.read_bytes())
    assert (root.tag, [child.tag for child in root]) == ("testsuites", ["testsuite"])
    cases = root.findall("./testsuite/testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert [case.get("name") for case in cases] == [check["name"] for check in told["checks"]]
    assert failed == [check["name"] for check in told["checks"] if not check["passed"]]
    assert root[0].get("tests") == str(len(cases))
    assert root[0].get("failures") == str(len(failed))
    written = summary.read_text()
    assert written.startswith("before\n### onecard gate failed")
    assert written.count("**FAIL**") == len(failed)


def test_the_job_summary_of_github(onecard: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    onecard("gate", write("r.json", record()))
    onecard("gate", write("r.json", record()))
    assert (tmp_path / "step.md").read_text().count("### onecard gate passed") == 2


def test_files_that_cannot_be_written_are_named_before_anything(
    onecard: Run, write: Write, refused: Check_, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere" / "x"
    report = write("r.json", record())
    refused(onecard("gate", report, "--junit", nowhere, "--summary", tmp_path), "--junit", "--summary")
    refused(onecard("baseline", report, "-o", nowhere), "folder that exists")


def test_a_record_without_a_part(onecard: Run, write: Write, refused: Check_) -> None:
    """A key that is missing says the same as an empty one."""
    bare = {key: value for key, value in record().items() if key != "kl"}
    refused(against(onecard, write, bare, record()), "KL is measured in only one of the two")


def test_it_says_when_no_limit_was_looked_at(onecard: Run, write: Write) -> None:
    """A record of `verify` has no recipe: a CI that counts on its limits must hear of it."""
    found = line(against(onecard, write, record(recipe={}), record()), 0)
    assert any("no limits were looked at" in note for note in found["notes"])


def test_no_sign_before_nought(onecard: Run, write: Write) -> None:
    found = checks(against(onecard, write, record(), record()), 0)["baseline same_top1"]
    assert "-0.00" not in found["said"]


def test_a_baseline_does_not_take_the_records_place(onecard: Run, write: Write, refused: Check_) -> None:
    report = write("r.json", record())
    before = report.read_bytes()
    refused(onecard("baseline", report, "-o", report), "r.json", "another file")
    assert report.read_bytes() == before
