"""Limits in a recipe: a run that exceeds them, and the gate on records of real runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]


def line(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output + repr(result.exception)
    return dict(json.loads(result.stdout))


def test_quantize_past_its_limits_keeps_the_checkpoint_and_ends_in_1(
    baby: Callable[..., Path], onecard: Run, recipe: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    """The run finishes everything, and its record and the gate say that it failed. So does the same run, resumed."""
    use = recipe(method="rtn", max_kl_mean_nats=1e-9, max_kl_p99_nats=1e9, fail_below_expert_rows=0)
    command = ["quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, *texts]
    for arguments in (command, [*command, "--resume"]):
        result = onecard(*arguments)
        assert result.exit_code == 1, result.output
        assert "max_kl_mean_nats: " in result.stderr.partition("error: ")[2]
        assert "max_kl_p99_nats" not in result.stderr.partition("error: ")[2]
        assert json.loads(result.stdout)["kl_mean_nats"] > 1e-9
        assert onecard("inspect", tmp_path / "out").exit_code == 0
    gate = json.loads((tmp_path / "out" / "onecard.json").read_text())["gate"]
    assert gate["passed"] is False
    assert [check["name"] for check in gate["checks"] if not check["passed"]] == ["max_kl_mean_nats"]
    assert line(onecard("gate", tmp_path / "out"), 1)["checks"] == gate["checks"]


def test_a_real_record_against_itself_and_within_its_limits(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Run,
    texts: list[str],
    tmp_path: Path,
) -> None:
    """The gate judges quantize's record and verify's record alike."""
    folder, _ = emitted("qwen3")
    verified = tmp_path / "verified.json"
    recipe = folder.parent / "recipe.yaml"
    arguments = [baby("qwen3"), folder, "--recipe", recipe, "--record", verified, *texts[2:]]
    assert onecard("verify", *arguments).exit_code == 0
    found = line(onecard("gate", verified, "--baseline", folder, "--tolerance", 0), 0)["checks"]
    assert [check["name"] for check in found] == ["kl_mean_nats", "same_top1"]
    assert [check["change"] for check in found] == [pytest.approx(0, abs=1e-9), 0]
    assert all(check["paired"] for check in found)


def test_bytes_are_refused_before_anything_is_written(
    refuse: Callable[..., str], baby: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    refuse(baby("qwen3"), "max_emitted_bytes", "the recipe allows 1,000", use=recipe(max_emitted_bytes=1000), code=1)


def test_a_flip_limit_needs_tasks(
    refuse: Callable[..., str], baby: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    refuse(baby("qwen3"), "max_flip_rate needs tasks", use=recipe(max_flip_rate=0.1))
