"""Multiple-choice items, read from local files or from data sets of the hub.

An item of a file is {"question": "...", "choices": ["...", "..."], "answer": 0}; the answer may also be a letter or the
option's text. Nothing of a data set is executed: `datasets` 4 and later run no scripts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..calibration.messages import refuse_half_characters
from ..core.errors import InputError, ResourceError, input_error
from .lm_eval_tasks import PREFIX

# What stands for the options of an item whose style is `letters`.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# How items are asked. chat: a question, answered by the option. letters: options stand in the question, answered by a
# letter. continue: the option goes on with the text. pairs: the harness words both (lm_eval_tasks.py).
Style = Literal["chat", "letters", "continue", "pairs"]


@dataclass(frozen=True)
class Item:
    """One multiple-choice item."""

    id: str
    question: str
    # The options as texts, and the index of the right one.
    choices: tuple[str, ...]
    right: int
    # The examples before the question come from the same group.
    group: str = ""
    # Style `pairs`: (context, continuation) of each option, in place of the question.
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class HubTask:
    """A data set of the hub, and where its items are."""

    path: str
    config: str | None
    # The split that is asked, and the split that examples come from.
    split: str
    examples: str
    # The columns of an item.
    question: str
    choices: str
    answer: str
    style: Style
    # Whether scores are divided by the bytes of the options.
    normalized: bool
    # The column of an item's group.
    group: str | None = None


HUB_TASKS = {
    "mmlu": HubTask(
        "cais/mmlu", "all", "test", "dev", "question", "choices", "answer", "letters", False, group="subject"
    ),
    "arc-easy": HubTask(
        "allenai/ai2_arc", "ARC-Easy", "test", "train", "question", "choices", "answerKey", "letters", False
    ),
    "arc-challenge": HubTask(
        "allenai/ai2_arc", "ARC-Challenge", "test", "train", "question", "choices", "answerKey", "letters", False
    ),
    "hellaswag": HubTask("Rowan/hellaswag", None, "validation", "train", "ctx", "endings", "label", "continue", True),
}


def local_items(name: str, path: Path) -> list[Item]:
    """The items of a .jsonl or .parquet file. Raises InputError listing every bad item."""
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise InputError(
            f"there is no task {name!r}: {', '.join(['demo', *HUB_TASKS])}, {PREFIX}TASK, or the path of a .jsonl or "
            ".parquet file with question, choices and answer"
        )
    lines, problems = _parquet_lines(path) if path.suffix == ".parquet" else _json_lines(path)
    items = []
    first: dict[str, int] = {}
    for number, line in lines:
        try:
            item = item_of(line, str(number))
        except ValueError as error:
            problems.append(f"item {number}: {error}")
            continue
        items.append(item)
        # Two runs are compared item by item, by the id.
        if first.setdefault(item.id, number) != number:
            problems.append(f"item {number}: has the id {item.id!r} of item {first[item.id]}")
    if problems or not items:
        raise input_error(
            f"{path} holds items that cannot be asked:",
            problems[:20] or ["there is none"],
            'An item is {"question": "...", "choices": ["...", "..."], "answer": 0}, one a line.',
        )
    return items


# Numbered lines of a file, and what is wrong with the others.
_Lines = tuple[list[tuple[int, Any]], list[str]]


def _parquet_lines(path: Path) -> _Lines:
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)), []
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is no Parquet file that can be read: {error}") from None


def _json_lines(path: Path) -> _Lines:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    lines: list[tuple[int, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at characters that JSON may hold
        if line.strip():
            try:
                lines.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                problems.append(f"item {number}: is no JSON")
    return lines, problems


def item_of(
    line: Any,
    number: str,
    question: str = "question",
    choices: str = "choices",
    answer: str = "answer",
    group: str | None = None,
) -> Item:
    """The item of a row. `number` is its id if the row has none; the others name columns.

    Raises ValueError that says what is wrong with the row.
    """
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
        found = _meant(said, options, labels)
        if len(found) > 1:
            raise ValueError(f"its {answer} {said!r} may mean any of its {choices} {found}: give the index as a number")
        right = found[0] if found else -1
    if not 0 <= right < len(options):
        raise ValueError(f"its {answer} {said!r} names none of its {len(options)} {choices}")
    name = number if line.get("id") is None else str(line["id"])
    for what, words in (("id", name), ("question", line[question]), ("choices", options)):
        refuse_half_characters(what, words)
    return Item(name, line[question], tuple(options), right, str(line[group]) if group else "")


def _meant(said: str, options: list[str], labels: list[Any] | None) -> list[int]:
    """The indices that an answer in words can mean: by a label of the item, otherwise by letter, index or text."""
    if labels is not None and said in labels:
        return [labels.index(said)]
    found = {i for i, option in enumerate(options) if said == option}
    if labels is None:
        found |= {i for i in range(len(options)) if said in (LETTERS[i : i + 1], str(i))}
    return sorted(found)


def hub_items(name: str, public: HubTask, split: str) -> list[Item]:
    """The items of one split. Raises ResourceError when it cannot be fetched, InputError when it has changed."""
    from datasets import load_dataset

    try:
        lines = load_dataset(public.path, public.config, split=split)
    except Exception as error:  # `datasets` passes on errors of the hub client and of HTTP
        raise ResourceError(
            f"the task {name} is the data set {public.path} of the hub, which could not be fetched "
            f"({type(error).__name__}). On a machine without network give the items as a .jsonl file"
        ) from error
    columns = (public.question, public.choices, public.answer, public.group)
    try:
        return [item_of(line, str(n), *columns) for n, line in enumerate(lines)]
    except ValueError as error:
        raise InputError(
            f"the task {name} is the data set {public.path} of the hub, and one of its items {error}: the data set has "
            "changed. Give the items as a .jsonl file"
        ) from None
