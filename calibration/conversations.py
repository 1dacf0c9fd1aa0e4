"""The conversations that `calibration synthesize` lets the model write, and the journal that a resumed run reads.

The user's turns come from the calibration texts. The model answers them in order, each on the answers before it.
"""

import datetime as dates
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import files
from ..checkpoint.workdir import refuse_resumed
from ..core.errors import InputError
from ..core.rows import Row
from .documents import Document
from .templates import DATE
from .tokens import Encoder

# The journal is written at least this often, and after every finished answer: a walk over a large model takes minutes.
KEEP_SECONDS = 5.0


@dataclass(frozen=True)
class SynthesisSettings:
    """What decides the text, together with the model and the conversations."""

    # Conversations, at most.
    rows: int
    # Tokens of one answer, at most.
    max_new_tokens: int
    # 0: always the likeliest token.
    temperature: float
    seed: int
    # Answers in one conversation, at most.
    turns: int

    def noise_seed(self, number: int, turn: int, position: int) -> int:
        """The seed of one token's noise: by conversation, turn and position, so that resuming changes nothing."""
        key = f"{self.seed} {number} {turn} {position}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


@dataclass
class Conversation:
    """One conversation while the model writes it."""

    document: Document
    # The system message, if there is one.
    messages: list[dict[str, Any]]
    # The user's turns.
    asked: list[dict[str, Any]]
    # The finished answers.
    answers: list[str]
    # Tokens of the answer that is being written.
    running: list[int]

    @property
    def turn(self) -> int:
        """The number of the turn that is to be answered next."""
        return len(self.answers)

    def prompt(self) -> Document:
        """The conversation up to the user's turn that is to be answered."""
        messages = list(self.messages)
        for k, question in enumerate(self.asked[: self.turn + 1]):
            messages.append(question)
            if k < self.turn:
                messages.append({"role": "assistant", "content": self.answers[k]})
        return self._document(messages)

    def finished(self) -> Document:
        """All turns that have an answer."""
        pairs = zip(self.asked, self.answers, strict=False)
        said = [m for question, text in pairs for m in (question, {"role": "assistant", "content": text})]
        return self._document([*self.messages, *said])

    def close_answer(self, encoder: Encoder) -> None:
        """The running tokens become an answer."""
        self.answers.append(str(encoder.tokenizer.decode(self.running, skip_special_tokens=True)).strip())
        self.running = []

    def _document(self, messages: list[dict[str, Any]]) -> Document:
        count = sum(part["type"] == "image" for m in messages for part in m["content"] if isinstance(part, dict))
        return replace(self.document, messages=messages, images=self.document.images[:count])


def conversations_of(documents: list[Document], settings: SynthesisSettings) -> list[Conversation]:
    """The conversations that a user begins, without their answers, in a seeded order."""
    found = []
    for document in documents:
        messages = document.messages or []
        system = [m for m in messages[:1] if m["role"] == "system"]
        asked = [m for m in messages if m["role"] == "user"][: settings.turns]
        others = [m for m in messages[len(system) :] if m["role"] not in ("user", "assistant")]
        pictured = any(
            isinstance(m["content"], list) and any(part["type"] == "image" for part in m["content"])
            for m in messages
            if m["role"] == "assistant"
        )
        if asked and not others and not pictured:
            found.append(Conversation(document, system, asked, [], []))
    random.Random(settings.seed).shuffle(found)
    return found[: settings.rows]


def turns_to_answer(
    conversations: list[Conversation], encoder: Encoder, longest: int
) -> Iterator[list[tuple[int, Row]]]:
    """Turn by turn, the number and prompt of every conversation that is to be answered.

    A conversation ends when its prompt has more than `longest` tokens.
    """
    for turn in range(max(len(conversation.asked) for conversation in conversations)):
        due = [n for n, c in enumerate(conversations) if c.turn == turn < len(c.asked)]
        prompts = [(n, encoder.encode(conversations[n].prompt(), ask=True)) for n in due]
        yield [(n, row) for n, row in prompts if len(row.tokens) <= longest]


def pick(logits_V: torch.Tensor, temperature: float, seed: int) -> int:
    """The likeliest token at temperature 0, otherwise one that is drawn with `seed`."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs = torch.softmax(logits_V.double() / temperature, dim=-1)
    return int(torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed)))


def _journal(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def kept_date(out: Path) -> dates.date | None:
    """The date that the chat template was told before the run was stopped; None where there is none."""
    try:
        return dates.date.fromisoformat(json.loads(_journal(out).read_text(encoding="utf-8"))["identity"][DATE])
    except (OSError, ValueError, TypeError, KeyError):  # a damaged journal is refused when it is opened
        return None


class Journal:
    """OUT.unfinished: the identity of the run, and the answers of every conversation so far."""

    def __init__(self, out: Path, identity: dict[str, str], overwrite: bool) -> None:
        """Raises InputError when OUT.unfinished is damaged or belongs to another run, unless `overwrite`."""
        self.path, self.identity = _journal(out), identity
        self.kept: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()
        if self.path.exists() and not overwrite:
            try:
                old = json.loads(self.path.read_text(encoding="utf-8"))
                self.kept = dict(old["talks"])
                refuse_resumed(dict(old["identity"]), identity, self.path)
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{self.path} is damaged: start again with --overwrite") from None

    def restore(self, conversations: list[Conversation]) -> None:
        """Puts the kept answers into the conversations."""
        for number, conversation in enumerate(conversations):
            kept = self.kept.get(str(number), {})
            conversation.answers = list(kept.get("answers", []))
            conversation.running = list(kept.get("running", []))

    def keep(self, conversations: list[Conversation], now: bool = False) -> None:
        """Writes the file if KEEP_SECONDS have passed, or `now`."""
        if now or time.monotonic() - self._written >= KEEP_SECONDS:
            said = {str(n): {"answers": c.answers, "running": c.running} for n, c in enumerate(conversations)}
            files.write_json(self.path, {"identity": self.identity, "talks": said})
            self._written = time.monotonic()
