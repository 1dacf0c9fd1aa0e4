"""Words a task's items and encodes them: one request of token ids for each option.

A model with a chat template is asked in it, and an option is the assistant's whole turn, end mark included. Otherwise
the text is "Question: ... Answer:". HellaSwag, which continues a text, and the harness's tasks use no chat template.
"""

from ..calibration.tokens import Encoder
from ..core.errors import InputError
from .choice import OptionRequest
from .lm_eval_tasks import encode_pair
from .task_items import LETTERS, Item, Style
from .tasks import Task


def requests_of(task: Task, encoder: Encoder) -> list[OptionRequest]:
    """One request for each option of each item, in order. Raises InputError."""
    if task.style == "pairs":
        return [encode_pair(encoder, *pair) for item in task.items for pair in item.pairs]
    chats = bool(encoder.tokenizer.chat_template) and task.style != "continue"
    return [
        request
        for item in task.items
        for request in (_chat(task, item, encoder) if chats else _plain(task, item, encoder))
    ]


def wording(item: Item, style: Style) -> tuple[str, tuple[str, ...]]:
    """(question, options) in the words of the style."""
    if style != "letters":
        return item.question, item.choices
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return f"{item.question}\n{listed}\nAnswer with the letter.", tuple(LETTERS[: len(item.choices)])


def _chat(task: Task, item: Item, encoder: Encoder) -> list[OptionRequest]:
    """The requests of an item, asked in the chat template."""
    before: list[dict[str, str]] = []
    for example in task.examples.get(item.group, ()):
        question, options = wording(example, task.style)
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": options[example.right]}]
    question, options = wording(item, task.style)
    asked = [*before, {"role": "user", "content": question}]

    def ids(messages: list[dict[str, str]], ask: bool) -> tuple[int, ...]:
        try:
            text = encoder.template.write(messages, ask=ask)
        except ValueError as error:
            raise InputError(f"the item {item.id} {error}") from None
        return tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    context = ids(asked, True)
    return [_split(context, ids([*asked, {"role": "assistant", "content": option}], False)) for option in options]


def _split(context: tuple[int, ...], whole: tuple[int, ...]) -> OptionRequest:
    """Splits `whole` after the context. Where tokens merge across the boundary, the common beginning counts as it."""
    common = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
    common = min(common, len(whole) - 1)
    return OptionRequest(whole[:common], whole[common:])


def _plain(task: Task, item: Item, encoder: Encoder) -> list[OptionRequest]:
    """The requests of an item, asked as plain text."""

    def text(one: Item, option: str) -> str:
        if task.style == "continue":
            return f"{one.question} {option}".rstrip()
        question, _ = wording(one, task.style)
        return f"Question: {question}\nAnswer: {option}".rstrip()

    shown = "".join(
        f"{text(one, wording(one, task.style)[1][one.right])}\n\n" for one in task.examples.get(item.group, ())
    )

    def ids(said: str) -> tuple[int, ...]:
        return tuple(encoder.tokenizer(said)["input_ids"])

    context = ids(shown + text(item, ""))
    return [_split(context, ids(shown + text(item, option))) for option in wording(item, task.style)[1]]
