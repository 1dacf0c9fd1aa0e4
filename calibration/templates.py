"""A checkpoint's chat template: what it writes of a conversation, on which date, and what it leaves out.

A template may ask for today's date (`strftime_now`). Runs are compared by their token rows, so the date is pinned: the
same for a whole run, for its resume and for every later measurement.

A template may also leave a message out without a word: most do so with a role that they do not know. That is found by
marks: the conversation is written a second time with a number behind every text and every name of a called tool, and a
number that is not written belongs to a lost message. A text that also stands elsewhere cannot hide the loss, and it is
no loss that templates trim white space, drop reasoning before </think>, or spell a text as JSON.
"""

import copy
import datetime as dates
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

from .messages import names_called

# The part of a run's identity that a resume takes over.
DATE = "date that the chat template is told"
# The first number that is tried as a mark: it is in no text as a rule.
_FIRST_MARK = 7_340_061
_ASKS_FOR_THE_DATE = "{{ strftime_now('%Y-%m-%d') }}"


class ChatTemplate:
    """The chat template of a tokenizer, on one date."""

    def __init__(self, tokenizer: Any, date: dates.date) -> None:
        """Raises AssertionError if transformers no longer takes the date from here."""
        self._tokenizer, self._date = tokenizer, date
        if self.date is not None:
            asked = [{"role": "user", "content": ""}]
            with _pinned(date):
                said = tokenizer.apply_chat_template(asked, tokenize=False, chat_template=_ASKS_FOR_THE_DATE)
            assert said == date.isoformat(), "transformers gives chat templates another date than the pinned one"

    @property
    def date(self) -> dates.date | None:
        """The pinned date, if the template asks for one."""
        return self._date if "strftime_now" in str(self._tokenizer.chat_template) else None

    def write(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, ask: bool = False
    ) -> str:
        """What the template writes. `ask` ends it where the assistant's answer begins.

        Raises ValueError when the template refuses the conversation, or leaves a message out.
        """
        try:
            text = self._written(messages, tools, ask)
        except Exception as error:  # the template comes with the checkpoint and runs in jinja2's sandbox
            raise ValueError(f"is refused by the chat template ({error})") from None
        self._refuse_lost(messages, tools, text)
        return text

    def _written(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        with _pinned(self._date):
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
            )

    def _refuse_lost(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str) -> None:
        base = _FIRST_MARK
        while str(base) in text:
            base += 1
        marks = [f"{base}{number:06d}{base}" for number in range(len(messages))]
        marked = [_marked(message, mark) for message, mark in zip(messages, marks, strict=True)]
        try:
            written = self._written([message for message, _ in marked], tools, False)
        except Exception:  # a template that looks into the texts refuses the numbers: nothing can be told
            return
        lost = [
            f"{number} ({message['role']})"
            for number, ((message, count), mark) in enumerate(zip(marked, marks, strict=True), 1)
            if written.count(mark) < count
        ]
        if lost:
            many = "messages" if len(lost) > 1 else "message"
            raise ValueError(
                f"loses {many} {', '.join(lost)}: the chat template does not write what is said there. Give it a role "
                "that the template knows, or leave it out"
            )


def _marked(message: dict[str, Any], mark: str) -> tuple[dict[str, Any], int]:
    """(the message with the mark behind each text that is not blank and each name of a called tool, how many)."""
    places = 0

    def behind(words: str) -> str:
        nonlocal places
        places += bool(words.strip())
        return words + mark if words.strip() else words

    changed = copy.deepcopy({key: value for key, value in message.items() if key != "content"})
    content = message["content"]
    if isinstance(content, str):
        changed["content"] = behind(content)
    else:
        texts = [part.get("text") for part in content]
        changed["content"] = [
            part if text is None else part | {"text": behind(text)} for part, text in zip(content, texts, strict=True)
        ]
    for call in names_called(changed):
        call["name"] = behind(call["name"])
    return changed, places


class _Today(dates.datetime):
    """A clock that stands still."""

    pinned = dates.date.min

    @classmethod
    def now(cls, tz: dates.tzinfo | None = None) -> "_Today":
        return cls(cls.pinned.year, cls.pinned.month, cls.pinned.day, tzinfo=tz)


@contextmanager
def _pinned(day: dates.date) -> Iterator[None]:
    """The templates' clock shows this day. transformers takes the time from one place, and no other from outside."""
    before = chat_template_utils.datetime
    chat_template_utils.datetime = type("_Pinned", (_Today,), {"pinned": day})
    try:
        yield
    finally:
        chat_template_utils.datetime = before
