"""`gate` against limits, as a CI meets it: exit codes, refusals, and the files it writes."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from command_line import Command, Refuse
from gate_records import against, changed, checks, line, record

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


def test_limits_that_are_kept(onecard: Command, write: Callable[..., Path]) -> None:
    found = checks(onecard("gate", write("r.json", record()), "--limits", write("l.yaml", yaml.safe_dump(KEPT))), 0)
    assert set(found) == {f"limit {name}" for name in KEPT}


@pytest.mark.parametrize("name", BROKEN)
def test_each_limit_can_break(onecard: Command, write: Callable[..., Path], name: str) -> None:
    use = KEPT | {name: BROKEN[name]}
    result = onecard("gate", write("r.json", record()), "--limits", write("l.yaml", yaml.safe_dump(use)))
    assert [check for check, told in checks(result, 1).items() if not told["passed"]] == [f"limit {name}"]
    assert f"FAIL  {name}" in result.stderr


def test_the_recipe_of_the_record_has_the_limits(onecard: Command, write: Callable[..., Path]) -> None:
    assert set(checks(onecard("gate", write("r.json", record())), 0)) == {
        "limit max_kl_mean_nats",
        "limit max_fallbacks",
    }
    strict = record(recipe={"max_kl_mean_nats": 0.0001, "max_kl_p99_nats": None, "fail_below_expert_rows": 0})
    assert set(checks(onecard("gate", write("r.json", strict)), 1)) == {"limit max_kl_mean_nats"}


def test_damaged_limits_in_a_record(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    damaged = record(recipe={"max_kl_mean_nats": "small", "min_same_top1": 2})
    refused(onecard("gate", write("r.json", damaged)), "r.json", "max_kl_mean_nats", "min_same_top1")


def test_the_measured_mean_decides_and_the_interval_is_told(onecard: Command, write: Callable[..., Path]) -> None:
    mean = record()["kl"]["kl_mean_nats"]
    limits = write("l.yaml", f"max_kl_mean_nats: {mean * 1.1}\n")
    found = line(onecard("gate", write("r.json", record()), "--limits", limits), 0)
    assert any("reaches over the limit" in note for note in found["notes"])
    assert found["checks"][0]["high"] > found["checks"][0]["allowed"] > found["checks"][0]["measured"]


def test_limits_that_cannot_be_judged_are_named_all_at_once(
    onecard: Command, write: Callable[..., Path], refused: Refuse
) -> None:
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
def test_a_bad_file_of_limits(
    onecard: Command, write: Callable[..., Path], refused: Refuse, text: str, needles: list[str]
) -> None:
    refused(onecard("gate", write("r.json", record()), "--limits", write("l.yaml", text)), *needles)


def test_a_recipe_is_a_file_of_limits(
    onecard: Command, write: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    """Only limits that the recipe names count, not its defaults: a record of `verify` has no fallbacks to judge."""
    verified = write("r.json", record(command="verify", fallbacks={}, blocks=[], recipe={}))
    assert set(checks(onecard("gate", verified, "--limits", recipe(min_same_top1=0.1)), 0)) == {"limit min_same_top1"}


def test_an_empty_choice_of_limits_is_none(
    onecard: Command, write: Callable[..., Path], recipe: Callable[..., Path], refused: Refuse
) -> None:
    refused(onecard("gate", write("r.json", record()), "--limits", recipe()), "names no limit", "--baseline")


def test_nothing_to_hold_it_against(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    refused(onecard("gate", write("r.json", record(recipe={}))), "--limits FILE or --baseline")


# --- what is written


def test_junit_summary_and_nothing_on_a_refusal(
    onecard: Command, write: Callable[..., Path], refused: Refuse, tmp_path: Path
) -> None:
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


def test_the_job_summary_of_github(
    onecard: Command, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    onecard("gate", write("r.json", record()))
    onecard("gate", write("r.json", record()))
    assert (tmp_path / "step.md").read_text().count("### onecard gate passed") == 2


def test_files_that_cannot_be_written_are_named_before_anything(
    onecard: Command, write: Callable[..., Path], refused: Refuse, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere" / "x"
    report = write("r.json", record())
    refused(onecard("gate", report, "--junit", nowhere, "--summary", tmp_path), "--junit", "--summary")
    refused(onecard("baseline", report, "-o", nowhere), "folder that exists")


def test_a_record_without_a_part(onecard: Command, write: Callable[..., Path], refused: Refuse) -> None:
    """A missing key means the same as an empty one."""
    bare = {key: value for key, value in record().items() if key != "kl"}
    refused(against(onecard, write, bare, record()), "KL is measured in only one of the two")


def test_it_says_when_no_limit_was_looked_at(onecard: Command, write: Callable[..., Path]) -> None:
    """A record of `verify` has no recipe. A CI that relies on its limits must be told."""
    found = line(against(onecard, write, record(recipe={}), record()), 0)
    assert any("no limits were looked at" in note for note in found["notes"])


def test_no_sign_before_nought(onecard: Command, write: Callable[..., Path]) -> None:
    found = checks(against(onecard, write, record(), record()), 0)["baseline same_top1"]
    assert "-0.00" not in found["said"]


def test_a_baseline_does_not_take_the_records_place(
    onecard: Command, write: Callable[..., Path], refused: Refuse
) -> None:
    report = write("r.json", record())
    before = report.read_bytes()
    refused(onecard("baseline", report, "-o", report), "r.json", "another file")
    assert report.read_bytes() == before
