"""How the house is laid out: its rooms, the floors that they stand on, and the arrows that imports draw between them.

    python tests/rooms.py                 the working tree
    python tests/rooms.py --at COMMIT     a commit, read from git without a checkout

A room is a top-level folder of the package, or a Python file in its root. An arrow leads from a room to another that it
imports. A room without arrows stands on floor 1; any other stands one floor above the highest room that it imports.
Rooms that import each other in a circle have no floor. Folders without package code (tests, docs, benchmarks, demo,
recipes) are not rooms. test_structure.py holds the layout with the functions of this file.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
NO_ROOMS = {"tests", "docs", "benchmarks", "demo", "recipes"}
NOT_OURS = {".venv", "build", "out"}  # folders that git ignores
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 8


@dataclass(frozen=True)
class Module:
    """One Python file; `path` is relative to the root of the repository."""

    path: PurePosixPath
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.path.parts[0].removesuffix(".py")

    @property
    def in_package(self) -> bool:
        return self.room not in NO_ROOMS

    @property
    def name(self) -> str:
        """Dotted, as Python imports it: onecard.core.scheme; a package goes by its folder's name."""
        parts = [*self.path.parts[:-1], self.path.stem]
        return ".".join(["onecard", *(part for part in parts if part != "__init__")])

    def imports(self, inside: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every import of our own code, in the whole file or in one node of it."""
        package = ["onecard", *self.path.parts[:-1]]
        for node in ast.walk(inside or self.tree):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                stem = [*base, *(node.module.split(".") if node.module else [])]
                names = [[*stem, alias.name] for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
            else:
                continue
            # The version stands in the package itself and is nobody's room.
            yield from ((node.lineno, ".".join(n)) for n in names if n[0] == "onecard" and n[1:2] != ["__version__"])

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def working_tree() -> list[Module]:
    """Every Python file of the repository as it lies on disk."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in NOT_OURS and not p.name.startswith(".")]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return [Module(PurePosixPath(path.relative_to(ROOT)), path.read_text()) for path in sorted(paths)]


def at_commit(commit: str) -> list[Module]:
    """Every Python file of a commit."""
    packed = subprocess.run(
        ["git", "archive", commit, "--", ":(glob)**/*.py"], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return [Module(PurePosixPath(name), file.read().decode()) for name, file in sorted(files.items()) if file]


def target(name: str, known: set[str]) -> str | None:
    """The module that an imported name is, or is taken from; none when it is the top package or not ours."""
    while name not in known:
        name, _, last = name.rpartition(".")
        if not last:
            return None
    return None if name == "onecard" else name


def arrows(modules: list[Module]) -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    package = [m for m in modules if m.in_package]
    found: dict[str, set[str]] = {m.room: set() for m in package if m.name != "onecard"}
    known = {m.name for m in package}
    for module in package:
        named = (target(name, known) for _, name in module.imports())
        found.setdefault(module.room, set()).update(name.split(".")[1] for name in named if name)
    found.pop("__init__", None)
    return {room: reached - {room} for room, reached in found.items()}


def module_arrows(modules: list[Module]) -> dict[str, set[str]]:
    """Module -> the other modules that it imports, in rooms only."""
    package = [m for m in modules if m.in_package]
    known = {m.name for m in package}
    named = {m.name: {target(name, known) for _, name in m.imports()} - {None, m.name} for m in package}
    return {name: {t for t in targets if t} for name, targets in named.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` imports, at first or at second hand."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that import each other, at first or at second hand."""
    below = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(n for n in below[node] if node in below.get(n, set())) for node in graph if node in below[node]}
    return sorted((set(group) for group in groups), key=sorted)


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the lowest first. Raises RecursionError when there is a circle."""
    height: dict[str, int] = {}

    def of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((of(below) for below in graph[room]), default=0)
        return height[room]

    found: list[list[str]] = [[] for _ in range(max(map(of, graph), default=0))]
    for room in sorted(graph):
        found[height[room] - 1].append(room)
    return found


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many it has, without self and cls."""
    given = function.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([n for n in named if n not in ("self", "cls")]) + (given.vararg is not None) + (given.kwarg is not None)


def long_functions(modules: list[Module]) -> list[str]:
    return [
        f"{m.path}:{f.lineno} {f.name}, {length(f)} lines"
        for m in modules
        for f in m.functions()
        if length(f) > MOST_LINES_OF_A_FUNCTION
    ]


def wide_functions(modules: list[Module]) -> list[str]:
    return [
        f"{m.path}:{f.lineno} {f.name}, {parameters(f)} parameters"
        for m in modules
        for f in m.functions()
        if parameters(f) > MOST_PARAMETERS
    ]


def long_files(modules: list[Module]) -> list[str]:
    lines = ((m.path, len(m.text.splitlines())) for m in modules)
    return [f"{path}, {count} lines" for path, count in lines if count > MOST_LINES_OF_A_FILE]


def skips(modules: list[Module]) -> int:
    """How often the formatter is told to keep off."""
    return sum(line.rstrip().endswith("# fmt: " + "skip") for m in modules for line in m.text.splitlines())


def root_files(modules: list[Module]) -> list[str]:
    return [str(m.path) for m in modules if len(m.path.parts) == 1]


def show(modules: list[Module], listed: bool) -> None:
    package, others = [m for m in modules if m.in_package], [m for m in modules if not m.in_package]
    graph = arrows(modules)
    found = circles(graph)
    for said, value in (
        ("rooms", len(graph)),
        ("floors", "none" if found else len(floors(graph))),
        ("arrows between rooms", sum(map(len, graph.values()))),
        ("circles of rooms", len(found)),
        ("circles of modules", len(circles(module_arrows(modules)))),
        ("files in the root", len(root_files(modules))),
        ("lines of a function, mean", f"{fmean(length(f) for m in package for f in m.functions()):.1f}"),
    ):
        print(f"{said:<29} {value:>4}")
    for said, measure in (
        (f"functions over {MOST_LINES_OF_A_FUNCTION} lines", long_functions),
        (f"functions over {MOST_PARAMETERS} parameters", wide_functions),
        (f"files over {MOST_LINES_OF_A_FILE} lines", long_files),
    ):
        print(f"{said:<29} {len(measure(package)):>4} in rooms, {len(measure(others)):>3} in tests and the like")
        for line in measure(modules) if listed else []:
            print(f"    {line}")
    print(f"{'told the formatter to skip':<29} {skips(package):>4} in rooms, {skips(others):>3} in tests and the like")
    for circle in found:
        print("circle:", ", ".join(sorted(circle)))
    for number, rooms in enumerate([] if found else floors(graph), 1):
        print(f"floor {number:>2}: {', '.join(rooms)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--at", metavar="COMMIT", help="measure this commit in place of the working tree")
    parser.add_argument("--list", action="store_true", help="name the functions and files over the bounds")
    given = parser.parse_args()
    show(at_commit(given.at) if given.at else working_tree(), given.list)


if __name__ == "__main__":
    main()
