"""What an original and a checkpoint differ in besides weights: fields of config.json, and the token ids and pixels
that each makes of a text.

KL covers the first: each side of the walk computes as its own config.json says. It does not cover the second, because
both sides read the rows that the original's tokenizer gave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..calibration.documents import Document
from ..calibration.tokens import Encoder
from ..checkpoint.gguf.read import stored_tokenizer
from ..checkpoint.gguf.tokenizer import describe
from ..checkpoint.gguf.write import stops_at
from ..checkpoint.model import Model, said_name
from ..core.errors import InputError
from ..core.record.schema import ConfigField, Record
from ..core.rows import Row
from ..core.units import counted
from ..models.config_keys import Difference, differences
from .task_requests import requests_of
from .tasks import Task

# A message shows this many offenders, and characters of a value.
SHOWN = 8
SHOWN_CHARACTERS = 80


@dataclass
class SideDifferences:
    """`warnings` are lines for people. `texts` is the number of texts and options of items that are encoded otherwise,
    None where the checkpoint has no tokenizer to compare."""

    fields: list[Difference]
    texts: int | None = None
    warnings: list[str] = field(default_factory=list)

    def put_into(self, record: Record) -> None:
        """Into the record's checkpoint, which is there, and its warnings."""
        assert record.checkpoint is not None
        listed = tuple(
            ConfigField(field=d.field, original=d.original, checkpoint=d.checkpoint, use=d.use.value, does=d.does)
            for d in self.fields
        )
        record.checkpoint = record.checkpoint.model_copy(
            update={"config_differences": listed, "texts_encoded_otherwise": self.texts}
        )
        record.warnings += self.warnings


def compare_sides(
    original: Model, checkpoint: Model, encoder: Encoder, documents: Sequence[Document], tasks: Sequence[Task]
) -> SideDifferences:
    """Compare two checkpoints of one model; `checkpoint` may lack the vision tower. `encoder` is the original's.
    `documents` and `tasks` are what is evaluated."""
    ours, theirs = original.adapter, checkpoint.adapter
    if ours.has_vision and not theirs.has_vision:
        ours = ours.text_only()
    found = SideDifferences(differences(ours.config, theirs.config))
    found.warnings += [f"config.json: {difference.told()}" for difference in found.fields]
    name, encoder = said_name(checkpoint.name), encoder.of(ours)
    try:
        other = Encoder(checkpoint.path, theirs, encoder.date)
    except InputError as error:
        found.warnings.append(
            f"{name}: whether its users get the token ids measured here is not known, because its tokenizer cannot be "
            f"used: {error}"
        )
        return found
    told = _documents(encoder, other, documents)
    found.texts = len(told)
    for task in tasks:
        options = _other_options(encoder, other, task)
        found.texts += options
        told += [f"{counted(options, 'option')} of the task {task.name}"] if options else []
    if told:
        more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
        found.warnings.append(
            f"{name} encodes {counted(found.texts, 'text')} otherwise than the original: its tokenizer, chat template "
            f"or picture settings differ, and the figures are of the original's ids. {'; '.join(told[:SHOWN] + more)}"
        )
    stored = stored_tokenizer(checkpoint.path)
    if stored is not None:
        found.warnings += _gguf_tokenizer(name, stored, original)
    return found


def _documents(encoder: Encoder, other: Encoder, documents: Sequence[Document]) -> list[str]:
    """A line for each document that the two encode differently."""
    found = []
    for document in documents:
        ours, theirs = _encoded(encoder, document), _encoded(other, document)
        if isinstance(ours, str) or isinstance(theirs, str):
            if isinstance(ours, str) != isinstance(theirs, str):
                found.append(f"{document.id} is refused by one of the two")
            continue
        if not torch.equal(ours.tokens, theirs.tokens):
            found.append(f"{document.id} from token {_first_other(ours.tokens.tolist(), theirs.tokens.tolist())} on")
        elif not _same_pixels(ours, theirs):
            found.append(f"{document.id} in its pixels")
    return found


def _encoded(encoder: Encoder, document: Document) -> Row | str:
    try:
        return encoder.encode(document)
    except InputError as error:
        return str(error)


def _same_pixels(ours: Row, theirs: Row) -> bool:
    if ours.pixels is None or theirs.pixels is None:
        return ours.pixels is theirs.pixels
    return torch.equal(ours.pixels, theirs.pixels)


def _other_options(encoder: Encoder, other: Encoder, task: Task) -> int:
    """How many options of a task the two encode differently; all where the one template refuses the task."""
    ours = requests_of(task, encoder)
    try:
        theirs = requests_of(task, other)
    except InputError:
        return len(ours)
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def _gguf_tokenizer(name: str, stored: dict[str, Any], original: Model) -> list[str]:
    """Warnings where the tokenizer in a GGUF file, which llama.cpp reads, is not what the original's gives."""
    config, text = original.adapter.config, original.adapter.text_config
    wanted = describe(original.path, original.adapter.vocab_size, stops_at(config) + stops_at(text))
    if wanted.problems:
        return [f"{name}: the GGUF file's tokenizer was not compared: {wanted.problems[0]}"]
    warnings = []
    for key, ours in wanted.metadata.items():
        theirs = stored.get(key)
        if theirs == ours:
            continue
        if isinstance(ours, list) and isinstance(theirs, list):
            first = _first_other(ours, theirs)
            a, b = (repr(side[first]) if first < len(side) else "nothing" for side in (theirs, ours))
            warnings.append(f"{name}: tokenizer.{key} of the GGUF file has {a} at {first}, and the original gives {b}")
        else:
            a, b = ("nothing" if side is None else _short(side) for side in (theirs, ours))
            warnings.append(f"{name}: tokenizer.{key} of the GGUF file is {a}, and the original gives {b}")
    return warnings


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _first_other(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    shared = min(len(ours), len(theirs))
    return next((at for at in range(shared) if ours[at] != theirs[at]), shared)
