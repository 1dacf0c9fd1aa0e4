"""Multiple-choice tasks: items from the embedded questions, local files or public data sets, to requests of token ids.

    demo                    the 400 embedded questions
    PATH.jsonl, .parquet    a line {"question": ..., "choices": [...], "answer": index or letter or the option's text}
    mmlu, arc-easy, arc-challenge, hellaswag    through `datasets`, their usual split in our wording (below)
    lm-eval:TASK            a multiple-choice task of lm-evaluation-harness, or the YAML file of one (harness.py)

A model with a chat template is asked in it (but for HellaSwag, which goes on with a text), its option being a whole
answer with the mark that ends it; another reads "Question: ... Answer:". Options that are letters stand in the
question. Tasks of the harness bring their own words, and no chat template.
Nothing of a data set is executed: `datasets` 4 and later run no scripts.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..calibration.tokens import Encoder
from ..core.errors import InputError, ResourceError, input_error
from ..models.known import demo_folder
from .choice import Request, Scored
from .flips import Answered, answers, summarize_answers
from .lm_eval_tasks import PREFIX, encode_pair, load_questions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOT_SEED = 0
Style = Literal["chat", "letters", "continue", "pairs"]


@dataclass(frozen=True)
class Item:
    """`choices` are texts; `right` is the index of the right one. Examples before it are of its own `group`. `pairs`,
    of the style of that name: what stands before each option and the option as it goes on, in place of a question."""

    id: str
    question: str
    choices: tuple[str, ...]
    right: int
    group: str = ""
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """Items of one name, those that stand before a question as examples, and how they are put. `normalized`: an
    option's score is divided by the bytes of its text, as is usual where options differ in length."""

    name: str
    items: tuple[Item, ...]
    examples: dict[str, tuple[Item, ...]]  # by group
    shots: int
    style: Style
    normalized: bool

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked: two runs are compared only where it is the same."""
        asked = [[i.question, i.choices, i.right, i.group, i.pairs] for i in self.items]
        shown = {group: [[i.question, i.choices, i.right] for i in items] for group, items in self.examples.items()}
        said = [self.style, self.normalized, asked, shown]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Public:
    """A data set of the hub: its name, configuration, splits to ask and to show, and columns."""

    path: str
    config: str | None
    split: str
    examples: str
    question: str
    choices: str
    answer: str
    style: Style
    normalized: bool
    group: str | None = None  # examples are of a question's own group


PUBLIC = {
    "mmlu": Public(
        "cais/mmlu", "all", "test", "dev", "question", "choices", "answer", "letters", False, group="subject"
    ),
    "arc-easy": Public(
        "allenai/ai2_arc", "ARC-Easy", "test", "train", "question", "choices", "answerKey", "letters", False
    ),
    "arc-challenge": Public(
        "allenai/ai2_arc", "ARC-Challenge", "test", "train", "question", "choices", "answerKey", "letters", False
    ),
    "hellaswag": Public("Rowan/hellaswag", None, "validation", "train", "ctx", "endings", "label", "continue", True),
}


def load_tasks(names: Sequence[str], shots: int, limit: int | None, folder: Path = Path()) -> list[Task]:
    """Every task by its name. Raises InputError too where two have one name: two runs are paired by it."""
    tasks = [load_task(name, shots, limit, folder) for name in names]
    twice = sorted({t.name for t in tasks if sum(other.name == t.name for other in tasks) > 1})
    if twice:
        raise InputError(f"{', '.join(twice)}: named twice. Name each task once, and give files names of their own")
    return tasks


def load_task(name: str, shots: int, limit: int | None, folder: Path = Path()) -> Task:
    """The task called `name`, with so many examples before each question and at most `limit` items, drawn by a seed.
    `folder`: what the path of a file begins at.

    Raises InputError for what is no task or whose items are unsound, ResourceError where the hub cannot be reached.
    """
    if name.startswith(PREFIX):
        found = load_questions(name.removeprefix(PREFIX), shots)
        asked = [Item(q.id, "", q.choices, q.right, pairs=q.pairs) for q in found.items]
        kept = asked if limit is None else _drawn(asked, limit, SHOT_SEED + 1)
        return Task(found.name, tuple(kept), {}, found.shots, "pairs", found.normalized)
    examples: list[Item]
    if name in PUBLIC:
        public = PUBLIC[name]
        items = _public_items(name, public, public.split)
        examples = _public_items(name, public, public.examples) if shots else []
        style, normalized = public.style, public.normalized
    else:
        path = demo_folder() / "data" / "questions.jsonl" if name == "demo" else folder / Path(name).expanduser()
        items, style, normalized = _local_items(name, path), "chat", False
        # Of a file's own items the first few are shown and not asked.
        drawn = _drawn(items, shots, SHOT_SEED) if shots else []
        examples, items = drawn, [item for item in items if item not in drawn]
    by_group: dict[str, list[Item]] = {}
    for example in examples:
        by_group.setdefault(example.group, []).append(example)
    short = {item.group for item in items if len(by_group.get(item.group, [])) < shots}
    if not items or short:
        raise InputError(f"{name} has too few items for {shots} examples and a question: lower the number of shots")
    if limit is not None and limit < len(items):
        items = _drawn(items, limit, SHOT_SEED + 1)
    shown = {group: tuple(_drawn(found, shots, SHOT_SEED)) for group, found in by_group.items()}
    # A file goes by its own name, so that runs of two machines are one task.
    return Task(Path(name).name, tuple(items), shown, shots, style, normalized)


def _drawn(items: list[Item], count: int, seed: int) -> list[Item]:
    """`count` of them by a seed, in their own order."""
    chosen = sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
    return [items[i] for i in chosen]


def _local_items(name: str, path: Path) -> list[Item]:
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise InputError(
            f"there is no task {name!r}: {', '.join(['demo', *PUBLIC])}, {PREFIX}TASK, or the path of a .jsonl or "
            ".parquet file with question, choices and answer"
        )
    lines: list[tuple[int, Any]] = []
    problems: list[str] = []
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            lines = list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path} is no Parquet file that can be read: {error}") from None
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at marks that JSON may hold
            if line.strip():
                try:
                    lines.append((number, json.loads(line)))
                except (ValueError, RecursionError):
                    problems.append(f"item {number}: is no JSON")
    items = []
    first: dict[str, int] = {}
    for number, line in lines:
        try:
            item = item_of(line, str(number))
        except ValueError as error:
            problems.append(f"item {number}: {error}")
            continue
        items.append(item)
        # Two runs are compared item by item, by these.
        if first.setdefault(item.id, number) != number:
            problems.append(f"item {number}: has the id {item.id!r} of item {first[item.id]}")
    if problems or not items:
        raise input_error(
            f"{path} holds items that cannot be asked:",
            problems[:20] or ["there is none"],
            'An item is {"question": "...", "choices": ["...", "..."], "answer": 0}, one a line.',
        )
    return items


def item_of(
    line: Any,
    number: str,
    question: str = "question",
    choices: str = "choices",
    answer: str = "answer",
    group: str | None = None,
) -> Item:
    """One item from a row of a file or data set. Raises ValueError with what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError("is no object")
    missing = [key for key in (question, choices, answer, group) if key is not None and line.get(key) is None]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    options: Any = line[choices]
    labels: list[Any] | None = None
    if isinstance(options, dict):  # ARC: {"text": [...], "label": [...]}
        options, labels = options.get("text"), options.get("label")
        if not isinstance(labels, list) or not isinstance(options, list) or len(labels) != len(options):
            raise ValueError(f"its {choices} are no two or more texts with as many labels")
    if (
        not isinstance(options, list)
        or len(options) < 2
        or not all(isinstance(option, str) and option for option in options)
    ):
        raise ValueError(f"its {choices} are no two or more texts")
    if not isinstance(line[question], str) or not line[question].strip():
        raise ValueError(f"its {question} is empty")
    said = line[answer]
    right = said if isinstance(said, int) and not isinstance(said, bool) else -1
    if isinstance(said, str):
        found = _named(said, options, labels)
        if len(found) > 1:
            raise ValueError(f"its {answer} {said!r} may mean any of its {choices} {found}: give the index as a number")
        right = found[0] if found else -1
    if not 0 <= right < len(options):
        raise ValueError(f"its {answer} {said!r} names none of its {len(options)} {choices}")
    name = number if line.get("id") is None else str(line["id"])
    return Item(name, line[question], tuple(options), right, str(line[group]) if group else "")


def _named(said: str, options: list[str], labels: list[Any] | None) -> list[int]:
    """The indices that an answer in words may mean: a label of the item's own, or else a letter, an index, a text."""
    if labels is not None and said in labels:
        return [labels.index(said)]
    found = {i for i, option in enumerate(options) if said == option}
    if labels is None:
        found |= {i for i in range(len(options)) if said in (LETTERS[i : i + 1], str(i))}
    return sorted(found)


def _public_items(name: str, public: Public, split: str) -> list[Item]:
    from datasets import load_dataset

    try:
        lines = load_dataset(public.path, public.config, split=split)
    except Exception as error:  # the library raises its own, the hub's and its HTTP library's kinds
        raise ResourceError(
            f"the task {name} is the data set {public.path} of the hub, and it could not be had "
            f"({type(error).__name__}). On a machine without network give the items as a .jsonl file"
        ) from error
    columns = (public.question, public.choices, public.answer, public.group)
    try:
        return [item_of(line, str(n), *columns) for n, line in enumerate(lines)]
    except ValueError as error:
        raise InputError(
            f"the task {name} is the data set {public.path} of the hub, and one of its items {error}: it is not what "
            "it was. Give the items as a .jsonl file"
        ) from None


def requests_of(task: Task, encoder: Encoder) -> list[Request]:
    """A request for each option of each item, in order."""
    if task.style == "pairs":
        return [encode_pair(encoder, *pair) for item in task.items for pair in item.pairs]
    chats = bool(encoder.tokenizer.chat_template) and task.style != "continue"
    return [
        request
        for item in task.items
        for request in (_chat(task, item, encoder) if chats else _plain(task, item, encoder))
    ]


def _said(item: Item, style: Style) -> tuple[str, tuple[str, ...]]:
    """(question, options) as they are put: letters stand for options where the style has them."""
    if style != "letters":
        return item.question, item.choices
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return f"{item.question}\n{listed}\nAnswer with the letter.", tuple(LETTERS[: len(item.choices)])


def _chat(task: Task, item: Item, encoder: Encoder) -> list[Request]:
    """The option is the assistant's whole turn, the mark that ends it included."""
    before: list[dict[str, str]] = []
    for example in task.examples.get(item.group, ()):
        question, options = _said(example, task.style)
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": options[example.right]}]
    question, options = _said(item, task.style)
    asked = [*before, {"role": "user", "content": question}]

    def ids(messages: list[dict[str, str]], ask: bool) -> tuple[int, ...]:
        try:
            text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # the template is a program of the checkpoint's, run in jinja2's sandbox
            raise InputError(f"the item {item.id} is refused by the chat template ({error})") from None
        return tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    found = []
    for option in options:
        whole = ids([*asked, {"role": "assistant", "content": option}], False)
        found.append(_split(ids(asked, True), whole))
    return found


def _split(context: tuple[int, ...], whole: tuple[int, ...]) -> Request:
    """Where the tokens of the context are not how the whole begins (tokens merged over the bound), the context is what
    both have in common."""
    common = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
    common = min(common, len(whole) - 1)
    return Request(whole[:common], whole[common:])


def _plain(task: Task, item: Item, encoder: Encoder) -> list[Request]:
    def text(one: Item, option: str) -> str:
        if task.style == "continue":
            return f"{one.question} {option}".rstrip()
        question, _ = _said(one, task.style)
        return f"Question: {question}\nAnswer: {option}".rstrip()

    shown = "".join(
        f"{text(one, _said(one, task.style)[1][one.right])}\n\n" for one in task.examples.get(item.group, ())
    )

    def ids(said: str) -> tuple[int, ...]:
        return tuple(encoder.tokenizer(said)["input_ids"])

    context = ids(shown + text(item, ""))
    return [_split(context, ids(shown + text(item, option))) for option in _said(item, task.style)[1]]


def answered(task: Task, scored: Sequence[Scored]) -> list[Answered]:
    """Both models' answers, from the scores of the task's requests."""
    found, start = [], 0
    for item in task.items:
        own = scored[start : start + len(item.choices)]
        start += len(item.choices)
        # Letters have one length; texts are divided by theirs where the task says so.
        sizes = [len(choice.encode()) if task.normalized else 1 for choice in item.choices]
        p = tuple(s.logp_reference / size for s, size in zip(own, sizes, strict=True))
        q = tuple(s.logp_quantized / size for s, size in zip(own, sizes, strict=True))
        found.append(Answered(item.id, item.right, p, q))
    return found


def flips_facts(tasks: Sequence[Task], scored: Sequence[Sequence[Scored]]) -> dict[str, Any]:
    """The record's `flips`: every task, and all items together."""
    by_task = [answered(task, own) for task, own in zip(tasks, scored, strict=True)]
    return {
        "all": {"task": "all"} | summarize_answers([a for part in by_task for a in part]),
        "tasks": [
            {"task": task.name, "digest": task.digest, "shots": task.shots}
            | summarize_answers(part)
            | {"answers": answers(part)}
            for task, part in zip(tasks, by_task, strict=True)
        ],
    }
