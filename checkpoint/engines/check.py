"""`onecard check CHECKPOINT --engine NAME`: will this engine load the folder, and load it correctly?

Compares config.json and headers with the engine's loading rules (checkpoint/engines; docs/engines.md is their table).
No weight is read, so it takes seconds for a checkpoint of any size. The folder needs no record and may be one that
onecard itself could not open: the rules are there to report fused experts beside packed ones, or missing scales.
`onecard check` without an engine checks digests and values.
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
class EngineCheck:
    """The result for one checkpoint and some engines."""

    checkpoint: str
    tensor_parallel: int
    # Engine -> the rules that the checkpoint breaks, in their order.
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
        """Raises DamageError when an error rule is broken, with every broken rule and its way out."""
        if self.loads:
            return
        lines = []
        for engine, found in self.of("error").items():
            lines += [f"{self.checkpoint} does not load correctly in {engine}:"] if found else []
            lines += [f"  - {breach.told()}" for breach in found]
        raise DamageError("\n".join(lines))


def hold_against(checkpoint: str, engines: tuple[str, ...], tensor_parallel: int = 1) -> EngineCheck:
    """Check a folder against engines. Raises InputError when it is no checkpoint of a family that onecard knows."""
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
    return EngineCheck(checkpoint, tensor_parallel, found)


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
