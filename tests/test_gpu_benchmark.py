"""benchmarks/gpu.py, which a person with a card runs, goes through its steps without one, in tiny shapes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_and_the_demo_go_through_on_a_cpu(tmp_path: Path) -> None:
    """In Triton's interpreter; and a run twice, and one that is killed and resumed."""
    pytest.importorskip("triton")
    command = [sys.executable, str(SCRIPT), "kernels", "demo", "--device", "cpu", "--small", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["ok"], line["left"]) == (True, [])
    said = {check["check"].partition(":")[0]: check for part in line["parts"].values() for check in part["checks"]}
    assert all(check["ok"] for check in said.values())
    assert {"gptq", "refine, sweep", "restart", "tabu", "searched_scales", "quadratic", "RoutedExperts twice"} <= {
        *said
    }
    assert said["killed and resumed"]["seen"].startswith("at 50%")


def main(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args])
    return int(gpu.main())


def test_without_a_card_there_is_one_message(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(gpu, monkeypatch, "all") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("there is no CUDA card")
    assert err.count("\n") == 1


def test_all_goes_on_where_its_time_was_over(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A part that broke down is told and does not stop the others; a part that has ended is not run again."""
    ran = []

    def part(name: str, ends: str) -> Any:
        def work(setup: Any) -> dict[str, Any]:
            ran.append(name)
            if ends == "badly":
                raise RuntimeError("the card is gone")
            return {"ok": True, "table": f"table of {name}"}

        return work

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "BUDGETS", {"kernels": 60, "demo": 60, "blocks": 600})
    parts = {"kernels": part("kernels", "well"), "demo": part("demo", "badly"), "blocks": part("blocks", "well")}
    monkeypatch.setattr(gpu, "parts_of", lambda names: parts)
    assert main(gpu, monkeypatch, "all", "--minutes", "2", "--folder", str(tmp_path)) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ran == ["kernels", "demo"]
    assert (line["left"], line["parts"]["demo"]["error"]) == (["blocks"], "the card is gone")
    assert main(gpu, monkeypatch, "all", "--minutes", "9", "--folder", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert ran == ["kernels", "demo", "blocks"]
    assert "table of kernels" in out
    assert json.loads(out.splitlines()[-1])["left"] == []
