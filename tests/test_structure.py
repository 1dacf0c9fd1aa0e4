"""The layout of the house: imports run down only, and the command line answers before torch is loaded.

rooms.py says what a room is and measures it. Rooms on one floor do not import each other.
"""

import ast
import subprocess
import sys

import pytest

import rooms
from rooms import Module

# From the ground up: each room imports only rooms on the floors before it.
FLOORS = [
    ["core"],
    ["models", "quantize", "recipe", "report"],
    ["checkpoint"],
    ["calibration", "conversion", "planner", "publish"],
    ["blocks", "eval"],
    ["bits", "stages"],
    ["forecast", "pipeline"],
    ["api", "commands"],
    ["cli"],
    ["__main__"],
]
MOST_FLOORS = 10
MOST_ROOT_FILES = 8
FLOOR = {room: floor for floor, row in enumerate(FLOORS) for room in row}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return rooms.working_tree()


def test_every_room_has_a_floor_and_imports_only_from_below(modules: list[Module]) -> None:
    assert len(FLOORS) <= MOST_FLOORS
    arrows = rooms.arrows(modules)
    assert arrows.keys() == FLOOR.keys()
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules
        if module.in_package and module.name != "onecard"
        for line, name in module.imports()
        if (below := name.split(".")[1]) != module.room and FLOOR.get(below, MOST_FLOORS) >= FLOOR[module.room]
    ]
    assert wrong == []
    # The floors say that no room imports demo/ or benchmarks/. demo/ imports rooms only, and benchmarks/ may use it.
    may = {"demo": {"demo"}, "benchmarks": {"benchmarks", "demo"}}
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules
        for line, name in module.imports()
        if module.room in may and name.split(".")[1] not in FLOOR.keys() | may[module.room]
    ]
    assert wrong == []


def test_no_circle_and_few_files_in_the_root(modules: list[Module]) -> None:
    assert rooms.circles(rooms.arrows(modules)) == []
    assert rooms.circles(rooms.module_arrows(modules)) == []
    assert len(rooms.root_files(modules)) <= MOST_ROOT_FILES


def test_rooms_are_measured_as_they_are() -> None:
    """Three rooms: one imports the two others, in two spellings; then they import each other."""
    texts = {
        "__init__.py": "__version__ = '1'",
        "core/x.py": "import json",
        "eval/__init__.py": "",
        "eval/y.py": "from ..core import x\nfrom .. import __version__\nfrom .z import a",
        "eval/z.py": "a = 1",
        "cli.py": "import onecard.core.x\ndef f():\n    from .eval import y",
        "tests/test_x.py": "import onecard.cli",
    }
    made = [Module(rooms.PurePosixPath(path), text) for path, text in texts.items()]
    assert rooms.arrows(made) == {"core": set(), "eval": {"core"}, "cli": {"core", "eval"}}
    assert rooms.floors(rooms.arrows(made)) == [["core"], ["eval"], ["cli"]]
    assert rooms.circles(rooms.module_arrows(made)) == []
    made[1] = Module(made[1].path, "from ..eval.z import a")
    assert rooms.circles(rooms.arrows(made)) == [{"core", "eval"}]
    assert rooms.circles(rooms.module_arrows(made)) == []


def test_only_verbs_import_our_own_code_inside_a_function(modules: list[Module]) -> None:
    inside = [
        f"{module.path}:{line}"
        for module in modules
        if module.room not in ("tests", "docs")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for line, _ in module.imports(node)
    ]
    # A peer's script runs in the peer's environment, where onecard need not be installed.
    allowed = ("commands/", "benchmarks/peers/with_")
    assert [where for where in inside if not where.startswith(allowed)] == []
    assert inside, "the verbs import inside"


def makes_json(node: ast.AST) -> bool:
    """`x.dumps`, an encoder, pydantic's own JSON, `json.dump`, or a name taken out of the module json."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "json"
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr in ("dumps", "JSONEncoder", "model_dump_json") or ast.unparse(node) == "json.dump"


def test_only_one_module_makes_json(modules: list[Module]) -> None:
    """`json.dumps` writes NaN unless it is told not to, and so does every other way to make JSON in Python."""
    code = [m for m in modules if m.room not in rooms.NO_ROOMS]
    made = [str(m.path) for m in code for node in ast.walk(m.tree) if makes_json(node)]
    assert made == ["core/json_text.py"]


def test_packages_have_empty_init_files_and_modules_say_what_they_do(modules: list[Module]) -> None:
    code = [m for m in modules if m.room not in ("tests", "docs") and m.name != "onecard"]
    inits = [m for m in code if m.path.name == "__init__.py"]
    assert len(inits) > 8
    assert [str(m.path) for m in inits if m.text] == []
    assert [str(m.path) for m in code if m.text and not ast.get_docstring(m.tree)] == []


def test_the_formatter_decides(modules: list[Module]) -> None:
    assert rooms.skips(modules) == 0


def test_the_command_line_loads_no_torch_before_a_verb_needs_it() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'compressed_tensors', 'bitsandbytes', 'accelerate'}"
    code = f"import onecard.cli, sys; found = {heavy} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
