"""Multiple-choice tasks by name, and the answers of both models.

    demo                    the 400 embedded questions
    PATH.jsonl, .parquet    a line {"question": ..., "choices": [...], "answer": index or letter or the option's text}
    mmlu, arc-easy, arc-challenge, hellaswag    data sets of the hub, their usual split in our wording
    lm-eval:TASK            a multiple-choice task of lm-evaluation-harness, or the YAML file of one (lm_eval_tasks.py)

task_items.py reads items, task_requests.py words and encodes them.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..core.json_text import json_text
from ..core.record.flips import FlipSummary
from ..core.units import counted
from ..models.known import demo_folder
from .choice import Scored
from .flips import Answered, answers, summarize_answers
from .lm_eval_tasks import PREFIX, load_questions
from .task_items import HUB_TASKS, Item, Style, hub_items, local_items

# Seeds the choice of examples; the next number seeds the choice of items.
SHOT_SEED = 0


@dataclass(frozen=True)
class Task:
    """The items of one task, and how they are asked."""

    # Two runs are paired by it.
    name: str
    items: tuple[Item, ...]
    # Group -> the items that are shown with their answers before each question of the group.
    examples: dict[str, tuple[Item, ...]]
    shots: int
    style: Style
    # Whether an option's score is divided by the bytes of its text, as is usual where options differ in length.
    normalized: bool

    @property
    def repeated(self) -> int:
        """How many items ask what an item before them asks."""
        return len(self.items) - len({(i.question, i.choices, i.right, i.group, i.pairs) for i in self.items})

    @property
    def digest(self) -> str:
        """SHA-256 of all that is asked. Two runs are compared only if it is the same."""
        asked = [[i.question, i.choices, i.right, i.group, i.pairs] for i in self.items]
        shown = {group: [[i.question, i.choices, i.right] for i in items] for group, items in self.examples.items()}
        said = [self.style, self.normalized, asked, shown]
        return hashlib.sha256(json_text(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def load_tasks(names: Sequence[str], shots: int, limit: int | None, folder: Path = Path()) -> list[Task]:
    """Every named task. Raises InputError when two have one name, because two runs are paired by it."""
    tasks = [load_task(name, shots, limit, folder) for name in names]
    twice = sorted({t.name for t in tasks if sum(other.name == t.name for other in tasks) > 1})
    if twice:
        raise InputError(f"{', '.join(twice)}: named twice. Name each task once, and give files names of their own")
    return tasks


def load_task(name: str, shots: int, limit: int | None, folder: Path = Path()) -> Task:
    """The task `name`, with `shots` examples before each question and at most `limit` items, drawn by a seed.

    The path of a file starts at `folder`. Raises InputError for an unknown task or unsound items, ResourceError when
    the hub cannot be reached.
    """
    if name.startswith(PREFIX):
        return _harness_task(name.removeprefix(PREFIX), shots, limit)
    examples: list[Item]
    if name in HUB_TASKS:
        public = HUB_TASKS[name]
        items = hub_items(name, public, public.split)
        examples = hub_items(name, public, public.examples) if shots else []
        style, normalized = public.style, public.normalized
    else:
        path = demo_folder() / "data" / "questions.jsonl" if name == "demo" else folder / Path(name).expanduser()
        items, style, normalized = local_items(name, path), "chat", False
        # The examples are items of the same file, which are then not asked.
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
    # A file's task has the name of the file without its folder, so that runs on two machines can be compared.
    return Task(Path(name).name, tuple(items), shown, shots, style, normalized)


def _harness_task(spec: str, shots: int, limit: int | None) -> Task:
    found = load_questions(spec, shots)
    asked = [Item(q.id, "", q.choices, q.right, pairs=q.pairs) for q in found.items]
    kept = asked if limit is None else _drawn(asked, limit, SHOT_SEED + 1)
    return Task(found.name, tuple(kept), {}, found.shots, "pairs", found.normalized)


def _drawn(items: list[Item], count: int, seed: int) -> list[Item]:
    """`count` items chosen by a seed, in their own order."""
    chosen = sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
    return [items[i] for i in chosen]


def repeated_warnings(tasks: Sequence[Task]) -> list[str]:
    """A warning for each task in which items repeat others."""
    return [
        f"{counted(task.repeated, 'item')} of the task {task.name} ask what others ask, and each counts as a draw of "
        "its own: the interval is narrower than it should be"
        for task in tasks
        if task.repeated
    ]


def answered(task: Task, scored: Sequence[Scored]) -> list[Answered]:
    """Both models' answers, from the scores (nats) of the task's requests in order."""
    found, start = [], 0
    for item in task.items:
        own = scored[start : start + len(item.choices)]
        start += len(item.choices)
        # Letters all have one length; texts are divided by theirs if the task says so.
        sizes = [len(choice.encode()) if task.normalized else 1 for choice in item.choices]
        p = tuple(s.logp_reference / size for s, size in zip(own, sizes, strict=True))
        q = tuple(s.logp_quantized / size for s, size in zip(own, sizes, strict=True))
        found.append(Answered(item.id, item.right, p, q))
    return found


def flip_summary(tasks: Sequence[Task], scored: Sequence[Sequence[Scored]]) -> FlipSummary:
    """The record's `flips`: each task, and all items together."""
    by_task = [answered(task, own) for task, own in zip(tasks, scored, strict=True)]
    return FlipSummary(
        all=summarize_answers([a for part in by_task for a in part]),
        tasks=tuple(
            summarize_answers(part).model_copy(
                update={"task": task.name, "digest": task.digest, "shots": task.shots, "answers": answers(part)}
            )
            for task, part in zip(tasks, by_task, strict=True)
        ),
    )
