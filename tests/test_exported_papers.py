"""An exported folder's papers describe its own files: its card, the engines on it, its plan."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from command_line import run_onecard
from inputs import write_recipe
from onecard.checkpoint.source import open_folder
from onecard.conversion import export
from onecard.report.engines import engines

SAID = ("--base-model", "somebody/baby", "--license", "apache-2.0")


def card(folder: Path, *more: object) -> str:
    done = run_onecard("card", folder, *SAID, *more, "-o", folder.parent / "card.md")
    assert done.exit_code == 0, done.output
    return (folder.parent / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["gptq", "bf16"])
def test_the_card_says_on_which_files_it_was_measured(
    form: str, emitted: Callable[..., tuple[Path, Result]], tmp_path: Path
) -> None:
    """Its record has the parent's KL until a record of its own files is named."""
    parent, out = emitted("scout")[0], tmp_path / "exported"
    assert run_onecard("export", parent, "--format", form, "-o", out).exit_code == 0
    text = card(out)
    assert "Not measured on these files, but on the compressed-tensors pack-quantized files" in text
    assert "Measured by walking the original and these files" not in text
    assert "They pass the gate" not in text
    assert f"onecard export OUT --format {form} -o EXPORTED" in text
    record = json.loads((out / "onecard.json").read_text(encoding="utf-8"))
    later = {key: record[key] for key in ("onecard", "schema_version", "model", "texts", "kl")}
    later |= {"command": "verify", "checkpoint": {"digest": open_folder(out).digest}}
    (tmp_path / "later.json").write_text(json.dumps(later), encoding="utf-8")
    text = card(out, "--record", tmp_path / "later.json")
    assert "Measured by walking the original and these files" in text
    assert "Not measured on these files" not in text


def test_an_export_is_published_only_with_a_measurement_of_its_own(
    emitted: Callable[..., tuple[Path, Result]], tmp_path: Path
) -> None:
    parent, out = emitted("scout")[0], tmp_path / "exported"
    assert run_onecard("export", parent, "--format", "bf16", "-o", out).exit_code == 0
    line = ("publish", out, "somebody/baby", *SAID, "--dry-run")
    refused = run_onecard(*line)
    assert refused.exit_code == 2, refused.output
    assert "measured on the compressed-tensors pack-quantized files" in refused.stderr
    record = json.loads((out / "onecard.json").read_text(encoding="utf-8"))
    later = {key: record[key] for key in ("onecard", "schema_version", "model", "texts", "kl")}
    later |= {"command": "verify", "checkpoint": {"digest": open_folder(out).digest}}
    (tmp_path / "later.json").write_text(json.dumps(later), encoding="utf-8")
    assert "measured on the" not in run_onecard(*line, "--record", tmp_path / "later.json").stderr
    page = tmp_path / "page.html"
    assert run_onecard("report", out, "-o", page).exit_code == 0
    assert "not on the exported ones" in page.read_text(encoding="utf-8")


def test_a_run_whose_recipe_names_the_format_was_measured_on_its_own_files(
    baby: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", method="rtn", format="bf16")
    out = tmp_path / "out"
    assert run_onecard("quantize", baby("llama4-text"), out, "--recipe", recipe, *texts[2:]).exit_code == 0
    assert "Measured by walking the original and these files" in card(out)


def test_no_engine_is_named_that_refuses_the_format() -> None:
    """vLLM reads only version 1 of GPTQ's layout (docs/engines.md, gptq-types)."""
    assert "vLLM" in [engine for engine, _, _ in engines("llama4", {}, True, {}, "gptq")]
    assert "vLLM" not in [engine for engine, _, _ in engines("llama4", {}, True, {}, "gptq-v2")]


def test_a_plan_of_gptqs_layout_says_nothing_of_scales_that_are_not_permuted(
    baby: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    """q and k are in 16 bits there, so any vLLM loads it. In compressed-tensors their scales need a newer one."""
    recipe = write_recipe(tmp_path / "recipe.yaml", method="rtn", quantize_roles=["expert", "attention"])
    source, out = tmp_path / "int4", tmp_path / "gptq"
    assert run_onecard("quantize", baby("llama4-text"), source, "--recipe", recipe, *texts[2:]).exit_code == 0
    assert run_onecard("export", source, "--format", "gptq", "-o", out).exit_code == 0
    for folder, told in ((source, True), (out, False)):
        done = run_onecard("plan", folder, "--gpu", "l40s", "--context", 128, "--json")
        assert done.exit_code == 0, done.stderr
        assert any("35033" in warning for warning in json.loads(done.stdout)["fit_warnings"]) == told


def test_a_stopped_export_says_how_to_go_on(
    emitted: Callable[..., tuple[Path, Result]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    line = ("export", emitted("scout")[0], "--format", "bf16", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(export, "write_sums", stop)
        stopped = run_onecard(*line)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert "--overwrite" in stopped.stderr
    assert run_onecard(*line, "--overwrite").exit_code == 0
