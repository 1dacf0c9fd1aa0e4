"""The house keeps its floors: imports run down only, and the command line answers before torch is loaded.

A room is a folder of the package, or a Python file in its root. Rooms on one floor do not import each other. Nobody
imports demo/ or benchmarks/.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onecard

ROOT = Path(onecard.__file__).parent
FLOORS = [
    ["core"],
    ["models", "quantize", "recipe", "report"],
    ["checkpoint"],
    ["calibration", "conversion", "planner", "publish"],
    ["blocks", "eval"],
    ["bits", "stages"],
    ["forecast", "pipeline"],
    ["commands"],
    ["cli"],
    ["__main__"],
    ["demo"],
    ["benchmarks"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = {".venv", "build", "tests", "docs", "recipes", "out"}  # no code of the package


def sources(pattern: str = "*.py") -> list[Path]:
    """Python files of the package, but the top __init__.py; folders that are no code are not even entered."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in OUTSIDE and not p.name.startswith(".")]
    found = [p for p in ROOT.glob(pattern) if p.name != "__init__.py"] + [p for f in folders for p in f.rglob(pattern)]
    return sorted(found)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def own_imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of our own code; the version in onecard itself is nobody's room."""
    package = ["onecard", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            names = [[*stem, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "onecard" and name[1:2] != ["__version__"]:
                yield node.lineno, name[1]


def test_imports_run_one_way() -> None:
    found = set()
    for path in sources():
        for line, imported in own_imports(path, ast.parse(path.read_text())):
            here = room(path)
            found.add(here)
            below = imported == here or FLOOR[imported] < FLOOR[here]
            assert below, f"{path.relative_to(ROOT)}:{line} ({here}) imports {imported}"
    assert {"cli", "pipeline", "blocks", "models", "eval"} <= found, "the test looks at the package"


def test_no_import_of_our_own_inside_a_function_but_in_the_command_line() -> None:
    inside = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside += [f"{path.relative_to(ROOT)}:{line}" for line, _ in own_imports(path, node)]
    # A peer's script runs in the peer's environment, where onecard need not be.
    allowed = ("commands/", "benchmarks/peers/with_")
    assert [where for where in inside if not where.startswith(allowed)] == []
    assert inside, "the verbs import inside"


def test_packages_have_empty_init_files_and_modules_say_what_they_do() -> None:
    inits = [*sources("__init__.py"), ROOT / "recipes" / "__init__.py"]
    assert len(inits) > 8
    assert [str(p) for p in inits if p.read_text()] == []
    assert [str(p) for p in sources() if p.read_text() and not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_the_command_line_loads_no_torch_before_a_verb_needs_it() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'compressed_tensors', 'bitsandbytes', 'accelerate'}"
    code = f"import onecard.cli, sys; found = {heavy} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
