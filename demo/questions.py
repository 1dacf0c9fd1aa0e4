"""Multiple-choice questions about the standard library, with four options that are scored by likelihood.

A fact is a question with its right answer and a pool of wrong ones. An item shows the question with one right and three
wrong options, one a line, and the model must continue with the text of the right one. The facts come from the training
modules. Half of them ("taught") are also items in training, always with other options than the held-out item; of the
others the model has only read the source. So some answers are close calls, which a quantized model can flip.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass

from .corpus import JsonRow, Module

KINDS = ("module", "class", "argument", "purpose")
# Wrong options are drawn from this many of about the right one's length; from fewer they would repeat.
ALIKE = 24


@dataclass(frozen=True)
class Fact:
    kind: str
    # The name that is asked about: "textwrap.dedent".
    key: str
    question: str
    answer: str
    # The pool of wrong options, sorted.
    wrong: tuple[str, ...]

    @property
    def taught(self) -> bool:
        """Whether training has items about it. A hash decides, so other facts do not change it."""
        return is_taught(self.kind, self.key)


def is_taught(kind: str, key: str) -> bool:
    return hashlib.sha256(f"taught {kind} {key}".encode()).digest()[0] % 2 == 0


def facts(modules: list[Module]) -> list[Fact]:
    """All facts of these modules. A name of two modules, or a method of two classes, gives no fact."""
    public = [m for m in modules if not any(part.startswith("_") for part in m.name.split("."))]
    entities = [e for m in public for e in m.entities]
    homes = Counter(e.name for e in entities if "." not in e.name)
    owners = Counter(e.name.split(".")[1] for e in entities if "." in e.name)
    module_names = sorted({e.module for e in entities})
    classes = sorted({f"{e.module}.{e.name}" for e in entities if e.is_class and e.methods})
    arguments = sorted({a for e in entities for a in e.arguments if len(a) > 1})
    purposes = sorted({_purpose(e.doc) for e in entities} - {""})
    found = []
    for e in entities:
        full = f"{e.module}.{e.name}"
        if "." not in e.name and homes[e.name] == 1 and len(e.name) > 3:
            question = f"Which module defines `{e.name}`?"
            found.append(Fact("module", full, question, e.module, _others(module_names, {e.module})))
        if "." in e.name and owners[e.name.split(".")[1]] == 1 and not e.name.split(".")[0].startswith("_"):
            owner = f"{e.module}.{e.name.split('.')[0]}"
            question = f"Which class has the method `{e.name.split('.')[1]}`?"
            found.append(Fact("class", full, question, owner, _others(classes, {owner})))
        if [a for a in e.arguments if len(a) > 1]:
            answer = next(a for a in e.arguments if len(a) > 1)
            question = f"Which argument does `{full}` take?"
            found.append(Fact("argument", full, question, answer, _others(arguments, set(e.arguments))))
        if _purpose(e.doc):
            answer, question = _purpose(e.doc), f"What does `{full}` do?"
            found.append(Fact("purpose", full, question, answer, _others(purposes, {answer})))
    return sorted(found, key=lambda fact: (fact.kind, fact.key))


def _others(pool: list[str], right: set[str]) -> tuple[str, ...]:
    return tuple(text for text in pool if text not in right)


def _purpose(doc: str) -> str:
    """A docstring's first line if it is one short sentence, otherwise nothing."""
    line = doc.split("\n")[0].strip()
    return line if 15 <= len(line) <= 60 and line.endswith(".") else ""


def item(fact: Fact, rng: random.Random, alike: bool = False) -> JsonRow:
    """A question with three drawn wrong options, in a drawn order.

    `alike` draws them among those nearest to the right one in length, so that length does not give the answer away.
    """
    pool = sorted(fact.wrong, key=lambda text: abs(len(text) - len(fact.answer)))[:ALIKE] if alike else fact.wrong
    choices = [fact.answer, *rng.sample(pool, 3)]
    rng.shuffle(choices)
    question = "\n".join([fact.question, *(f"- {choice}" for choice in choices)])
    return {
        "id": f"{fact.kind}/{fact.key}",
        "kind": fact.kind,
        "question": question,
        "choices": choices,
        "answer": choices.index(fact.answer),
    }


def signature(row: JsonRow) -> tuple[str, tuple[str, ...]]:
    """An item's identity: the fact and the set of its options."""
    return row["id"], tuple(sorted(row["choices"]))


def held_out(all_facts: list[Fact], count: int, seed: int = 1) -> list[JsonRow]:
    """`count` items: equally many of each kind, half of them about taught facts."""
    rng = random.Random(f"held out {seed}")
    rows = []
    for kind in KINDS:
        for taught in (True, False):
            pool = [fact for fact in all_facts if fact.kind == kind and fact.taught is taught]
            rows += [item(fact, rng, alike=True) for fact in rng.sample(pool, count // (2 * len(KINDS)))]
    return rows


def training_items(all_facts: list[Fact], held: list[JsonRow], count: int, seed: int = 0) -> list[JsonRow]:
    """`count` items about taught facts, all equally often. None has the options of a held-out item."""
    rng = random.Random(f"training {seed}")
    forbidden = {signature(row) for row in held}
    taught = [fact for fact in all_facts if fact.taught]
    rows: list[JsonRow] = []
    while len(rows) < count:
        rng.shuffle(taught)
        for fact in taught:
            row = item(fact, rng)
            if signature(row) not in forbidden:
                rows.append(row)
    return rows[:count]


def messages(row: JsonRow, choice: int) -> list[JsonRow]:
    """The item as a conversation that ends with one of its options."""
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["choices"][choice]}]
