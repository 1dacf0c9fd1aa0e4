"""Multiple-choice tasks of lm-evaluation-harness, by name: their items as pairs of texts, and pairs as token ids.

`lm-eval:arc_easy` names a task or a group of the harness, `lm-eval:mine/task.yaml` a task of one's own. The harness
makes contexts and options as it always does (its prompts, its few-shot examples, its seed); what it would ask a model
goes into the same twin walk as everything else, all at once. A task's YAML may name Python, and the harness runs it: it
is the user's own or the harness's, and never the checkpoint's.

Only the extra `onecard[lm-eval]` installs the harness, so it is imported where it is asked for.
"""

import io
import logging
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.tokens import Encoder
from ..core.errors import InputError, ResourceError, input_error
from .choice import OptionRequest

PREFIX = "lm-eval:"
# The harness's own default for few-shot examples: a run of it shows the same ones.
FEWSHOT_SEED = 1234
# Whose errors say that data could not be had.
_FETCHERS = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec")


@dataclass(frozen=True)
class Question:
    """`pairs[i]` is (context, continuation) of option i; `choices` the options as the task spells them."""

    id: str
    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Questions:
    """All of a task or group. `name` holds no path, so that runs of two machines are one task. `normalized`: the task
    reports accuracy by length as well, and so options are compared by it. `shots` is what the task was built with."""

    name: str
    items: tuple[Question, ...]
    shots: int
    normalized: bool


def load_questions(spec: str, shots: int) -> Questions:
    """The task or group `spec`, without its prefix; `shots` of 0 leaves the task's own number of examples.

    Raises InputError for what is no multiple-choice task, ResourceError where its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            f"the task {PREFIX}{spec} needs lm-evaluation-harness: pip install 'onecard[lm-eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise InputError(f"there is no file {spec}: name a task of lm-evaluation-harness, or its YAML file")
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of two libraries
            # The harness's own tasks are thousands of files: they are not read for one that is named by its file.
            tasks = TaskManager(include_defaults=not path.is_file()).load([spec])["tasks"]
    except KeyError:
        raise InputError(f"lm-evaluation-harness has no task {spec!r}: list them with `lm-eval ls tasks`") from None
    except Exception as error:  # the harness's, the data sets' and the hub's kinds
        said = f"the task {PREFIX}{spec} could not be loaded ({type(error).__name__}: {error})"
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _FETCHERS:
            raise ResourceError(
                f"{said}. On a machine without network name a task whose data lie in local files"
            ) from error
        raise InputError(f"{said}: mend its YAML file") from error
    wrong = [f"{name} has {task.OUTPUT_TYPE}" for name, task in tasks.items() if task.OUTPUT_TYPE != "multiple_choice"]
    if wrong or not tasks:
        raise input_error(f"{spec} cannot be asked as multiple choice:", wrong, "Name tasks of options, as arc_easy.")
    items: list[Question] = []
    for name, task in tasks.items():
        if shots:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        items += _questions(name if len(tasks) > 1 else "", task)
    metrics = [set(task.aggregation()) for task in tasks.values()]
    used = {int(task.get_config("num_fewshot") or 0) for task in tasks.values()}
    if len(used) > 1:
        raise InputError(f"the tasks of {spec} show {sorted(used)} examples: name one number with --shots")
    name = next(iter(tasks)) if path.suffix else spec
    return Questions(f"{PREFIX}{name}", tuple(items), used.pop(), all("acc_norm" in own for own in metrics))


def _questions(prefix: str, task: Any) -> list[Question]:
    """Items of one task, each with the requests that the harness would make of it."""
    with redirect_stderr(io.StringIO()):
        task.build_all_requests()
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    found, problems = [], []
    for number, instances in by_document.items():
        doc = instances[0].doc
        choices = tuple(str(choice) for choice in task.doc_to_choice(doc))
        # Behind the options, tasks that measure mutual information ask for each of them without its context.
        pairs = tuple((str(i.args[0]), str(i.args[1])) for i in sorted(instances, key=lambda i: i.idx)[: len(choices)])
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if not isinstance(right, int) or not 0 <= right < len(choices) or len(pairs) != len(choices):
            problems.append(f"item {number}: its right answer is {gold!r}, and must be one of {len(choices)} options")
        else:
            found.append(Question(f"{prefix}/{number}".lstrip("/"), pairs, choices, right))
    if problems:
        raise input_error(
            f"the task {task.config.task} holds items that cannot be asked:",
            problems[:20],
            "Flips need one right option an item.",
        )
    return found


def encode_pair(encoder: Encoder, context: str, continuation: str) -> OptionRequest:
    """Token ids of a pair, by the harness's rules: spaces that end the context belong to the continuation, and both are
    tokenized as one text. An empty context is the token that begins (or else ends) a text.

    Special tokens are put as the tokenizer puts them by itself, the one that begins a text included; the harness leaves
    that one out of Llama's unless told otherwise, and then measures a model on what it was never trained on. Where
    tokens are merged over the bound, the context is what both texts have in common.
    """
    tokenizer = encoder.tokenizer
    kept = context.rstrip()
    whole = tuple(tokenizer(context + continuation)["input_ids"])
    begin = tuple(tokenizer(kept)["input_ids"]) if kept else ()
    if not begin:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        begin = (first,)
        whole = whole if whole[:1] == begin else begin + whole
    common = next(
        (i for i, (a, b) in enumerate(zip(begin, whole, strict=False)) if a != b), min(len(begin), len(whole))
    )
    common = min(common, len(whole) - 1)
    if common < 1:
        raise InputError(f"nothing stands before the option {continuation!r}: mend the task")
    return OptionRequest(whole[:common], whole[common:])
