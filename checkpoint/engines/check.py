"""`onecard check CHECKPOINT --engine NAME`: will this engine load the folder, and load it right?

Holds config.json and the headers of the files against the engine's loading rules (checkpoint/engines; docs/engines.md
is their table), and runs nothing. No weight is read, so it takes seconds for a checkpoint of any size, and it needs
neither papers nor a folder that onecard itself could open: fused experts beside packed ones, or scales that are
missing, are what it is there to tell of. Digests and values are `onecard check` without an engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DamageError, InputError
from ...models.families import load_adapter
from ...models.known import read_config
from ..model import quantization_block
from ..source import open_folder
from .llama_cpp import GgufView, look_gguf
from .rules import Breach, hold
from .table import ENGINES
from .view import View, look

LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Held:
    """A checkpoint held against engines. `breaches`: engine -> what it found, in the order of its rules."""

    checkpoint: str
    tensor_parallel: int
    breaches: dict[str, list[Breach]]

    def of(self, severity: str) -> dict[str, list[Breach]]:
        return {
            engine: [breach for breach in found if breach.rule.severity == severity]
            for engine, found in self.breaches.items()
        }

    @property
    def loads(self) -> bool:
        """No engine's error rule is broken."""
        return not any(self.of("error").values())

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": self.checkpoint,
            "loads": self.loads,
            "tensor_parallel": self.tensor_parallel,
            "engines": {
                engine: {
                    "loads": not any(breach.rule.severity == "error" for breach in found),
                    "rules": len(ENGINES[engine]),
                    "breaches": [breach.line() for breach in found],
                }
                for engine, found in self.breaches.items()
            },
        }

    def refuse(self) -> None:
        """Raises DamageError when an error rule is broken; one message with every rule and its way out."""
        if self.loads:
            return
        lines = []
        for engine, found in self.of("error").items():
            lines += [f"{self.checkpoint} does not load right in {engine}:"] if found else []
            lines += [f"  - {breach.told()}" for breach in found]
        raise DamageError("\n".join(lines))


def hold_against(checkpoint: str, engines: tuple[str, ...], tensor_parallel: int = 1) -> Held:
    """Raises InputError when the folder is no checkpoint of a family that onecard knows."""
    path = Path(checkpoint)
    if not path.is_dir():
        raise InputError(f"{checkpoint} is no folder: name a checkpoint that lies on this machine")
    found = {}
    view: View | None = None
    for engine in engines:
        if engine == LLAMA_CPP:
            found[engine] = hold(_gguf(path), ENGINES[engine])
        else:
            view = view or _open(path, tensor_parallel)
            found[engine] = hold(view, ENGINES[engine])
    return Held(checkpoint, tensor_parallel, found)


def _open(path: Path, tensor_parallel: int) -> View:
    config, adapter = read_config(path), load_adapter(path)
    folder = open_folder(path)
    return look(config, quantization_block(path, config), adapter, folder.infos, tensor_parallel)


def _gguf(path: Path) -> GgufView:
    chunk = None
    if (path / "config.json").is_file():
        chunk = getattr(load_adapter(path).text_config, "attention_chunk_size", None)
    try:
        return look_gguf(path, chunk)
    except ImportError as error:
        raise InputError("a .gguf file is opened with the package gguf: pip install gguf") from error
