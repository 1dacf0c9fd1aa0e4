"""What a CI gets: the shipped workflow and action, and a verdict as XML, Markdown and a card with any names."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

import onecard
from gate_records import record
from onecard.cli import main
from onecard.core.record.verdict import LIMIT, Check, verdict_of
from onecard.report.gate_card import draw_verdict, markdown
from onecard.report.junit import junit

ROOT = Path(onecard.__file__).parent
ACTION = ROOT / ".github" / "actions" / "onecard-gate" / "action.yml"
WORKFLOW = ROOT / "docs" / "ci" / "onecard-gate.yml"
OURS = "./.github/actions/onecard-gate"


def steps_of(path: Path) -> list[dict[str, Any]]:
    """The steps of a workflow with one job, or of a composite action."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "runs" in data:
        return list(data["runs"]["steps"])
    (job,) = data["jobs"].values()
    return list(job["steps"])


def commands_of(path: Path) -> list[list[str]]:
    """What the shell steps call `onecard` with."""
    scripts = [step.get("run", "").replace("\\\n", " ") for step in steps_of(path)]
    words = [shlex.split(line.partition(">")[0]) for script in scripts for line in script.splitlines()]
    return [line[1:] for line in words if line[:1] == ["onecard"]]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (WORKFLOW, ["actions/checkout", "actions/setup-python", OURS, "actions/upload-artifact"]),
        (ACTION, ["actions/setup-python"]),
    ],
    ids=["workflow", "action"],
)
def test_actions_are_pinned_to_commits(path: Path, names: list[str]) -> None:
    uses = [step["uses"] for step in steps_of(path) if "uses" in step]
    assert [use.partition("@")[0] for use in uses] == names
    assert all(re.fullmatch(r"[0-9a-f]{40}", use.partition("@")[2]) for use in uses if use != OURS)


def check(name: str, passed: bool, said: str) -> Check:
    return Check(name=name, kind=LIMIT, passed=passed, measured=1.0, allowed=float(passed), said=said)


def test_the_workflow_uses_what_there_is() -> None:
    """Every command and option in it is one of ours, and so is every input that it gives the action."""
    ours = [*commands_of(WORKFLOW), *commands_of(ACTION)]
    assert [words[0] for words in ours] == ["quantize", "baseline", "gate"]
    for verb, *words in ours:
        context = main.commands[verb].make_context(verb, words)
        assert context.params
    inputs = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["inputs"]
    (gate,) = [step for step in steps_of(WORKFLOW) if step.get("uses") == OURS]
    required = {name for name, about in inputs.items() if about.get("required")}
    assert required <= set(gate["with"]) <= set(inputs)


def test_the_action_is_whole() -> None:
    """By GitHub's schema of a composite action; every input is used, and what is used is there."""
    text = ACTION.read_text(encoding="utf-8")
    action = yaml.safe_load(text)
    assert set(action) == {"name", "description", "inputs", "outputs", "runs"}
    assert set(action["runs"]) == {"using", "steps"}
    assert action["runs"]["using"] == "composite"
    for about in action["inputs"].values():
        assert set(about) <= {"description", "required", "default"}
        assert about["description"]
        assert about.get("required") or isinstance(about["default"], str)
    for step in action["runs"]["steps"]:
        assert set(step) <= {"name", "id", "if", "uses", "with", "shell", "env", "run"}
        assert ("run" in step) != ("uses" in step)
        assert ("shell" in step) == ("run" in step)
        # What a user gives reaches the shell as a variable, never as text of the script.
        assert "${{" not in step.get("run", "")
    assert set(re.findall(r"\binputs\.([\w-]+)", text)) == set(action["inputs"])
    ids = {step["id"]: step for step in action["runs"]["steps"] if "id" in step}
    for name, about in action["outputs"].items():
        found = re.fullmatch(r"\$\{\{ steps\.([\w-]+)\.outputs\.([\w-]+) \}\}", about["value"])
        assert found is not None
        assert found[2] == name
        assert f"{name}=" in ids[found[1]]["run"]


@dataclass(frozen=True)
class Ran:
    """What a step left: its exit code, the action's outputs, and the job's summary."""

    code: int
    outputs: dict[str, str]
    summary: str


def run_gate_step(folder: Path, inputs: dict[str, str]) -> Ran:
    """The action's gate step in bash, as GitHub runs it: -e, pipefail, its files in the environment."""
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    (step,) = [step for step in action["runs"]["steps"] if step.get("id") == "gate"]
    given = {name: about.get("default", "") for name, about in action["inputs"].items()} | inputs
    variables = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], value)
        for name, value in step["env"].items()
    }
    for name in ("bin", "files"):
        (folder / name).mkdir(exist_ok=True)
    program = folder / "bin" / "onecard"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onecard "$@"\n')
    program.chmod(0o755)
    outputs, summary = folder / "files" / "output", folder / "files" / "summary"
    outputs.write_text("")
    summary.write_text("")
    environment = os.environ | variables
    environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment |= {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary)}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    pairs = [line.partition("=") for line in outputs.read_text().splitlines()]
    return Ran(done.returncode, {name: value for name, _, value in pairs}, summary.read_text())


def test_the_actions_step_judges_a_record(tmp_path: Path) -> None:
    """Passed, failed, failed without failing the job, and unusable: exit code, outputs and files."""
    report, baseline, limits = tmp_path / "a report; touch pwned.json", tmp_path / "baseline.json", tmp_path / "l.yaml"
    report.write_text(json.dumps(record()))
    baseline.write_text(json.dumps(record()))
    limits.write_text("max_kl_mean_nats: 0.000001\n")
    passed = run_gate_step(
        tmp_path, {"report": str(report), "baseline": str(baseline), "junit": "gate.xml", "json": "gate.json"}
    )
    assert (passed.code, passed.outputs) == (0, {"passed": "true", "exit-code": "0"})
    assert "onecard gate passed" in passed.summary
    assert ElementTree.parse(tmp_path / "gate.xml").find("./testsuite/testcase") is not None
    assert json.loads((tmp_path / "gate.json").read_text())["passed"] is True
    failing = {"report": str(report), "limits": str(limits), "summary": "own.md"}
    failed = run_gate_step(tmp_path, failing)
    assert (failed.code, failed.outputs) == (1, {"passed": "false", "exit-code": "1"})
    assert failed.summary == ""
    assert "onecard gate failed" in (tmp_path / "own.md").read_text()
    told = run_gate_step(tmp_path, failing | {"fail": "false"})
    assert (told.code, told.outputs) == (0, {"passed": "false", "exit-code": "1"})
    unusable = run_gate_step(tmp_path, {"report": "nowhere.json"})
    assert (unusable.code, unusable.outputs) == (2, {"passed": "false", "exit-code": "2"})
    assert not (tmp_path / "pwned.json").exists()


def test_the_dockerfile_installs_what_was_tested_and_runs_as_nobody_special() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER (?!root|0\b)\S+$", lines, re.MULTILINE)
    assert 'ENTRYPOINT ["onecard"]' in lines
    assert "-c constraints.txt" in lines
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_hostile_names_stay_text() -> None:
    """A task or a path may hold markup, control characters, or a lone surrogate; nobody downstream may act on it."""
    name = 'x"><script>|a|b\x00\x1b[31m\ud800 ]]> &amp; [red]'
    verdict = verdict_of(name, name, [check(name, False, f"{name}\nsecond line")], [name])
    root = ElementTree.fromstring(junit(verdict))
    assert root.find("./testsuite/testcase").get("name").startswith('x"><script>|a|b')  # type: ignore[union-attr]
    shown = markdown(verdict).encode().decode()
    table = [row for row in shown.splitlines() if row.startswith("| ")]
    assert "<script>" not in shown
    assert [row.replace("\\|", "").count("|") for row in table] == [4] * len(table)
    console = Console(record=True, width=200)
    draw_verdict(verdict_of("[bold]r\x1b[2J", None, [check("[red]n", True, "[blue]s")], []), console)
    text = console.export_text()
    assert "\x1b" not in text
    assert all(part in text for part in ("[bold]r", "[red]n", "[blue]s"))
