"""Multiple-choice tasks of lm-evaluation-harness: their items as pairs of texts, and pairs as token ids.

`lm-eval:arc_easy` names a task or group of the harness, `lm-eval:mine/task.yaml` a task of the user's own. The harness
makes the contexts and options with its own prompts, few-shot examples and seed; the twin walk scores them together with
all other requests. A task's YAML may name Python code, which the harness runs: it comes from the user or the harness,
never from a checkpoint. lm_eval_model.py is the other way round: the harness runs and asks both models.

The harness is imported only when one of its tasks is named: the extra `onecard[lm-eval]` installs it.
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
# The harness's own default seed for few-shot examples, so that both show the same ones.
FEWSHOT_SEED = 1234
# Packages whose exceptions mean that data could not be fetched.
_FETCHERS = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec")


@dataclass(frozen=True)
class Question:
    """One item."""

    id: str
    # (context, continuation) of each option.
    pairs: tuple[tuple[str, str], ...]
    # The options as the task spells them, and the index of the right one.
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Questions:
    """All items of a task or group."""

    # Without a path, so that runs on two machines can be compared.
    name: str
    items: tuple[Question, ...]
    # The number of examples that the contexts hold.
    shots: int
    # Whether the task reports accuracy normalized by length; options are then compared that way.
    normalized: bool


def load_questions(spec: str, shots: int) -> Questions:
    """The task or group `spec` (without the prefix). With `shots` 0 the task's own number of examples is used.

    Raises InputError for anything but multiple choice, ResourceError when the data cannot be fetched.
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
        with redirect_stderr(io.StringIO()):  # hides progress bars of two libraries
            # The harness's own tasks are thousands of files, which a task named by its file does not need.
            tasks = TaskManager(include_defaults=not path.is_file()).load([spec])["tasks"]
    except KeyError:
        raise InputError(f"lm-evaluation-harness has no task {spec!r}: list them with `lm-eval ls tasks`") from None
    except Exception as error:  # the harness passes on errors of `datasets`, the hub and YAML
        said = f"the task {PREFIX}{spec} could not be loaded ({type(error).__name__}: {error})"
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _FETCHERS:
            raise ResourceError(
                f"{said}. On a machine without network name a task whose data are in local files"
            ) from error
        raise InputError(f"{said}: mend its YAML file") from error
    wrong = [f"{name} has {task.OUTPUT_TYPE}" for name, task in tasks.items() if task.OUTPUT_TYPE != "multiple_choice"]
    if wrong or not tasks:
        raise input_error(
            f"{spec} cannot be asked as multiple choice:", wrong, "Name multiple-choice tasks, like arc_easy."
        )
    items: list[Question] = []
    for name, task in tasks.items():
        if shots:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        items += _questions(name if len(tasks) > 1 else "", task)
    metrics = [set(task.aggregation()) for task in tasks.values()]
    used = {int(task.get_config("num_fewshot") or 0) for task in tasks.values()}
    if len(used) > 1:
        raise InputError(f"the tasks of {spec} show {sorted(used)} examples: give one number with --shots")
    name = next(iter(tasks)) if path.suffix else spec
    return Questions(f"{PREFIX}{name}", tuple(items), used.pop(), all("acc_norm" in own for own in metrics))


def _questions(prefix: str, task: Any) -> list[Question]:
    """The items of one task, with the requests that the harness makes of them."""
    with redirect_stderr(io.StringIO()):
        task.build_all_requests()
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    found, problems = [], []
    for number, instances in by_document.items():
        doc = instances[0].doc
        choices = tuple(str(choice) for choice in task.doc_to_choice(doc))
        # Tasks that measure mutual information append each option without its context: those requests are not needed.
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
            "Flips need exactly one right option in each item.",
        )
    return found


def encode_pair(encoder: Encoder, context: str, continuation: str) -> OptionRequest:
    """Token ids of a pair by the harness's rules. Raises InputError when nothing stands before the continuation.

    Spaces at the end of the context belong to the continuation, and both are tokenized as one text. An empty context
    becomes the token that begins a text, or the one that ends it if there is none.

    The tokenizer adds its special tokens, the one that begins a text included. The harness leaves that one out for
    Llama models by default, and so measures them on input that they were never trained on. Where tokens merge across
    the boundary, the common beginning is the context.
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
