"""A checkpoint's chat template: what it writes of a conversation, on which date, and what it leaves out.

A template may ask for today's date (`strftime_now`). Runs are compared by their token rows, so the date is pinned: the
same for a whole run, for its resume and for every later measurement.

A template may also leave a message out without a word: most do so with a role that they do not know. That is found by
marks: the conversation is written a second time with a number behind every text and every name of a called tool, and a
number that is not written belongs to a lost message. A text that also stands elsewhere cannot hide the loss, and it is
no loss that templates trim white space, drop reasoning before </think>, or spell a text as JSON. spellings.py has the
spellings among which templates differ: a loss by one of them is no loss while another is written whole.
"""

import copy
import datetime as dates
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

from ..core.json_text import json_text
from .messages import BESIDE_CONTENT, names_called
from .spellings import arguments_in, spellings, with_arguments

# The part of a run's identity that a resume takes over.
DATE = "date that the chat template is told"
# The first number that is tried as a mark: it is in no text as a rule.
_FIRST_MARK = 7_340_061
_DAY = "%Y-%m-%d"
_ASKS_FOR_THE_DATE = f"{{{{ strftime_now('{_DAY}') }}}}"


class ChatTemplate:
    """The chat template of a tokenizer, on one date."""

    def __init__(self, tokenizer: Any, date: dates.date) -> None:
        """Raises AssertionError if transformers no longer takes the date from here."""
        self._tokenizer, self._date = tokenizer, date
        if self.date is not None:
            asked = [{"role": "user", "content": ""}]
            with _pinned(date):
                said = tokenizer.apply_chat_template(asked, tokenize=False, chat_template=_ASKS_FOR_THE_DATE)
            assert said == date.strftime(_DAY), "transformers gives chat templates another date than the pinned one"

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
        first: ValueError | None = None
        for given in spellings(messages):
            try:
                text = self._written(given, tools, ask)
            except Exception as error:  # the template comes with the checkpoint and runs in jinja2's sandbox
                wrong: ValueError | None = ValueError(f"is refused by the chat template ({error})")
            else:
                wrong = self._wrong(given, tools, text)
            if wrong is None:
                return text
            first = first or wrong
        assert first is not None
        raise first

    def _written(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        with _pinned(self._date):
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
            )

    def _wrong(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str
    ) -> ValueError | None:
        """What `text` lost of the messages, or spells in a way that no model should read."""
        base = _FIRST_MARK
        while str(base) in text:
            base += 1
        marks = [_Marks(base, number) for number in range(len(messages))]
        marked = [mark.put(message) for mark, message in zip(marks, messages, strict=True)]
        try:
            written = self._written(marked, tools, False)
        except Exception:  # a template that looks into the texts refuses the numbers: nothing can be told
            return None
        if lost := [mark.name for mark in marks if not mark.are_in(written)]:
            return ValueError(
                f"loses {_listed(lost)}: the chat template does not write what is said there (words, or the tools "
                "that it calls). Give it a role that the template knows, or leave it out"
            )
        if coded := [mark.name for mark in marks if mark.is_code(written)]:
            return ValueError(
                f"has parts or a call's arguments in {_listed(coded)} that the chat template writes as program code. "
                "Give the content as a string, and arguments as a JSON object"
            )
        return None


def _listed(names: list[str]) -> str:
    return f"message{'s' if len(names) > 1 else ''} {', '.join(names)}"


class _Marks:
    """The marks of one message: a number behind each text and each name of a called tool, and a key beside them."""

    def __init__(self, base: int, number: int) -> None:
        self._base, self._key, self._number = base, f"{base}-{number:06d}", number
        self.name, self._marks = "", list[str]()

    def put(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with the marks."""
        self.name = f"{self._number + 1} ({message['role']})"
        changed = copy.deepcopy({key: value for key, value in message.items() if key != "content"})
        changed["content"] = self._content(message["content"])
        for call in names_called(changed):
            call["name"] = self._behind(call["name"])
        if not self._marks:  # nothing but reasoning
            thought = {key: changed[key] for key in BESIDE_CONTENT if isinstance(changed.get(key), str)}
            changed |= {key: self._behind(words, "reasoning") for key, words in thought.items()}
        return with_arguments(changed, self._arguments)

    def are_in(self, written: str) -> bool:
        """Whether every mark is written."""
        return all(mark in written for mark in self._marks)

    def is_code(self, written: str) -> bool:
        """Whether a list of parts is written whole, or a call's arguments as a Python object or as JSON in JSON.

        No template knows the key: where the parts are read one by one it is not written.
        """
        return any(sign in written for sign in (f"{self._key}:part", f"'{self._key}':", f'\\"{self._key}\\":'))

    def _behind(self, words: str, place: str = "") -> str:
        if not words.strip():
            return words
        mark = f"{self._base}{self._number:06d}{place or len(self._marks)}{self._base}"
        self._marks += [mark] if mark not in self._marks else []
        return words + mark

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._behind(content)
        if not isinstance(content, list):  # null
            return content
        shown = {self._key: f"{self._key}:part"}
        return [
            part | shown if part.get("text") is None else part | shown | {"text": self._behind(part["text"])}
            for part in content
        ]

    def _arguments(self, given: Any) -> Any:
        if isinstance(given, dict):
            return given | {self._key: ""}
        held = arguments_in(given) if isinstance(given, str) else None
        return None if held is None else json_text(held | {self._key: ""})


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
