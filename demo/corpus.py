"""Makes the demo model's documents from the standard library of the running Python.

Every Python has its library as source files, so the model can be trained and measured on real code and prose without a
download. A module gives documents of three kinds: "code" (its source, cut at blank lines before an unindented line or a
method), "prose" (its docstrings in order) and "conversation" (questions about its names, answered from docstrings,
signatures and source). A hash of a module's name decides whether it is for training, calibration or evaluation, so no
two of them share a module. All randomness is seeded: the same Python gives the same documents. No tokenizer and no
torch is needed here.
"""

import ast
import hashlib
import inspect
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests, tools, generated tables and packages are left out.
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "turtledemo", "encodings", "__pycache__")
)
# One part in 16 of the modules is for evaluation, one for calibration, the rest for training.
HELD_OUT_PARTS = 16
# Aimed size of a document: 300 to 700 tokens of about 3 bytes.
BYTES_LEAST, BYTES_MOST = 900, 2300

# A line of a JSONL file: a document, a question or a caption.
JsonRow = dict[str, Any]


@dataclass(frozen=True)
class Entity:
    """A public function, class or method, about which questions can be asked."""

    module: str
    # Dotted inside the module: "dedent", "Template.substitute".
    name: str
    is_class: bool
    arguments: tuple[str, ...]
    methods: tuple[str, ...]
    doc: str
    source: str


@dataclass(frozen=True)
class Module:
    name: str
    source: str
    doc: str
    entities: tuple[Entity, ...]

    @property
    def split(self) -> str:
        return split_of(self.name)


def split_of(name: str) -> str:
    """train, calibration or evaluation, by the name alone: other modules do not change it."""
    part = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_PARTS
    return "evaluation" if part == 0 else "calibration" if part == 1 else "train"


def digest(row: JsonRow, folder: Path | None = None) -> str:
    """SHA-256 of a row's text or messages, without its id. The bytes of images count, not their paths."""
    content: JsonRow = {"text": row.get("text"), "messages": []}
    for message in row.get("messages", []):
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [
                hashlib.sha256(((folder or Path()) / part["path"]).read_bytes()).hexdigest()
                if part["type"] == "image"
                else part["text"]
                for part in parts
            ]
        content["messages"].append([message["role"], parts])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_jsonl(path: Path) -> list[JsonRow]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def without_pictures(rows: list[JsonRow]) -> list[JsonRow]:
    """The rows that every quantizer can read: some of the compared ones read text only."""
    return [row for row in rows if row["kind"] != "image"]


def write_jsonl(path: Path, rows: list[JsonRow]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_plain_texts(folder: Path) -> dict[str, Path]:
    """The embedded calibration and evaluation texts without pictures, as files in `folder`."""
    paths = {which: folder / f"{which}.jsonl" for which in ("calibration", "evaluation")}
    for which, path in paths.items():
        write_jsonl(path, without_pictures(read_jsonl(Path(__file__).parent / "data" / f"{which}.jsonl")))
    return paths


def _entity(module: str, prefix: str, node: ast.AST, source_lines: list[str]) -> Entity | None:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return None
    arguments: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    if isinstance(node, ast.ClassDef):
        functions = (n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
        methods = tuple(dict.fromkeys(n.name for n in functions if not n.name.startswith("_")))
    else:
        spec = node.args
        arguments = tuple(a.arg for a in spec.posonlyargs + spec.args + spec.kwonlyargs if a.arg not in ("self", "cls"))
    source = inspect.cleandoc("\n" + "\n".join(source_lines[node.lineno - 1 : node.end_lineno]))
    doc = ast.get_docstring(node) or ""
    return Entity(module, prefix + node.name, isinstance(node, ast.ClassDef), arguments, methods, doc, source)


def _parse(name: str, source: str) -> Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes
        tree = ast.parse(source)
    lines = source.splitlines()
    entities: list[Entity] = []
    for node in tree.body:
        entity = _entity(name, "", node, lines)
        if entity is None:
            continue
        entities.append(entity)
        if isinstance(node, ast.ClassDef):
            inner = (_entity(name, f"{node.name}.", child, lines) for child in node.body)
            entities.extend(e for e in inner if e is not None and not e.is_class)
    return Module(name, source, ast.get_docstring(tree) or "", tuple(entities))


def modules(root: Path | None = None) -> list[Module]:
    """The modules of the standard library that make documents, in the order of their names."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8", errors="replace")
        if name and name != "pydoc_data.topics" and len(source) >= 400:
            found.append(_parse(name, source.expandtabs(8)))
    return found


def topics(root: Path | None = None) -> list[tuple[str, str]]:
    """The language reference that pydoc shows, as (topic, text)."""
    path = (root or Path(sysconfig.get_path("stdlib"))) / "pydoc_data" / "topics.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return [(str(ast.literal_eval(k)), str(ast.literal_eval(v))) for k, v in pairs if k is not None]
    return []


def _cut(text: str, boundary: str, rng: random.Random) -> Iterator[str]:
    """Pieces of BYTES_LEAST to about BYTES_MOST characters, cut where `boundary` matches."""
    piece, aim = "", rng.randint(BYTES_LEAST, BYTES_MOST)
    for part in re.split(boundary, text):
        if len(piece) + len(part) > BYTES_MOST and len(piece) >= BYTES_LEAST:
            yield piece.strip("\n")
            piece, aim = "", rng.randint(BYTES_LEAST, BYTES_MOST)
        piece += part
        if len(piece) >= aim:
            yield piece.strip("\n")[: 2 * BYTES_MOST]
            piece, aim = "", rng.randint(BYTES_LEAST, BYTES_MOST)
    if len(piece) >= BYTES_LEAST // 3:
        yield piece.strip("\n")[: 2 * BYTES_MOST]


def code_documents(module: Module, rng: random.Random) -> list[str]:
    return list(_cut(module.source, r"(?<=\n\n)(?=\S|    def |    class |    @)", rng))


def prose_documents(module: Module, rng: random.Random) -> list[str]:
    texts = [f"{module.name}\n\n{module.doc}\n\n\n"] if len(module.doc) > 80 else []
    texts += [f"{module.name}.{e.name}\n\n{e.doc}\n\n\n" for e in module.entities if len(e.doc) > 60]
    return list(_cut("".join(texts), r"(?<=\n\n)(?=\S)", rng))


def topic_documents(text: str, rng: random.Random) -> list[str]:
    return list(_cut(text, r"(?<=\n\n)(?=\S)", rng))


def _listed(names: tuple[str, ...]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] + "." if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" and {quoted[-1]}."


def _turns(entity: Entity, rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) pairs about one name."""
    full = f"{entity.module}.{entity.name}"
    turns = []
    if entity.doc:
        first = entity.doc.split("\n\n")[0][:600]
        rest = entity.doc[len(first) :].strip()
        turns.append((rng.choice([f"What does `{full}` do?", f"Describe `{full}`.", f"What is `{full}` for?"]), first))
        if 40 < len(rest) < 700:
            turns.append((rng.choice(["Tell me more.", "What else should I know?"]), rest))
    if entity.arguments:
        turns.append((f"Which arguments does `{full}` take?", _listed(entity.arguments)))
    if entity.methods:
        turns.append((f"Which methods has the class `{full}`?", _listed(entity.methods[:12])))
    if 80 < len(entity.source) < 900 and not entity.is_class:
        turns.append((f"Show the source of `{full}`.", f"```python\n{entity.source}\n```"))
    return turns


def conversations(module: Module, rng: random.Random) -> list[list[JsonRow]]:
    """Questions and answers about a module's names, in order, grouped into conversations of a document's length."""
    grouped: list[list[JsonRow]] = []
    messages: list[JsonRow] = []
    size, aim = 0, rng.randint(BYTES_LEAST, BYTES_MOST)
    for entity in module.entities:
        for question, answer in _turns(entity, rng):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            size += len(question) + len(answer) + 60
            if size >= aim:
                grouped.append(messages)
                messages, size, aim = [], 0, rng.randint(BYTES_LEAST, BYTES_MOST)
    return grouped + ([messages] if size >= BYTES_LEAST // 3 else [])


def documents(split: str, seed: int = 0) -> list[JsonRow]:
    """All text documents of a split, in the order of their modules. An id names kind, module and number."""
    rows: list[JsonRow] = []
    for module in modules():
        if module.split == split:
            rng = random.Random(f"{seed} {module.name}")
            for kind, texts in (("code", code_documents(module, rng)), ("prose", prose_documents(module, rng))):
                rows += [{"id": f"{kind}/{module.name}/{i}", "kind": kind, "text": t} for i, t in enumerate(texts)]
            for i, messages in enumerate(conversations(module, rng)):
                rows.append({"id": f"conversation/{module.name}/{i}", "kind": "conversation", "messages": messages})
    for topic, text in topics():
        if split_of(f"topic {topic}") == split:
            for i, piece in enumerate(topic_documents(text, random.Random(f"{seed} {topic}"))):
                rows.append({"id": f"prose/topic-{topic}/{i}", "kind": "prose", "text": piece})
    return rows
