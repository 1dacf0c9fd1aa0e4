"""What a CI gets: the shipped workflow, and a verdict drawn as XML, Markdown and a card whatever its names hold."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import yaml
from rich.console import Console

import onecard
from onecard.cli import main
from onecard.core.record.verdict import LIMIT, Check, verdict_of
from onecard.report.gate_card import draw_verdict, markdown
from onecard.report.junit import junit


def check(name: str, passed: bool, said: str) -> Check:
    return Check(name=name, kind=LIMIT, passed=passed, measured=1.0, allowed=float(passed), said=said)


def test_the_workflow_uses_what_there_is() -> None:
    """It parses, its actions are pinned to commits, and every command and option in it is one of ours."""
    path = Path(onecard.__file__).parent / "docs" / "ci" / "onecard-gate.yml"
    workflow = yaml.safe_load(path.read_text())
    (job,) = workflow["jobs"].values()
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [use.partition("@")[0] for use in uses] == [
        "actions/checkout",
        "actions/setup-python",
        "actions/upload-artifact",
    ]
    assert all(re.fullmatch(r"[0-9a-f]{40}", use.partition("@")[2]) for use in uses)
    commands = [
        shlex.split(line.partition(">")[0]) for step in job["steps"] for line in step.get("run", "").splitlines()
    ]
    ours = [words[1:] for words in commands if words[:1] == ["onecard"]]
    assert [words[0] for words in ours] == ["quantize", "gate", "baseline"]
    for verb, *words in ours:
        context = main.commands[verb].make_context(verb, words)
        assert context.params


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
