"""The Python API: lazy, typed, silent, and `onecard.quantize` the function whatever was imported before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onecard
from onecard.core.errors import InputError

HEAVY = "{'torch', 'transformers', 'datasets', 'scipy', 'pydantic', 'yaml', 'click', 'rich', 'numpy'}"
PACKAGE = Path(onecard.__file__).parent
DOCUMENT = PACKAGE / "docs" / "api.md"


def python(code: str, folder: Path | str = "/") -> subprocess.CompletedProcess[str]:
    """Runs the code in a process of its own, with the package that is under test."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_import_loads_no_library() -> None:
    done = python(f"import onecard, sys; found = {HEAVY} & set(sys.modules); assert not found, found")
    assert done.returncode == 0, done.stderr


def test_recipes_and_errors_need_no_torch() -> None:
    code = "from onecard import Recipe, OnecardError, load_recipe; load_recipe('demo'); import sys"
    done = python(f"{code}; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


ORDERS = [
    "pass",
    "import onecard.quantize",
    "import onecard.quantize.gptq",
    "from onecard.quantize import gptq",
    "from onecard.quantize.gptq import gptq",
    "import onecard.pipeline",
    "import onecard.api",
    "import importlib; importlib.import_module('onecard.quantize.grid')",
]


def test_quantize_is_the_function_whatever_was_imported_before() -> None:
    code = f"""
import sys, types
for before in {ORDERS!r}:
    for name in [name for name in sys.modules if name.partition('.')[0] == 'onecard']:
        del sys.modules[name]
    exec(before, dict())
    from onecard import quantize
    import onecard
    assert isinstance(quantize, types.FunctionType) and quantize.__module__ == 'onecard.api', before
    import onecard.quantize.gptq
    from onecard.quantize import gptq
    from onecard.quantize.gptq import gptq as run
    assert isinstance(gptq, types.ModuleType) and gptq.gptq is run, before
    from onecard import quantize as again
    assert again is quantize and onecard.quantize is quantize, before
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_no_other() -> None:
    verbs = ["check", "export", "flips", "gate", "inspect", "plan", "quantize", "verify"]
    names = [*verbs, "load_recipe", "Recipe", "OnecardError", "open_twin"]
    assert set(names) <= set(dir(onecard))
    for name in names:
        assert f"`{name}" in DOCUMENT.read_text(encoding="utf-8"), name
        assert callable(getattr(onecard, name))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = onecard.quantise


def test_mypy_sees_the_signatures(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "from onecard import Recipe, load_recipe, plan, quantize\n"
        "recipe: Recipe = load_recipe('demo')\n"
        "reveal_type(quantize('demo', 'out', recipe, device='cpu'))\n"
        "reveal_type(plan('demo', gpu='h200').fits)\n"
        "quantize('demo', 'out', recipe, devise='cpu')\n"
    )
    (tmp_path / "types").mkdir()
    (tmp_path / "types" / "onecard").symlink_to(PACKAGE)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nmypy_path = types\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,scipy.*,numpy.*,lm_eval.*]\n"
        "follow_imports = skip\nignore_missing_imports = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "onecard.core.record.schema.Record" in said, said
    assert "bool | None" in said, said
    assert "devise" in said, said
    assert "Found 1 error" in said, said


def test_the_example_of_the_document_runs_and_prints_only_what_it_prints(tmp_path: Path) -> None:
    example = blocks()[0]
    done = python(example + "\nassert again.kl.kl_mean_nats == record.kl.kl_mean_nats\n", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    family, emitted, kl = done.stdout.splitlines()
    assert family == "llama4 16"
    assert int(emitted) > 0
    assert 0 < float(kl) < 1
    assert (tmp_path / "demo-gptq" / "config.json").is_file()


def test_the_other_example_is_python() -> None:
    for block in blocks():
        compile(block, str(DOCUMENT), "exec")


def test_paths_and_recipes_in_every_spelling(tmp_path: Path) -> None:
    demo = Path(onecard.__file__).parent / "demo" / "model"
    assert onecard.inspect(demo)["family"] == onecard.inspect(str(demo))["family"] == "llama4"
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\ndescription: own\nmethod: rtn\nevaluation: {source: demo}\n")
    plans = [onecard.plan(demo, use).quantizing for use in (mine, str(mine), onecard.load_recipe(mine))]
    assert len({found.emitted_bytes for found in plans if found is not None}) == 1
    assert onecard.plan(demo, gpu="rtx-4090", context=128).fits
    assert onecard.plan(demo).fits is None


def test_errors_are_the_kinds_of_the_command_line(tmp_path: Path) -> None:
    for wrong in (
        lambda: onecard.inspect(tmp_path / "none"),
        lambda: onecard.quantize("demo", tmp_path / "out", "nosuch"),
        lambda: onecard.quantize("demo", tmp_path / "out", "rtn-int4", prices="p.json"),
        lambda: onecard.plan("demo", gpu="abacus"),
        lambda: onecard.export("demo", "zip", tmp_path / "out"),
        lambda: onecard.gate(tmp_path),
        lambda: onecard.check(tmp_path / "none"),
    ):
        with pytest.raises(onecard.OnecardError) as found:
            wrong()
        assert isinstance(found.value, InputError)
